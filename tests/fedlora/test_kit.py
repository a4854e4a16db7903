"""The coordinator's kit: what it says is read back, what was changed is refused, and a plan is held against it."""

import dataclasses
import re
import tempfile
import tomllib
from functools import cache
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as some

from fedlora.config.toml import as_toml
from fedlora.identity.certificates import fingerprint
from fedlora.kit import FORMAT, MOST_BYTES, NO_RUN, Kit, certificates, is_kit, read_kit
from fedlora.plan import PROTOCOL, ModelRef, RunPlan
from fedlora.wire import SCHEMA
from fedlora_server.pki.authority import Authority
from tests.fedlora.test_plan import make_plan


@cache
def authority() -> tuple[str, str]:
    """Return the certificate of an authority in PEM, and a fingerprint."""
    with tempfile.TemporaryDirectory() as folder:
        made = Authority.create(Path(folder) / "pki", ["127.0.0.1"])
        return (made.folder / "ca.pem").read_text(), fingerprint(made.key.public_key())


def make_kit(**changes):
    pem, digits = authority()
    return Kit("fl.example.org:9092", make_plan(**changes), {"text": "note"}, pem, digits)


def written(tmp_path, kit):
    kit.write(tmp_path / "kit.toml")
    return tmp_path / "kit.toml"


PLANS = {
    "private": {}, "without privacy": {"private": False, "weight_by_examples": True},
    "open labels": {"labels": ()}, "odd names": {"labels": ('a "quoted"', "b\\c", "höher")},
    "causal-lm": {"task": "causal-lm", "labels": (), "train_head": False},
    "pairs": {"ranks": (("encoder.layer.0.query", 4), ("x", 8)), "family_options": (("blocks", 2.0),)}}


@pytest.mark.parametrize("plan", PLANS)
def test_a_kit_is_read_as_it_was_written(tmp_path, plan):
    kit = make_kit(**PLANS[plan])
    path = written(tmp_path, kit)
    assert read_kit(path) == kit and read_kit(path).plan == make_plan(**PLANS[plan], run_id=NO_RUN)
    assert is_kit(path) and kit.fingerprint in path.read_text()
    assert path.stat().st_mode & 0o777 == 0o644 and "PRIVATE" not in path.read_text()


def test_a_kit_for_a_server_without_tls_has_neither_authority_nor_fingerprint(tmp_path):
    kit = Kit("127.0.0.1:9092", make_plan())
    assert read_kit(written(tmp_path, kit)) == kit
    assert not {"authority", "server-fingerprint"} & tomllib.loads(kit.text()).keys()


def test_the_fingerprint_depends_on_every_value_and_neither_on_comments_nor_on_line_ends(tmp_path):
    kit = make_kit()
    others = [make_kit(lr=0.2), make_kit(clip_norm=0.6), dataclasses.replace(kit, address="fl.example.org:9093"),
              dataclasses.replace(kit, columns={}), dataclasses.replace(kit, server_fingerprint="0" * 64)]
    assert len({one.fingerprint for one in (kit, *others)}) == 6
    assert re.fullmatch(r"([0-9a-f]{4} ){4}[0-9a-f]{4}", kit.fingerprint)
    path = tmp_path / "kit.toml"
    path.write_bytes(re.sub(r"  # .*", "", kit.text()).replace("\n", "\r\n").encode())
    assert read_kit(path) == kit


def test_the_run_that_a_kit_was_made_from_plays_no_part():
    assert make_kit(run_id="12" * 8).fingerprint == make_kit(run_id="34" * 8).fingerprint


DIFFERENT = {
    "strategy": "ffa-lora", "family": "lora", "private": False, "task": "other-task", "labels": ("a", "c"),
    "max_length": 17, "rank": 3, "targets": ("value",), "train_head": False, "dropout": 0.1, "rounds": 5,
    "max_participations": 3, "local_steps": 1, "expected_batch": 7, "clip_norm": 0.4, "weight_by_examples": True,
    "private_start": True, "whole_gradients": True, "family_options": (("blocks", 2.0),), "ranks": (("q", 4),),
    "mechanism": "distributed-gaussian", "least_members": 4, "colluding": 1, "least_noise": 0.5, "hold_out": 0.1,
    "model": dataclasses.replace(make_plan().model, weights_sha256="0" * 64)}
"""A value of each field in which a server's plan must be the kit's."""

FREE = {"alpha": 5.0, "optimizer": "adamw", "lr": 0.2, "lr_schedule": "linear", "adjustment": "scaled-gd",
        "adapter_scale": 2.0, "head_scale": 2.0, "wire_dtype": "bf16"}
OF_THE_RUN = {"run_id": "cd" * 8, "fedlora_version": "0.1.7", "protocol": PROTOCOL - 1}


def test_it_is_decided_for_every_field_of_a_plan_whether_a_kit_holds_it():
    assert {one.name for one in dataclasses.fields(RunPlan)} == DIFFERENT.keys() | FREE.keys() | OF_THE_RUN.keys()


@pytest.mark.parametrize("name", DIFFERENT)
def test_a_plan_that_differs_in_what_concerns_privacy_is_named(name):
    plan = make_plan()
    object.__setattr__(plan, name, DIFFERENT[name])  # also what no plan could be, alone
    [told] = make_kit().differences(plan)
    assert ("weights-sha256" if name == "model" else name.replace("_", "-")) in told and "the kit says" in told


def test_what_no_epsilon_depends_on_may_change_under_privacy_and_not_without():
    assert make_kit().differences(make_plan(**FREE, run_id="cd" * 8, fedlora_version="0.1.7")) == []
    off = {"private": False}
    assert len(make_kit(**off).differences(make_plan(**FREE, **off))) == len(FREE)


def test_a_kit_that_leaves_the_labels_open_takes_any_and_one_that_names_them_no_others():
    assert make_kit(labels=()).differences(make_plan(labels=("x", "y"))) == []
    for labels in ((), ("b", "a"), ("a", "b", "c")):
        assert "labels is" in make_kit().differences(make_plan(labels=labels))[0]


def edited(pattern, new):
    def edit(text):
        changed, count = re.subn(pattern, new, text, count=1, flags=re.MULTILINE | re.DOTALL)
        assert count, pattern
        return changed

    return edit


DAMAGE = {
    "a changed value": (edited("^clip-norm = 0.5", "clip-norm = 5.0"), "was changed since it was made"),
    "a changed fingerprint": (edited('^fingerprint = "....', 'fingerprint = "xxxx'), "was changed since it was made"),
    "another address": (edited("fl.example.org", "fl.example.com"), "was changed since it was made"),
    "a lost end": (lambda text: text[:text.index("clip-norm") + 4], "not a kit"),
    "a lost table": (edited(r"^\[tuning\].*", ""), r"\[tuning\] adapter-scale is missing"),
    "a lost line": (edited("^clip-norm.*?\n", ""), r"\[plan\] clip-norm is missing"),
    "an unknown key": (edited("^clip-norm", "clip-normal = 1\nclip-norm"), r"\[plan\] clip-normal is not known"),
    "an unknown table": (lambda text: text + "\n[more]\n", "more is not known"),
    "a key in the wrong table": (edited(r"^\[plan\]", "[plan]\nlr = 0.1"), r"\[plan\] lr is not known"),
    "another type": (edited("^local-steps = 2", 'local-steps = "2"'), "local_steps must be of type int, not str"),
    "another type at the top": (edited("^address = .*?$", "address = 9092"), "address is 9092; it must be a text"),
    "pairs of another type": (edited("^ranks = {}", "ranks = [1]"), r"ranks is \[1\]; it must be a table"),
    "a key that a terminal would obey": (lambda text: text + '"\\u001b[2J" = 1\n', r"\[tuning\]  \[2J is not known"),
    "a column that is a number": (edited('^"text" = "note"', '"text" = 3'), r"\[columns\] text is 3"),
    "a value out of range": (edited("^rounds = 4", "rounds = 0"), "rounds is 0; it must be at least 1"),
    "no port": (edited("fl.example.org:9092", "fl.example.org"), "not of the form host:port"),
    "half a certificate": (edited("-----END", "----"), "authority holds no certificate"),
    "an authority alone": (edited("^server-fingerprint.*?\n", ""), "both an authority and the server's fingerprint"),
    "a newer format": (edited("^kit = 1", "kit = 2\nnew = 3"), "of format 2, by FedLoRA 0.1.0, .* reads format 1"),
    "another protocol": (edited(f"^protocol = {PROTOCOL}", "protocol = 99"), "protocol 99.* install the server's"),
    "another schema": (edited(f"{SCHEMA.hex()}", "00" * 32), "schema 00000000.* install the server's version"),
    "another version": (edited('^fedlora-version = "0.1.0"', 'fedlora-version = "0.2.0"'), "runs FedLoRA 0.2.0"),
    "not TOML": (lambda text: "{" + text, "not a kit: Invalid statement"),
    "no line that says kit": (edited("^kit = 1", ""), "no line `kit = 1`"),
    "too long": (lambda text: text + "#" * MOST_BYTES, "no kit is so long"),
}


@pytest.mark.parametrize("damage", DAMAGE)
def test_a_damaged_kit_is_refused_with_what_is_wrong(tmp_path, damage):
    damaged, says = DAMAGE[damage]
    path = tmp_path / "kit.toml"
    path.write_text(damaged(make_kit().text()))
    with pytest.raises(ValueError, match=says) as error:
        read_kit(path)
    assert str(path) in str(error.value) and str(error.value).isprintable()


def test_a_kit_that_is_no_text_or_not_there_is_refused(tmp_path):
    path = tmp_path / "kit.toml"
    with pytest.raises(ValueError, match="cannot be read: No such file"):
        read_kit(path)
    path.write_bytes(b"\xff\xfe" + make_kit().text().encode("utf-16-le"))
    with pytest.raises(ValueError, match="is not a kit"):
        read_kit(path)
    assert not is_kit(path) and not is_kit(tmp_path / "nothing")


@given(some.data())
def test_a_kit_with_any_one_character_changed_is_the_same_or_refused(tmp_path_factory, data):
    kit = make_kit()
    text = kit.text()
    at = data.draw(some.integers(0, len(text) - 1))
    path = tmp_path_factory.getbasetemp() / "changed.toml"
    new = data.draw(some.sampled_from(["", "0", "a", "\n", '"', "#", "ß", "\x1b"]))
    path.write_text(text[:at] + new + text[at + 1:])
    try:
        assert read_kit(path) == kit
    except ValueError as error:
        assert str(error).isprintable(), "what a file holds must not write to the terminal as it likes"


TEXTS = some.text('ab ."\'\\#\n\r\t\x00\x1f\x7f\x85\u2028é😀')


@given(some.recursive(some.booleans() | some.integers(-2**63, 2**63 - 1) | some.floats(allow_nan=False) | TEXTS,
                      lambda inner: some.lists(inner) | some.dictionaries(TEXTS, inner), max_leaves=8))
def test_values_survive_toml(value):
    assert tomllib.loads(f"value = {as_toml(value)}")["value"] == value


def test_a_text_around_certificates_is_left_out():
    pem, digits = authority()
    assert Kit("h:1", make_plan(), {}, f"subject=x\n{pem}\nmore\n", digits).authority == pem
    assert len(certificates(pem)) == 1


@pytest.mark.parametrize(("changes", "says"), [
    ({"address": "fl.example.org"}, "host:port"), ({"address": "fl.exa mple.org:1"}, "host:port"),
    ({"columns": {"text": "a\nb"}}, "not printable"), ({"server_fingerprint": "XY"}, "64 lower-case"),
    ({"authority": ""}, "or neither")])
def test_a_kit_that_no_client_could_use_is_not_made(changes, says):
    with pytest.raises(ValueError, match=says):
        dataclasses.replace(make_kit(), **changes)


def test_the_format_is_the_first_of_its_kind():
    assert FORMAT == 1 and isinstance(make_kit().plan.model, ModelRef)
