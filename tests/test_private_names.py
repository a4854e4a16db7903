"""Private names of Flower and Opacus: every use is listed here with its reason, and each still works.

Both libraries may rename or remove a private name in any release. So the first test finds the uses in our packages, and
fails on one that is not listed. The others hold the installed library against what our code relies on; where one fails
after an upgrade, its message names the file to adapt.
"""

import ast
import importlib
import importlib.util
import inspect
import re
from functools import cache
from pathlib import Path
from types import ModuleType

import flwr
import numpy as np
import pytest
from flwr.app import Array, ArrayRecord, ConfigRecord, Message, MessageType, RecordDict
from flwr.common.constant import ErrorCode
from flwr.supercore.task_identity import TaskIdentity
from opacus.accountants import PRVAccountant
from opacus.accountants.analysis.prv import Domain, PoissonSubsampledGaussianPRV
from opacus.optimizers import DPOptimizer

from fedlora.privacy.prv import QuickPRVAccountant
from fedlora.training.optimizer import PerRecordOptimizer
from fedlora_strategies import messages

REPOSITORY = Path(__file__).parents[1]
PACKAGES = ("fedlora", "client", "server", "strategies", "simulations", "benchmarks")
LIBRARIES = ("flwr", "opacus")

PUBLIC = {
    "flwr.app", "flwr.clientapp", "flwr.serverapp", "flwr.serverapp.strategy", "flwr.simulation",
    "opacus", "opacus.accountants", "opacus.grad_sample", "opacus.optimizers",
    "opacus.utils.fast_gradient_clipping_utils",  # Opacus' tutorial on fast gradient clipping imports from it
}
"""The modules that the libraries document for use from outside."""

MESSAGES, PRV = "strategies/fedlora_strategies/messages.py", "fedlora/privacy/prv.py"
USES = {
    (MESSAGES, "flwr.supercore.task_identity.TaskIdentity"):
        "Flower makes a Message only in a process that has a task's identity; FedLoRA's engines set one.",
    (MESSAGES, "flwr.common.constant.ErrorCode"):
        "NODE_UNAVAILABLE is how a SuperLink says that a node is gone; no public module has the code.",
    (MESSAGES, "_message_id"):
        "A SuperLink gives messages their ids; FedLoRA's engines have none, and replies refer to the id.",
    (MESSAGES, "_data"):
        "ArrayRecord's constructor checks every array, which takes longer than all else about a small reply.",
    (MESSAGES, "__dict__"):
        "The way to the two names above, and to the fields of an Array without its constructor.",
    (MESSAGES, "__new__"):
        "Array's constructor refuses a view of memory, and would copy every upload.",
    (PRV, "opacus.accountants.analysis.prv.Domain"):
        "The grid that an override of `_get_domain` must return.",
    (PRV, "opacus.accountants.analysis.prv.PoissonSubsampledGaussianPRV"):
        "The type of the random variables that Opacus passes to `_get_domain`.",
    (PRV, "_get_domain"):
        "Opacus spends nine tenths of its time on the ends of the grid; the override computes them at once.",
}
"""(file, private name) → why the file uses it."""

OTHER_LIBRARIES = {("fedlora/training/runtime_checks.py", "_version"): "PyTorch's count of writes to a tensor."}
"""(file, private name) → whose name it is, where Flower or Opacus happen to use the same one."""


def ours():
    """Yield (path in the repository, syntax tree) of every file of our packages."""
    for package in PACKAGES:
        for file in sorted((REPOSITORY / package).rglob("*.py")):
            if "_pb2" not in file.name and "/build/" not in file.as_posix():
                yield file.relative_to(REPOSITORY).as_posix(), ast.parse(file.read_text("utf-8"))


@cache
def private_names():
    """Return every name with one leading underscore in the source of the two libraries."""
    found = set()
    for library in LIBRARIES:
        for file in Path(importlib.util.find_spec(library).origin).parent.rglob("*.py"):
            found.update(re.findall(r"\b_[a-z]\w*", file.read_text("utf-8")))
    return found


def defined(tree):
    """Return the private names that a file defines: functions, classes, fields and attributes of `self`."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            yield node.name
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Store):
            yield node.id
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Store) and _on_self(node):
            yield node.attr


def _on_self(node):
    return isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")


def imported(tree):
    """Yield (name in the file, full name) of everything that a file imports, wherever in it."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            for alias in node.names:
                yield alias.asname or alias.name.partition(".")[0], alias.name
        elif isinstance(node, ast.ImportFrom) and not node.level:
            for alias in node.names:
                yield alias.asname or alias.name, f"{node.module}.{alias.name}"


def dotted(node, names):
    """Return the full name of an attribute of something imported, such as os.path.join; None for other expressions."""
    if isinstance(node, ast.Name):
        return names.get(node.id)
    inner = dotted(node.value, names) if isinstance(node, ast.Attribute) else None
    return inner and f"{inner}.{node.attr}"


def of_a_library(full_name):
    return full_name.partition(".")[0] in LIBRARIES


def private_uses(tree, everywhere=frozenset()):
    """Yield every private name of the two libraries that a file uses.

    Args:
        tree: The file.
        everywhere: The private names that any of our files defines.
    """
    imports, here = list(imported(tree)), set(defined(tree))
    names = dict(imports)
    for _, full_name in imports:
        module, _, name = full_name.rpartition(".")
        if of_a_library(full_name) and full_name not in PUBLIC and (
                module not in PUBLIC or name.startswith("_") or is_module(module, name)):
            yield full_name
    strange = private_names()
    for node in ast.walk(tree):
        path = dotted(node, names)
        if isinstance(node, ast.Attribute) and path is not None and of_a_library(path) and path not in PUBLIC and (
                is_module(*path.rsplit(".", 1))):
            yield path  # as in opacus.accountants.analysis, after import opacus
        if isinstance(node, ast.Attribute) and node.attr in strange:
            if path is not None and not of_a_library(path):
                continue  # such as os._exit and torch._foreach_norm
            if node.attr not in (everywhere if _on_self(node) else here):
                yield node.attr
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and node.value in strange - here:
            yield node.value  # as in getattr(message, "_name") and vars(message)["_name"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and re.fullmatch(
                rf"({'|'.join(LIBRARIES)})(\.\w+)+", node.value):
            yield node.value  # as in importlib.import_module("flwr.common")
        elif any(map(of_a_library, names.values())):
            if isinstance(node, ast.Attribute) and node.attr in ("__dict__", "__new__"):
                yield node.attr
            elif isinstance(node, ast.Name) and node.id == "vars":
                yield node.id
        if isinstance(node, ast.ClassDef):
            for base in node.bases:
                if isinstance(base, ast.Name) and of_a_library(names.get(base.id, "")):
                    yield from sorted({*defined(node)} & private_names_of(names[base.id]))


def is_module(parent, name):
    """Return whether a name of a library's module is a module; False also where the parent is a class."""
    try:
        return isinstance(getattr(importlib.import_module(parent), name, None), ModuleType)
    except ModuleNotFoundError:
        return False


def private_names_of(full_name):
    """Return the private methods and attributes of a library's class, which a subclass must not define by accident."""
    module, _, name = full_name.rpartition(".")
    kinds = [kind for kind in getattr(importlib.import_module(module), name).__mro__ if of_a_library(kind.__module__)]
    return {name for kind in kinds for name in re.findall(r"(?:self\.|def )(_[a-z]\w*)", inspect.getsource(kind))}


def test_every_private_use_is_listed_with_its_reason():
    everything = dict(ours())
    everywhere = {name for tree in everything.values() for name in defined(tree)}
    found = {(file, name) for file, tree in everything.items() for name in private_uses(tree, everywhere)}
    new = found - USES.keys() - OTHER_LIBRARIES.keys()
    assert not new, ("private names of Flower or Opacus that no test guards; use a public one, or list it in USES and "
                     f"add a test of what is relied on: {sorted(new)}")
    gone = (USES.keys() | OTHER_LIBRARIES.keys()) - found
    assert not gone, f"these are not used any more; take them off the list: {sorted(gone)}"
    assert all(reason.endswith(".") for reason in USES.values())


@pytest.mark.parametrize("code, name", [
    ("from flwr.common.constant import ErrorCode", "flwr.common.constant.ErrorCode"),
    ("def f():\n    from flwr.server.superlink import linkstate", "flwr.server.superlink.linkstate"),
    ("import flwr.common", "flwr.common"),
    ("import opacus\nopacus.accountants.analysis.prv.Domain", "opacus.accountants.analysis"),
    ("import importlib\nimportlib.import_module('flwr.supercore.utils')", "flwr.supercore.utils"),
    ("from flwr.app import _x", "flwr.app._x"),
    ("message.metadata._message_id = 'm'", "_message_id"),
    ("getattr(message.metadata, '_message_id')", "_message_id"),
    ("from flwr.app import Message\nvars(message)", "vars"),
    ("from flwr.app import Array\nArray.__new__(Array)", "__new__"),
    ("class A(B):\n    def f(self):\n        return self._is_last_step_skipped", "_is_last_step_skipped"),
    ("from opacus.accountants import PRVAccountant\nclass A(PRVAccountant):\n    def _get_domain(self): ...",
     "_get_domain"),
    ("from opacus.optimizers import DPOptimizer\nclass A(DPOptimizer):\n    def _check_skip_next_step(self): ...",
     "_check_skip_next_step"),
    ("from opacus.optimizers import optimizer", "opacus.optimizers.optimizer")])
def test_a_private_use_is_found(code, name):
    assert name in set(private_uses(ast.parse(code)))


@pytest.mark.parametrize("code", [
    "from flwr.app import Message", "from opacus.optimizers import DPOptimizer", "import os\nos._exit(1)",
    "class A:\n    def __init__(self):\n        self._data = 1\n    def f(self, other):\n        return other._data",
    "import torch\ntorch._foreach_norm(x)", "PACKAGES = ('opacus', 'flwr')", "module.__dict__.pop('forward')"])
def test_other_names_are_not_private_uses(code):
    assert not set(private_uses(ast.parse(code), {"_data"}))


def upgrade(file):
    return f"the library changed a private name that {file} uses: adapt that file, then this test, to the new version"


@pytest.fixture
def identity():
    messages.assume_identity("0123456789abcdef")


def test_flower_is_the_version_that_the_private_names_were_read_in():
    assert flwr.__version__.startswith("1.41."), upgrade(MESSAGES)


def test_a_process_with_an_identity_can_make_messages(identity):
    assert (TaskIdentity.task_id, TaskIdentity.node_id) == (0, 0), upgrade(MESSAGES)
    assert TaskIdentity.run_id == 0x0123456789ABCDEF, upgrade(MESSAGES)
    message = Message(RecordDict(), dst_node_id=7, message_type=MessageType.TRAIN)
    assert message.metadata.run_id == 0x0123456789ABCDEF and message.metadata.src_node_id == 0, upgrade(MESSAGES)


def test_a_message_has_the_id_that_it_is_given_and_its_reply_points_to_it(identity):
    message = Message(RecordDict(), dst_node_id=7, message_type=MessageType.TRAIN)
    assert "_message_id" in message.metadata.__dict__ and message.metadata.message_id == "", upgrade(MESSAGES)
    messages.assign_id(message, "m1")
    assert message.metadata.message_id == "m1", upgrade(MESSAGES)
    assert Message(RecordDict(), reply_to=message).metadata.reply_to_message_id == "m1", upgrade(MESSAGES)


def test_flowers_error_codes_are_below_ours_and_one_says_that_a_node_is_gone():
    codes = {name: code for name, code in vars(ErrorCode).items() if name.isupper()}
    assert codes["NODE_UNAVAILABLE"] == 5, upgrade(MESSAGES)
    assert max(codes.values()) < messages.REFUSED, upgrade(MESSAGES)


def test_an_array_made_without_its_constructor_is_flowers_array():
    values = np.arange(6, dtype=np.float32).reshape(2, 3)
    flowers = Array(values)
    [(name, made)] = messages.to_record({"a": values}).items()
    assert name == "a" and made.__dict__.keys() == {"dtype", "shape", "stype", "data"}
    assert made.__dict__.keys() <= flowers.__dict__.keys(), upgrade(MESSAGES)
    assert made == flowers and made.object_id == flowers.object_id, upgrade(MESSAGES)
    assert flowers.stype == messages.NUMPY, upgrade(MESSAGES)
    np.testing.assert_array_equal(made.numpy(), values)


def test_a_record_keeps_its_arrays_where_they_are_put():
    record, array = ArrayRecord(), Array(np.zeros(2, np.float32))
    record["a"] = array
    assert record.__dict__["_data"] == {"a": array}, upgrade(MESSAGES)
    record.__dict__["_data"]["b"] = array
    assert list(record) == ["a", "b"] and record["b"] is array and len(record) == 2, upgrade(MESSAGES)
    assert RecordDict({"arrays": record, "config": ConfigRecord()})["arrays"] is record, upgrade(MESSAGES)


def test_opacus_asks_for_the_grid_where_it_is_overridden(monkeypatch):
    mine, theirs = (list(inspect.signature(kind._get_domain).parameters)
                    for kind in (QuickPRVAccountant, PRVAccountant))
    assert mine == theirs == ["self", "prvs", "num_self_compositions", "eps_error", "delta_error"], upgrade(PRV)
    asked, quick = [], QuickPRVAccountant._get_domain
    monkeypatch.setattr(QuickPRVAccountant, "_get_domain",
                        lambda self, **given: asked.append(given) or quick(self, **given))
    accountants = QuickPRVAccountant(), PRVAccountant()
    for accountant in accountants:
        accountant.history = [(1.1, 0.02, 300)]
    epsilons = [accountant.get_epsilon(1e-5) for accountant in accountants]
    assert epsilons[0] == pytest.approx(epsilons[1], abs=0.02), upgrade(PRV)
    [given] = asked
    [prv] = given["prvs"]
    assert isinstance(prv, PoissonSubsampledGaussianPRV), upgrade(PRV)
    assert (prv.noise_multiplier, prv.sample_rate) == (1.1, 0.02) and given["num_self_compositions"] == [300], \
        upgrade(PRV)


def test_a_grid_of_opacus_covers_the_ends_that_it_is_given():
    grid = Domain.create_aligned(-2.0, 2.0, 0.01)
    assert grid.t_min <= -2.0 and grid.t_max >= 2.0 and grid.dt == pytest.approx(0.01), upgrade(PRV)


def test_opacus_calls_the_parts_of_a_step_that_the_optimizer_overrides():
    source = inspect.getsource(DPOptimizer.pre_step) + inspect.getsource(DPOptimizer.step)
    for part in ("clip_and_accumulate", "add_noise", "scale_grad", "pre_step"):
        assert f"self.{part}()" in source, upgrade("fedlora/training/optimizer.py")
        assert part in vars(PerRecordOptimizer)
