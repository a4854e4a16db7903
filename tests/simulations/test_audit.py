"""Audits: the p-value is the theorem's, a sound mechanism is not refuted, and one broken on purpose is."""

from __future__ import annotations

import dataclasses
import json

import numpy as np
import pytest
import torch
from scipy.stats import binom

from fedlora.privacy.report import read_audit
from fedlora_server.run_setup import find_model
from fedlora_simulations import audit, one_run
from fedlora_simulations.adversary import Others, evidence
from fedlora_simulations.canaries import LENGTH, CanaryTrainer
from fedlora_simulations.cli import main
from fedlora_simulations.one_run import lower_bound, membership, p_value
from tests.processes import write_rows

CLIP = 0.05


def randomized_response(generator, bits, epsilon):
    """Return each bit, truthfully with probability e^ε / (1 + e^ε)."""
    return np.where(generator.random(bits.shape) < 1 / (1 + np.exp(-epsilon)), bits, ~bits)


@pytest.mark.parametrize("epsilon", [0.5, 2.0])
def test_the_p_value_is_what_randomised_response_attains(epsilon):
    generator = np.random.default_rng(0)
    canaries, guesses, runs = 60, 40, 20_000
    bits = generator.random((runs, canaries)) < 0.5
    right = (randomized_response(generator, bits, epsilon) == bits)[:, :guesses].sum(axis=1)  # others are not guessed
    for v in (18, 24, 30, 36, 40):
        measured, claimed = np.mean(right >= v), p_value(canaries, guesses, v, epsilon, 0.0)
        assert measured == pytest.approx(claimed, abs=4 * np.sqrt(max(claimed * (1 - claimed), 1e-4) / runs))


@pytest.mark.parametrize("delta", [1e-3, 5e-3])
def test_the_p_value_bounds_a_mechanism_that_uses_its_delta(delta):
    # randomised response that tells everything with probability δ: (ε, δ)-private for each bit
    generator = np.random.default_rng(1)
    canaries, epsilon, runs = 50, 1.0, 20_000
    bits = generator.random((runs, canaries)) < 0.5
    told = np.where(generator.random((runs, 1)) < delta, bits, randomized_response(generator, bits, epsilon))
    right = (told == bits).sum(axis=1)
    for v in range(30, 51, 4):
        assert np.mean(right >= v) <= p_value(canaries, canaries, v, epsilon, delta) + 1e-3
        assert p_value(canaries, canaries, v, epsilon, delta) >= p_value(canaries, canaries, v, epsilon, 0.0)


def test_the_p_value_is_the_formula_of_the_paper():
    m, r, v, epsilon, delta = 1000, 100, 90, 1.5, 1e-4
    accuracy = np.exp(epsilon) / (1 + np.exp(epsilon))
    pmf = [binom.pmf(k, r, accuracy) for k in range(r + 1)]
    worst = max(sum(pmf[v - i:v]) / i for i in range(1, v + 1))
    assert p_value(m, r, v, epsilon, delta) == pytest.approx(sum(pmf[v:]) + 2 * m * delta * worst)
    assert p_value(m, r, 0, epsilon, delta) == 1.0 and p_value(m, 0, 0, 0.0, delta) == 1.0
    with pytest.raises(ValueError, match="11 of 10 guesses"):
        p_value(m, 10, 11, epsilon, delta)


def test_the_lower_bound_holds_with_its_confidence_and_comes_close():
    generator = np.random.default_rng(2)
    canaries, epsilon, delta, runs = 1000, 2.0, 1e-6, 120
    bits = generator.random((runs, canaries)) < 0.5
    right = (randomized_response(generator, bits, epsilon) == bits).sum(axis=1)
    bounds = np.array([lower_bound(canaries, canaries, int(v), delta) for v in right])
    assert np.mean(bounds > epsilon) < 0.12  # 5 % expected, 120 runs
    assert np.median(bounds) > epsilon - 0.4
    # perfect guesses: accuracy^1000 = 5 %, up to what δ explains
    assert lower_bound(canaries, canaries, canaries, 0.0) == pytest.approx(np.log(1 / (0.05 ** -1e-3 - 1)), abs=1e-3)
    assert lower_bound(canaries, 100, 50, delta) == 0.0 and lower_bound(canaries, 0, 0, delta) == 0.0


def test_choosing_the_best_way_to_guess_keeps_the_confidence():
    generator = np.random.default_rng(3)
    refuted = 0
    for _ in range(200):  # scores without information: the true ε is 0
        refuted += one_run.audit(generator.standard_normal(200), generator.random(200) < 0.5, 1e-5).epsilon > 0
    assert refuted <= 200 * 0.05 + 3 * np.sqrt(200 * 0.05)
    included = generator.random(1000) < 0.5
    best = one_run.audit(included + 0.01 * generator.standard_normal(1000), included, 1e-5)
    assert best.epsilon > 4 and best.right == best.guessed_in + best.guessed_out == 600


def test_membership_figures_are_those_of_the_roc_curve():
    metrics = pytest.importorskip("sklearn.metrics")
    generator = np.random.default_rng(4)
    included = generator.random(700) < 0.4
    scores = np.round(generator.standard_normal(700) + included, 2)  # with ties
    false, true, _ = metrics.roc_curve(included, scores, drop_intermediate=False)
    figures = membership(scores, included)
    assert figures.auc == pytest.approx(metrics.roc_auc_score(included, scores))
    assert figures.tpr_at_1_percent == pytest.approx(true[false <= 0.01].max(), abs=0.02)


def test_evidence_is_the_textbook_likelihood_ratio_for_a_lone_canary():
    generator = torch.Generator().manual_seed(0)
    canary = torch.randn(1, 20_000, generator=generator) / 100
    noise, q = 0.3, 1e-3  # drawn so rarely that a canary adds nothing to the variance
    for amplitude in (0.0, 1.0, 2.0):
        step = amplitude * canary[0].double() + noise * torch.randn(20_000, generator=generator).double()
        got = evidence(step, canary, torch.zeros(4, 20_000), np.array([0, 1, 1, 2, 2]), sampling_rate=q, others=4)
        ratio = float((step @ canary[0].double() - canary[0].double().square().sum() / 2) / noise**2)
        assert got[0] == pytest.approx(np.logaddexp(np.log1p(-q), np.log(q) + ratio), rel=0.05, abs=1e-4)


def test_what_many_records_have_in_common_is_evidence_of_none():
    generator = torch.Generator().manual_seed(0)
    common = 10 * torch.randn(400, generator=generator)
    canaries, background = (common + torch.randn(n, 400, generator=generator) for n in (40, 60))
    drawn = torch.arange(40) % 4 == 0
    step = (drawn.double() @ canaries.double()) + 37 * common.double() + torch.randn(400, generator=generator) / 2
    groups = np.repeat([0, 1], [40, 60])
    got = torch.from_numpy(evidence(step, canaries, background, groups, sampling_rate=0.25, others=60))
    assert got[drawn].min() > got[~drawn].max()
    assert (canaries.double() @ step)[drawn].min() < (canaries.double() @ step)[~drawn].max()  # as a plain product


@pytest.fixture(scope="module")
def arguments(checkpoint, tmp_path_factory):
    rows = write_rows(tmp_path_factory.mktemp("audit") / "rows.jsonl", seed=0)
    return [f"--data={rows}", f"--model={checkpoint('bert')}", "--strategy=ffa-lora", "--rank=8", "--rows=200",
            "--count=300", "--rounds=8", f"--clip-norm={CLIP}", "--head-scale=0.1",
            "--max-length=32", "--device=cpu", "--precision=fp32", "--threads=1"]


@pytest.fixture(scope="module")
def sound(arguments):
    """Return the reports of the unbroken mechanism, by kind of canary."""
    return {kind: run(arguments, f"--canaries={kind}", private=True) for kind in ("gradient", "text")}


def run(arguments, *more, private):
    options = audit.read_audit_config([*arguments, *more])
    return audit.run_audit(options, find_model(options), private=private)


def test_ranks_that_change_are_refused_before_anything_is_trained(arguments):
    with pytest.raises(ValueError, match="--ranks nested changes what is uploaded"):
        run(arguments, "--ranks=nested", private=True)


def test_a_sound_mechanism_is_not_refuted(sound):
    for report in sound.values():
        assert report.holds and report.white_box.epsilon <= report.claimed <= 8.0
        assert report.claimed > 7.9 and report.rounds == 8 and report.sampling_rate == pytest.approx(0.2)
        assert 100 < report.included.sum() < 200
    assert membership(sound["gradient"].scores, sound["gradient"].included).auc > 0.6  # the attack sees something


@pytest.mark.parametrize("kind", ["gradient", "text"])
def test_without_privacy_at_least_one_is_lost(arguments, kind):
    report = run(arguments, f"--canaries={kind}", private=False)
    assert report.white_box.epsilon > 1 and report.claimed == float("inf") and report.noise_multiplier is None


def broken(**factors):
    """Return a `train` with another noise or clip norm than the client accounts for, hidden from the checks."""
    def train(self, job, stop, stepped):
        return original(self, dataclasses.replace(
            job, clip_norm=job.clip_norm * factors.get("clip", 1.0),
            noise_multiplier=job.noise_multiplier * factors.get("noise", 1.0)), stop, stepped)

    original = CanaryTrainer.train
    return train


@pytest.mark.parametrize(("kind", "factors"), [
    ("gradient", {"noise": 0.1}), ("text", {"noise": 0.002}),
    ("gradient", {"clip": LENGTH / CLIP, "noise": CLIP / LENGTH})], ids=str)  # noise of the right size, no clipping
def test_a_broken_mechanism_is_refuted(arguments, monkeypatch, kind, factors):
    monkeypatch.setattr(CanaryTrainer, "train", broken(**factors))
    report = run(arguments, f"--canaries={kind}", "--epsilon=1", private=True)
    assert report.claimed <= 1.0 < report.white_box.epsilon and not report.holds


SUMS = "--secure-aggregation", "--canaries=gradient", "--trust=aggregate", "--epsilon=1", "--members=100"


def test_sums_with_the_noise_of_honest_clients_do_not_refute_their_claim(arguments):
    report = run(arguments, *SUMS, private=True)
    assert report.holds and report.white_box.epsilon <= report.claimed <= 1 and report.claimed > 0.9
    assert report.members == 100 and membership(report.scores, report.included).auc > 0.52  # the attack sees something


def test_sums_in_which_the_others_noise_is_missing_refute_it(arguments, monkeypatch):
    monkeypatch.setattr(Others, "added_to", lambda self, vector, plan: vector)
    report = run(arguments, *SUMS, private=True)
    assert report.claimed <= 1.0 < report.white_box.epsilon and not report.holds


def test_gradient_canaries_replace_exactly_their_own_gradients(arguments):
    """Without noise, the step is the sum of the drawn records' gradients, with directions in the canaries' places."""
    seen = {}
    original = CanaryTrainer.train

    def train(self, job, stop, stepped):
        plan, before = job.run, job.start
        result = original(self, job, stop, stepped)
        after = result.tensors
        step = torch.cat([torch.from_numpy((before[name] - after[name]) * plan.expected_batch / plan.lr).flatten()
                          for name in names(self)])
        seen.setdefault("shares", []).append((self._directions.double() @ step.double()) / LENGTH**2)
        return result

    def names(trainer):
        of = {id(parameter): spec.name for spec, parameter in trainer.adapted.trained_parameters()}
        return [of[id(slot.parameter)] for slot in trainer.buffer.slots]

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(CanaryTrainer, "train", train)
        run(arguments, "--canaries=gradient", "--count=100", "--rounds=2", private=False)
    shares = torch.cat(seen["shares"])
    drawn = shares > 0.5
    assert 0.1 < drawn.double().mean() < 0.35  # q = 0.2
    assert abs(float(shares[drawn].mean()) - 1) < 0.2 and abs(float(shares[~drawn].mean())) < 0.2


def test_the_command_writes_a_table_json_and_a_picture(arguments, tmp_path, capsys):
    quick = [*arguments, "--canaries=gradient", "--epsilon=1", f"--out={tmp_path / 'a'}"]
    assert main(["audit", *quick, "--json"]) == 0
    printed = json.loads(capsys.readouterr().out)
    private, plain = printed["audits"]
    assert (private["private"], plain["private"]) == (True, False) and plain["claimed"] is None
    assert private["white_box"]["epsilon"] <= private["claimed"] <= 1 and private["holds"]
    saved = json.loads((tmp_path / "a" / "audit.json").read_text())
    assert len(saved["audits"][0]["scores"]) == 300 and saved["confidence"] == 0.95
    known = read_audit(tmp_path / "a" / "audit.json")
    assert known["epsilon"] == private["white_box"]["epsilon"] and known["steps"] == private["rounds"]
    assert known["canaries"] == 300 and known["clip_norm"] == private["clip_norm"] > 0 and known["family"]
    assert (tmp_path / "a" / "audit.png").stat().st_size > 10_000
    table = audit.show([audit.Audit(**{**vars(audit_of(private)), "private": flag}) for flag in (True, False)])
    assert table.row_count == 8


def audit_of(printed):
    """Return an `Audit` from its JSON."""
    fields = {key: value for key, value in printed.items() if key != "holds"}
    for name, kind in (("white_box", one_run.Guesses), ("final_model", one_run.Guesses),
                       ("loss_attack", one_run.Membership)):
        fields[name] = kind(**fields[name])
    return audit.Audit(**fields, scores=np.zeros(1), included=np.ones(1, bool))


@pytest.mark.parametrize(("more", "names"), [
    (["--epsilon=inf"], "--epsilon"), (["--clients=3"], "--clients"), (["--seeds=1,2"], "--seed S"),
    (["--strategy=fed-sb,fedsvd"], "one at a time"), (["--count=5"], "--count"), (["--canaries=loud"], "loud"),
    (["--privacy=off"], "--privacy"), (["--task=causal-lm"], "--task"), (["--init=dp"], "--init"),
    (["--strategy=fed-sb:dp"], "--init")])
def test_wrong_options_end_with_code_2_and_are_named(arguments, more, names, capsys):
    with pytest.raises(SystemExit) as exit_:
        main(["audit", *arguments, *more])
    assert exit_.value.code == 2 and names in capsys.readouterr().err


@pytest.mark.parametrize(("more", "names"), [
    (["--data=absent.jsonl"], "does not exist"), (["--batch-size=300"], "expected batch of at most"),
    (["--rank=2"], "raise --rank"), (["--secure-aggregation", "--members=2"], "takes 3 to 200 clients"),
    (["--members=4"], "--members 4 is for --secure-aggregation"), (["--labels=routine,calm"], "not in the label set"),
    (["--column=label=triage"], "triage")])
def test_wrong_data_ends_with_code_2_and_a_remedy(arguments, more, names, capsys, tmp_path):
    assert main(["audit", *arguments, f"--out={tmp_path / 'out'}", *more]) == 2
    assert names in capsys.readouterr().err
