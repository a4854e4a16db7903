"""fedlora-server --dry-run: it checks and shows a run, and starts and writes nothing."""

import re
from io import StringIO

import pytest
from rich.console import Console

from fedlora.config import ServerConfig, read_config
from fedlora.kit import NO_RUN
from fedlora.plan import plan_digest
from fedlora.privacy import Accountant, Budget, Spend, four_digits
from fedlora.privacy.mechanisms.distributed_gaussian import foretold_epsilon
from fedlora.quantities import quantity
from fedlora_server import cli
from fedlora_server.dry_run import assumed, dry_run, noise_by_size, noise_of
from fedlora_server.run_setup import find_model, prepare
from tests.contracts.test_mechanisms import plan_of

SMALL = ("--rank=2", "--local-steps=1", "--batch-size=8", "--max-length=16", "--rounds=3", "--labels=routine,urgent")


@pytest.fixture
def told(tmp_path, checkpoint, monkeypatch):
    """Do a dry run with these options too, in an empty folder; return its words with single spaces."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("fedlora_server.dry_run.SIZES", (1_000,))

    def call(*more: str) -> str:
        console = Console(file=StringIO(), width=200)
        dry_run(read_config(ServerConfig, [f"--model={checkpoint('bert')}", *SMALL, *more]), console)
        return " ".join(console.file.getvalue().split())

    return call


def test_it_shows_the_plan_its_digest_the_traffic_and_the_noise_and_writes_nothing(told, checkpoint, tmp_path):
    text = told("--wire-dtype=bf16")
    assert not list(tmp_path.iterdir())
    options = ServerConfig(model=str(checkpoint("bert")), rank=2, local_steps=1, batch_size=8, max_length=16, rounds=3,
                           labels=("routine", "urgent"), wire_dtype="bf16")
    federation = prepare(options, "fedsvd", find_model(options), ("routine", "urgent"), 0, run_id=NO_RUN)
    assert plan_digest(federation.plan) in text
    assert "labels routine,urgent" in text and "expected-batch 8" in text and "local-steps 1" in text
    up, down = federation.strategy.traffic.up, federation.strategy.traffic.down
    assert f"each client and round {quantity(2 * up)} up and {quantity(2 * down)} down" in text
    assert "3 rounds of 2 clients" in text
    sigma = Budget.declare(1000, epsilon=8.0).noise_multiplier(8, 3)
    assert re.search(rf"1,000 0\.008 1e-05 [\d.]+ [\d.]+ {sigma:.4g} ", text), text
    assert "with fewer than 40 a client refuses" in text
    assert "3 of 3 are possible with 2 clients" in text and "no forecast is made" in text
    assert text.endswith("Nothing was started, and nothing was written.")


def test_a_start_that_clients_release_is_in_the_traffic(told):
    said = told("--strategy=pissa", "--init=lora-ga-clients", "--privacy=off", "--targets=query")
    moved, clients = 4 * 2 * 32 * 32, 2  # bytes of the gradients of two layers
    assert f"In it is the start from the clients' gradients, before round 1: {quantity(moved)} up and " in said
    whole = float(said.partition(" in all for 3 rounds of 2")[0].rpartition("about ")[2].removesuffix(" kB"))
    assert 1000 * whole > 2 * clients * moved, "it counts"


def test_a_start_that_is_larger_than_what_clients_take_is_refused(told, monkeypatch):
    monkeypatch.setattr("fedlora.models.most_adapter_bytes", lambda path: 1000)
    with pytest.raises(ValueError, match=r"at most 1e-06 GB .* fewer --targets, or choose --init gradient"):
        told("--strategy=pissa", "--init=lora-ga-clients", "--privacy=off")


def test_without_privacy_no_noise_is_shown_and_participations_limit_the_rounds(told):
    text = told("--privacy=off", "--max-participations=1")
    assert "private false" in text and "Noise multiplier" not in text
    assert "1 of 3 are possible with 2 clients" in text


def test_the_command_ends_with_0_or_says_what_is_wrong(checkpoint, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    arguments = ["--dry-run", f"--model={checkpoint('bert')}", "--rank=2", "--max-length=16", "--privacy=off"]
    assert cli._run(read_config(ServerConfig, arguments)) == 0
    assert "labels those that clients announce" in " ".join(capfd.readouterr().err.split())
    assert cli._run(read_config(ServerConfig, [*arguments, "--task=causal-lm"])) == 2
    assert capfd.readouterr().err.startswith("fedlora-server: ") and not list(tmp_path.iterdir())


@pytest.mark.parametrize(("wrong", "said"), [
    ("--strategy=fed-sb --init=kaiming", "--init kaiming"), ("--address=0.0.0.0:9092", "--insecure"),
    ("--eval-data=no.jsonl", "no.jsonl"), ("--out=full", "--out full is not empty"),
    ("--min-replies=5 --clients-per-round=2", "--min-replies is 5"),
    ("--secure-aggregation --min-clients=2", "3 to 200 clients"),
    ("--secure-aggregation --min-clients=201", "3 to 200 clients"),
    ("--secure-aggregation --min-clients=6 --colluding=2", "--colluding is 2"),
    ("--secure-aggregation --min-clients=3", "--secure-aggregation needs --tls DIR")])
def test_what_a_start_would_refuse_is_refused(told, tmp_path, wrong, said):
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "notes").touch()
    with pytest.raises((ValueError, OSError), match=re.escape(said)):
        told(*wrong.split())
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_with_secure_aggregation_both_epsilons_are_foretold_with_what_that_of_the_sums_assumes():
    plan, console = plan_of("distributed-gaussian", least_noise=0.9), Console(file=StringIO(), width=250)
    budget = Budget.declare(5000, epsilon=3.0)
    console.print(noise_by_size(plan))
    console.print(noise_of(plan, {"north": budget, "south": budget}))
    console.print(assumed(plan))
    text = " ".join(console.file.getvalue().split())
    in_sums = foretold_epsilon(0.9, 0.03, 60, 1e-5, members=6, colluding=1)
    own = Accountant((Spend(0.9, 0.03, 60),)).epsilon(1e-5)
    assert own < 3.0, "the plan's least noise is more than the budget asks for"
    assert f"0.9 (sums: ε {four_digits(in_sums)})" in text
    assert f"2 5,000 0.03 0.9 {four_digits(own)} {four_digits(in_sums)} 1e-05" in text
    assert "if 6 clients take part" in text and "at most 1 of them" in text and "noise of 4 honest clients" in text
