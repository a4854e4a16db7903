"""The effect of the strategies' server steps on the update, stated as theorems."""

import inspect
import itertools
import mmap
import tracemalloc
import weakref
from dataclasses import replace

import numpy as np
import pytest
from flwr.app import ConfigRecord

from fedlora.adapters import TensorSpec
from fedlora.adapters.layout import MOST_TRAINED
from fedlora.adapters.sketches import private_start
from fedlora.plan import WIRE_DTYPES, Upload
from fedlora.wire import rounded, unpacked
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import FedAvgLoRA, FedSB, FedSVD, FFALoRA, strategy_class
from fedlora_strategies.messages import assume_identity, read_train_messages, reply, to_record, to_tensors
from fedlora_strategies.private_start import PrivateStart
from fedlora_strategies.reductions import Gathering
from fedlora_strategies.refactorizations.svd import refactorize
from fedlora_strategies.step import ServerStep
from tests.federation import COLUMNS, ROWS, STRATEGIES, LinearSession, layout_of, plan_of, start_of, update_of

INEXACT = {"fedavg-lora", "flexlora", "pissa", "dora", "randlora"}
EXACT = [name for name in STRATEGIES if name not in INEXACT]
MODULE = "layer.0.q"


def federation(name, clients=4, **changes):
    """Return an engine with linear clients, the strategy, and a start that has learned something, so no factor is 0."""
    plan = plan_of(name, **changes)
    layout = layout_of(plan.family)
    sessions = {f"client-{i:03}": LinearSession(f"client-{i:03}", layout) for i in range(clients)}
    engine = InProcessEngine(sessions, plan.run_id, layout)
    strategy = strategy_class(name)(plan, layout)
    state = start_of(layout, 1)
    generator = np.random.default_rng(2)
    learned = {s.name: 0.3 * generator.standard_normal(s.shape) for s in layout.trained}
    return engine, strategy, {**state, **{key: value.astype(np.float32) for key, value in learned.items()}}


def uploads_of(engine, strategy, state, round=1):
    """Return the orders of one round and their replies."""
    return list(engine.send_and_receive(strategy.configure_train(round, to_record(state), {}, engine)))


def random_uploads(layout, count, seed):
    generator = np.random.default_rng(seed)
    return [{s.name: generator.standard_normal(s.shape) for s in layout.trained} for _ in range(count)]


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_mean_of_merged_models_is_the_merged_mean_for_exact_strategies_only(name, round):
    plan = plan_of(name)
    layout = layout_of(plan.family)
    strategy = strategy_class(name)(plan, layout)
    state = start_of(layout, 0) | random_uploads(layout, 1, seed=4)[0]
    active = strategy.step.trains(round) or {s.name for s in layout.trained}
    frozen = {s.name: state[s.name].astype(np.float64) for s in layout.state if s.name not in active}
    uploads, weights = random_uploads(layout.activated(active), 3, seed=5), np.array([0.5, 0.3, 0.2])
    if strategy.linear:
        mean = {key: sum(p * u[key] for p, u in zip(weights, uploads, strict=True)) for key in uploads[0]}
    else:  # its result is float32
        gathering = strategy.step.reduction.begin(state)
        for upload, weight in zip(uploads, weights, strict=True):
            gathering.add(upload, weight)
        mean = gathering.result()
    after, _ = strategy.step.rewrite({**frozen, **mean}, {}, round=round)
    for module in layout.modules:
        merged = sum(p * update_of({**frozen, **u}, module) for p, u in zip(weights, uploads, strict=True))
        error = np.linalg.norm(update_of(after, module) - merged) / np.linalg.norm(merged)
        assert error < (1e-13 if strategy.linear else 1e-6) if strategy.exact else error > 0.1
    assert strategy.exact == (name not in INEXACT)


@pytest.mark.parametrize("round", [1, 2])
@pytest.mark.parametrize("wire_dtype", WIRE_DTYPES)
@pytest.mark.parametrize("name", EXACT)
def test_a_round_through_messages_is_exact_up_to_float32(name, wire_dtype, round):
    """In bf16 too, with the factors as clients were sent them: the server's own tensors are not rounded."""
    engine, strategy, state = federation(name, wire_dtype=wire_dtype)
    replies = uploads_of(engine, strategy, state, round)
    sent = [to_tensors(next(iter(r.content.array_records.values())), wire_dtype) for r in replies]
    arrays, metrics = strategy.aggregate_train(round, replies)
    assert metrics["replies"] == 4 and metrics["rejected"] == 0
    after = to_tensors(arrays)
    strategy.layout.check(after, "state")
    for module in strategy.layout.modules:
        held = rounded(state, wire_dtype)
        merged = np.mean([update_of({**held, **tensors}, module) for tensors in sent], axis=0)
        np.testing.assert_allclose(update_of(after, module), merged, atol=2e-6)


def test_fedsvds_own_A_keeps_orthonormal_rows_and_clients_hold_it_rounded():
    engine, strategy, state = federation("fedsvd", wire_dtype="bf16")
    arrays, _ = strategy.aggregate_train(1, uploads_of(engine, strategy, state))
    own = to_tensors(arrays)[f"{MODULE}.A"]
    [(_, _, held), *_] = read_train_messages(strategy.configure_train(2, arrays, {}, engine))
    assert {str(array.dtype) for array in held.values()} == {"uint16"}
    A = unpacked(held, "bf16")[f"{MODULE}.A"]
    assert np.array_equal(A, rounded({"A": own}, "bf16")["A"]) and not np.array_equal(A, own)
    identity = np.eye(len(own))
    assert np.abs(own @ own.T - identity).max() < 1e-6
    assert 1e-6 < np.abs(A @ A.T - identity).max() < 2**-7


def test_the_refactorization_preserves_the_update_and_gives_orthonormal_rows():
    generator = np.random.default_rng(3)
    state = {"q.B": generator.standard_normal((ROWS, 3)), "q.A": generator.standard_normal((3, COLUMNS))}
    after = refactorize(state, "q")
    np.testing.assert_allclose(after["q.B"] @ after["q.A"], state["q.B"] @ state["q.A"], atol=1e-13)
    np.testing.assert_allclose(after["q.A"] @ after["q.A"].T, np.eye(3), atol=1e-13)


def test_the_refactorization_leaves_a_zero_B_and_its_A_as_they_are():
    state = {"q.B": np.zeros((ROWS, 2)), "q.A": np.random.default_rng(3).standard_normal((2, COLUMNS))}
    after = refactorize(state, "q")
    np.testing.assert_array_equal(after["q.A"], state["q.A"])
    np.testing.assert_array_equal(after["q.B"], 0.0)


def test_a_rank_above_a_layers_smaller_side_is_refused_at_once():
    plan, layout = plan_of("fedsvd"), layout_of("frozen-a", rank=COLUMNS + 1)
    with pytest.raises(ValueError, match="smaller side"):
        FedSVD(plan, layout)


def test_the_refactorization_of_a_rank_deficient_B_keeps_the_update_and_the_row_space():
    generator = np.random.default_rng(4)
    A, column = generator.standard_normal((3, COLUMNS)), generator.standard_normal((ROWS, 1))
    after = refactorize({"q.B": column @ generator.standard_normal((1, 3)), "q.A": A}, "q")
    np.testing.assert_allclose(after["q.A"] @ after["q.A"].T, np.eye(3), atol=1e-13)
    np.testing.assert_allclose(np.linalg.norm(after["q.B"][:, 1:]), 0.0, atol=1e-13)
    projector = A.T @ np.linalg.inv(A @ A.T) @ A
    np.testing.assert_allclose(after["q.A"] @ projector, after["q.A"], atol=1e-12)


def test_fedsvd_and_orthonormal_ffa_move_the_update_identically_under_clipped_sgd_with_coupled_noise():
    """row(BA) ⊆ row(A), and gradient, clip and noise are equivariant under A → QA, B → BQᵀ. Float64, five rounds."""
    ffa, svd = (strategy_class(n)(plan_of(n), layout_of("frozen-a", head=False)) for n in ("ffa-lora", "fedsvd"))
    module, generator = MODULE, np.random.default_rng(6)
    start = {k: v.astype(np.float64) for k, v in start_of(ffa.layout, 0).items()}
    start = {k: np.linalg.qr(v.T)[0].T if k.endswith(".A") else v for k, v in start.items()}
    clients = [(generator.standard_normal((9, COLUMNS)), generator.standard_normal((9, ROWS))) for _ in range(3)]

    def trained(state, data, noise, rotation):
        B, A = state[f"{module}.B"], state[f"{module}.A"]
        for N in noise:
            total = np.zeros_like(B)
            for x, y in zip(*data, strict=True):
                g = np.outer(B @ (A @ x) - y, A @ x)
                total += g * min(1.0, 0.5 / np.linalg.norm(g))
            B = B - 0.2 * (total + 0.5 * N @ rotation.T) / 9
        return {**state, f"{module}.B": B}

    states = [start, start]
    for round in range(1, 6):
        noise = generator.standard_normal((3, 2, ROWS, 2))
        for i, strategy in enumerate((ffa, svd)):
            rotation = states[i][f"{module}.A"] @ states[0][f"{module}.A"].T
            local = [trained(states[i], d, n, rotation) for d, n in zip(clients, noise, strict=True)]
            mean = {s.name: np.mean([u[s.name] for u in local], axis=0) for s in strategy.layout.trained}
            frozen = {s.name: states[i][s.name] for s in strategy.layout.frozen}
            states[i] = dict(strategy.step.rewrite({**frozen, **mean}, {}, round)[0])
        np.testing.assert_allclose(update_of(states[1], module), update_of(states[0], module), atol=1e-13)
    assert np.linalg.norm(update_of(states[0], module)) > 0.1
    assert np.linalg.norm(states[1][f"{module}.A"] - start[f"{module}.A"]) > 0.1, "A was never refactorized"


def test_fedsvd_refactorizes_after_its_warmup_in_every_period():
    plan, layout = plan_of("fedsvd"), layout_of("frozen-a")
    strategy = FedSVD(plan, layout, warmup=2, period=3)
    frozen = {s.name: start_of(layout, 0)[s.name] for s in layout.frozen}
    mean = {k: v.astype(np.float32) for k, v in random_uploads(layout, 1, 0)[0].items()}
    changed = [r for r in range(1, 10)
               if not np.array_equal(strategy.step.rewrite({**frozen, **mean}, {}, r)[0][f"{MODULE}.A"],
                                     frozen[f"{MODULE}.A"])]
    assert changed == [5, 8]
    with pytest.raises(ValueError, match="period"):
        FedSVD(plan, layout, period=0)


@pytest.mark.parametrize("name", STRATEGIES)
def test_any_order_of_uploads_gives_the_same_bits(name):
    results = set()
    for permutation in itertools.permutations(range(4)):
        engine, strategy, state = federation(name)
        replies = uploads_of(engine, strategy, state)
        arrays, _ = strategy.aggregate_train(1, [replies[i] for i in permutation])
        results.add(tuple(array.data for array in arrays.values()))
    assert len(results) == 1


def test_a_frozen_head_travels_once_beside_the_factor_that_moves():
    layout = layout_of("frozen-a")
    frozen = TensorSpec("head.dense.weight", (4, 4), "head")
    layout = replace(layout, frozen=(*layout.frozen, frozen))
    plan = plan_of("fedsvd")
    strategy = FedSVD(plan, layout)
    assume_identity(plan.run_id)
    assert strategy.traffic.once == 16 and strategy.traffic.down == strategy.traffic.up + 2 * 2 * COLUMNS
    state = {**start_of(layout, 0)}
    node, sent = 7, []
    for number in (1, 2, 3):
        message = next(iter(strategy.configure_train(number, to_record(state), ConfigRecord({"nodes": [node]}), None)))
        sent.append(set(message.content["arrays"]) - {spec.name for spec in layout.trained})
        strategy._held[node] = strategy._round.frozen_sha256
        state = state | {f"{module}.A": state[f"{module}.A"] + 1 for module in layout.modules}
    moving = {f"{module}.A" for module in layout.modules}
    assert sent == [moving | {frozen.name}, moving, moving]


@pytest.mark.parametrize(("name", "up", "again", "once"), [
    # per target of (m, n) = (6, 4) at r = 2, as in the communication table; the head's 3 values travel both ways
    ("fedavg-lora", 2 * (6 + 4), 2 * (6 + 4), 0),
    ("ffa-lora", 2 * 6, 2 * 6, 2 * 4),
    ("fed-sb", 2 * 2, 2 * 2, 2 * (6 + 4)),
    ("fedsvd", 2 * 6, 2 * 6 + 2 * 4, 0),
    ("loldu", 2, 2, 2 * (6 + 4)),
    ("dora-magnitudes", 6, 6, 6),
    ("pissa", 2 * (6 + 4), 2 * (6 + 4), 2 * (6 + 4)),
    ("dora", 2 * (6 + 4) + 6, 2 * (6 + 4) + 6, 0),
    ("randlora", 2 * 2 + 2 * 4, 2 * 2 + 2 * 4, 2 * 4 / 2 + 6 * 2 * 2 / 2),  # both targets share A and B
    ("rolora", (2 * 6, 2 * 4), 2 * (6 + 4), 0),  # B in odd rounds, A in even ones
    ("bone", 2 * 6, 2 * 6, 0),
    ("dora-frozen-a", 6 + 2 * 6, 6 + 2 * 6, 6 + 2 * 4),
    ("flylora", 2 * 6, 2 * 6, 2 * 4),
    ("salt", 1 + 1 * 4, 1 + 1 * 4, 1 * (6 + 4) + 1 * 6),  # one of the two ranks for each part
    ("flexlora", 2 * (6 + 4), 2 * (6 + 4), 0),
    # with as many slots in the stack as the layer can use
    ("fedex-lora", 2 * (6 + 4), (2 + 4) * (6 + 4), 0),
    ("fedsvd-refresh", 2 * 6, (2 + 4) * (6 + 4), 0),
    ("switch-lora", 2 * 6, (2 + 4) * (6 + 4), 0),
])
def test_values_per_client_and_round_are_those_of_the_communication_table(name, up, again, once):
    engine, strategy, state = federation(name, clients=3, rounds={"rolora": 2, "switch-lora": 1}.get(name, 3))
    uploaded = up if isinstance(up, tuple) else (up,) * strategy.plan.rounds
    assert (strategy.traffic.up, strategy.traffic.down, strategy.traffic.once) == (
        2 * np.mean(uploaded) + 3, 2 * again + 3, 2 * once)
    arrays, before_up, before_down = to_record(state), 0, 0
    for round, up in enumerate(uploaded, 1):
        arrays, _ = strategy.aggregate_train(
            round, engine.send_and_receive(strategy.configure_train(round, arrays, {}, engine)))
        first = 2 * once if round == 1 else 0
        assert engine.bytes_up - before_up == 3 * 4 * (2 * up + 3)
        assert engine.bytes_down - before_down == 3 * 4 * (2 * again + 3 + first)
        before_up, before_down = engine.bytes_up, engine.bytes_down


def test_minilm_uploads_have_the_published_sizes():
    modules = tuple(f"encoder.layer.{i}.attention.self.{part}" for i in range(6) for part in ("query", "value"))
    counted = {}
    for name in STRATEGIES:
        chosen = strategy_class(name)
        layout = layout_of(chosen.recipe.family, rank=8, modules=modules, head=False, rows=384, columns=384)
        counted[name] = chosen(plan_of(name), layout).traffic.up
    assert counted == {"fedavg-lora": 73_728, "ffa-lora": 36_864, "fed-sb": 768, "fedsvd": 36_864, "loldu": 96,
                       "dora-magnitudes": 4_608, "rolora": 36_864, "flexlora": 73_728, "fedex-lora": 73_728,
                       "fedsvd-refresh": 36_864, "switch-lora": 36_864, "pissa": 73_728, "dora": 78_336,
                       "randlora": 225_792, "bone": 36_864, "dora-frozen-a": 41_472, "flylora": 36_864, "salt": 18_480}


class ConstantSession:
    """A client that uploads ones, so that all memory is the engine's and the strategy's."""

    def __init__(self, layout):
        self.layout = layout

    def run_round(self, plan, tensors):
        ones = {s.name: np.ones(s.shape, np.float32) for s in self.layout.trained}
        return Upload(*plan.key, tensors=ones, steps=1)


def test_peak_memory_is_flat_from_10_to_300_clients(monkeypatch):
    layout = layout_of("frozen-a", rows=20_000, columns=8)
    size = 4 * layout.num_trained
    alive, counts = set(), []

    class Mapped(mmap.mmap):  # the memory of an upload, which tracemalloc does not see
        def __new__(cls, *arguments, **options):
            mapped = super().__new__(cls, *arguments, **options)
            alive.add(key := next(number))
            weakref.finalize(mapped, alive.discard, key)
            counts.append(len(alive))
            return mapped

    number = itertools.count()
    monkeypatch.setattr(mmap, "mmap", Mapped)

    def peak(clients):
        engine = InProcessEngine({f"c{i}": ConstantSession(layout) for i in range(clients)}, "0" * 16, layout)
        strategy = FFALoRA(plan_of("ffa-lora", run_id="0" * 16), layout)
        arrays = to_record(start_of(layout, 0))
        tracemalloc.start()
        strategy.aggregate_train(1, engine.send_and_receive(strategy.configure_train(1, arrays, {}, engine)))
        highest = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return highest

    peak(2)
    few, many = peak(10), peak(300)
    assert many < few + 8 * size, f"{few} bytes for 10 clients, {many} for 300; one upload has {size}"
    assert len(counts) == 312 and max(counts) <= 2, "uploads are read one after the other"


def broken(tensors, kind):
    name = sorted(tensors)[0]
    array = tensors[name]
    if kind == "not finite":
        return {**tensors, name: np.where(np.arange(array.size).reshape(array.shape) == 1, np.float32("nan"), array)}
    if kind == "huge":
        return {**tensors, name: np.full(array.shape, 3e38, np.float32)}
    if kind == "misshaped":
        return {**tensors, name: array[:-1]}
    if kind == "float64":
        return {**tensors, name: array.astype(np.float64)}
    if kind == "missing":
        return {key: value for key, value in tensors.items() if key != name}
    return {**tensors, "base.weight": array}


@pytest.mark.parametrize("kind", ["not finite", "huge", "misshaped", "float64", "missing", "unknown"])
def test_a_broken_upload_adds_nothing(kind):
    engine, strategy, state = federation("ffa-lora")
    replies = uploads_of(engine, strategy, state)
    bad = replies[1]
    tensors = to_tensors(bad.content["arrays"])
    bad.content["arrays"] = to_record(broken(tensors, kind))
    arrays, metrics = strategy.aggregate_train(1, iter(replies))
    assert metrics["replies"] == 3 and list(strategy.rejected) == [bad.metadata.src_node_id]
    engine, strategy, state = federation("ffa-lora")
    others = [r for r in uploads_of(engine, strategy, state) if r.metadata.src_node_id != bad.metadata.src_node_id]
    without, _ = strategy.aggregate_train(1, others)
    assert arrays == without


@pytest.mark.parametrize("name", STRATEGIES)
def test_the_largest_upload_that_is_taken_leaves_a_state_to_go_on_with(name):
    engine, strategy, state = federation(name)
    replies = uploads_of(engine, strategy, state)[:1]
    largest = {key: np.full(array.shape, MOST_TRAINED, np.float32)
               for key, array in to_tensors(replies[0].content["arrays"]).items()}
    replies[0].content["arrays"] = to_record(largest)
    arrays, metrics = strategy.aggregate_train(1, replies)
    assert metrics["replies"] == 1
    strategy.layout.check(to_tensors(arrays), "state")


@pytest.mark.parametrize("change", [{"round": 2}, {"run_id": "f" * 16}])
def test_an_upload_for_another_order_adds_nothing(change):
    engine, strategy, state = federation("ffa-lora")
    replies = uploads_of(engine, strategy, state)
    replies[0].content["config"].update(change)
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics["replies"] == 3 and metrics["rejected"] == 1


def test_a_second_reply_of_a_node_and_one_of_a_stranger_add_nothing():
    engine, strategy, state = federation("ffa-lora")
    replies = uploads_of(engine, strategy, state)
    _, metrics = strategy.aggregate_train(1, [*replies, replies[0]])
    assert metrics["replies"] == 4
    strategy.configure_train(2, to_record(state), {"nodes": [replies[0].metadata.src_node_id]}, engine)
    _, metrics = strategy.aggregate_train(2, replies[1:])
    assert metrics is None


def test_a_private_run_takes_no_upload_that_discloses_a_loss():
    engine, strategy, state = federation("fed-sb", private=True)
    replies = uploads_of(engine, strategy, state)
    replies[2].content["metrics"]["train_loss"] = 0.5
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics["replies"] == 3 and "train_loss" not in metrics
    assert "discloses" in next(iter(strategy.rejected.values()))


def test_weights_are_the_numbers_of_examples_only_where_the_plan_says_so():
    for weighted in (False, True):
        engine, strategy, state = federation("ffa-lora", clients=2, weight_by_examples=weighted)
        replies = uploads_of(engine, strategy, state)
        replies[0].content["metrics"]["num_examples"] = 36
        uploads = [to_tensors(r.content["arrays"])["head.out.bias"] for r in replies]
        replies[1].content["arrays"] = to_record(
            {**to_tensors(replies[1].content["arrays"]), "head.out.bias": uploads[1] + 1})
        arrays, _ = strategy.aggregate_train(1, replies)
        share = 12 / 48 if weighted else 1 / 2
        np.testing.assert_allclose(to_tensors(arrays)["head.out.bias"], uploads[0] + share, rtol=1e-6)


def test_frozen_tensors_travel_once_unless_they_change_or_the_node_lost_them():
    def sizes(strategy, engine, arrays, round):
        messages = list(strategy.configure_train(round, arrays, {}, engine))
        return [len(m.content["arrays"]) for m in messages], engine.send_and_receive(messages)

    for name, later in (("fed-sb", 3), ("fedsvd", 5)):
        engine, strategy, state = federation(name, clients=2)
        counted, replies = sizes(strategy, engine, to_record(state), 1)
        assert counted == [len(state)] * 2
        arrays, _ = strategy.aggregate_train(1, replies)
        counted, replies = sizes(strategy, engine, arrays, 2)
        assert counted == [later] * 2
        arrays, _ = strategy.aggregate_train(2, replies)
        strategy.forget(engine.get_node_ids()[0])
        counted, _ = sizes(strategy, engine, arrays, 3)
        assert counted == [len(state), later]


@pytest.mark.parametrize("name", STRATEGIES)
def test_start_works_in_a_plain_flower_loop_and_learns(name):
    engine, strategy, state = federation(name, lr=0.03 if name == "bone" else 0.1)
    before = np.mean([session.loss(state) for session in engine._sessions.values()])
    result = strategy.start(engine, to_record(state), num_rounds=6)
    after = to_tensors(result.arrays)
    assert np.mean([session.loss(after) for session in engine._sessions.values()]) < before
    assert [dict(m)["replies"] for m in result.train_metrics_clientapp.values()] == [4] * 6
    strategy.layout.check(after, "state")


def test_a_strategy_refuses_adapters_of_another_family():
    with pytest.raises(ValueError, match="needs 'bra'"):
        FedSB(plan_of("fed-sb"), layout_of("lora"))
    with pytest.raises(ValueError, match="needs 'lora'"):
        FedAvgLoRA(plan_of("fed-sb"), layout_of("lora"))


def test_a_state_that_does_not_fit_is_refused_before_anything_is_sent():
    engine, strategy, state = federation("ffa-lora")
    with pytest.raises(ValueError, match="missing"):
        strategy.configure_train(1, to_record({k: v for k, v in state.items() if not k.endswith("A")}), {}, engine)


def test_a_run_without_any_usable_reply_changes_nothing():
    engine, strategy, state = federation("ffa-lora", clients=1)
    [message] = strategy.configure_train(1, to_record(state), {}, engine)
    [answer] = engine.send_and_receive([message])
    answer.content["config"]["round"] = 9
    assert strategy.aggregate_train(1, [answer]) == (None, None)
    with pytest.raises(ValueError, match="not configured"):
        strategy.aggregate_train(1, [])


def test_a_node_that_answers_missing_tensors_is_sent_them_again():
    engine, strategy, state = federation("fed-sb", clients=1)
    arrays, _ = strategy.aggregate_train(1, uploads_of(engine, strategy, state))
    [session] = engine._sessions.values()
    session.held.clear()
    assert strategy.aggregate_train(
        2, engine.send_and_receive(strategy.configure_train(2, arrays, {}, engine))) == (None, None)
    _, metrics = strategy.aggregate_train(
        3, engine.send_and_receive(strategy.configure_train(3, arrays, {}, engine)))
    assert metrics["replies"] == 1


def test_uploads_keep_their_values_through_messages():
    engine, strategy, state = federation("fed-sb", clients=1)
    [message] = strategy.configure_train(1, to_record(state), {}, engine)
    tensors = {s.name: np.full(s.shape, 0.1, np.float32) for s in strategy.layout.trained}
    upload = Upload(strategy.plan.run_id, 1, 0, tensors, steps=1)
    arrays, _ = strategy.aggregate_train(1, [reply(replace(upload, num_examples=3), message)])
    for name, value in tensors.items():
        np.testing.assert_array_equal(to_tensors(arrays)[name], value)


@pytest.mark.parametrize("step", [Gathering.add, ServerStep.combine, private_start, PrivateStart.begin])
def test_what_a_server_computes_with_has_left_the_clients_or_is_its_own(step):
    """No step is given an upload, which holds more than tensors, nor anything else that a client keeps."""
    taken = {given.annotation for given in inspect.signature(step).parameters.values() if given.name != "self"}
    assert "Released" in taken and taken <= {"Released", "Tensors", "AdapterLayout", "RunPlan", "str", "int", "float"}
