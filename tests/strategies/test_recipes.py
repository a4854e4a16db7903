"""The promises of every installed recipe, and the ways to name and compose a strategy."""

import dataclasses
import sys

import numpy as np
import pytest

from fedlora import registry
from fedlora.plan import RoundPlan
from fedlora_server import checkpoint
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import FederatedLoRA, FedSVD, FFALoRA, Recipe, strategy_class
from fedlora_strategies.messages import read_train_messages, to_record, to_tensors
from fedlora_strategies.recipe import OPTIMIZERS
from fedlora_strategies.refactorizations.svd import Svd
from fedlora_strategies.schedules.constant import Constant
from tests.federation import ROWS, STRATEGIES, LinearSession, layout_of, plan_of, start_of, update_of
from tests.server.test_checkpoint import Crashing, crashed, federation, resumed
from tests.server.test_rounds import same

every = pytest.mark.parametrize("name", STRATEGIES)


@every
def test_it_is_a_flower_strategy_with_values_for_runs_with_privacy_and_without(name):
    strategy = strategy_class(name)
    assert issubclass(strategy, FederatedLoRA) and strategy_class(name) is strategy
    for private in (True, False):
        values = strategy.recipe.preset(private)
        assert values.init == strategy.recipe.start
        plan = plan_of(name, private=private, rank=values.rank, alpha=values.alpha, lr=values.lr,
                       local_steps=values.local_steps, rounds=values.rounds, optimizer=values.optimizer,
                       lr_schedule=values.lr_schedule, clip_norm=values.clip_norm, head_scale=values.head_scale)
        assert strategy(plan, layout_of(plan.family)).linear == strategy.recipe.reduction.linear


@every
@pytest.mark.parametrize("optimizer", registry.keys(OPTIMIZERS))
def test_a_run_with_an_optimizer_at_the_server_is_taken_up_bit_for_bit(name, optimizer, tmp_path):
    """The server is lost after the checkpoint of round 2 of 4, and another one continues, for every recipe."""
    recipe = strategy_class(name).recipe.with_optimizer(optimizer, {"lr": 0.1, "decay": 0.5})
    whole = federation(strategy=name, recipe=recipe).run(clients_per_round=3)
    first = crashed(tmp_path, Crashing(finished=2), federation(strategy=name, recipe=recipe))
    result = resumed(tmp_path, first, recipe=recipe)
    assert result.ended == "finished" and result.resumed == (2,) and same(result.state, whole.state)
    assert [record.update_norm for record in result.records] == [record.update_norm for record in whole.records]


def test_moments_that_were_lost_would_show_and_are_refused(tmp_path):
    adam = FedSVD.recipe.with_optimizer("adam", {})
    first = crashed(tmp_path, Crashing(finished=2), federation(recipe=adam))
    left = checkpoint.take_up(tmp_path)
    assert {key.split("/")[0] for key in left.memory} == {"optimizer"}
    with pytest.raises(ValueError, match="another server step"):
        resumed(tmp_path, first, recipe=FedSVD.recipe.with_optimizer("momentum", {}))
    _, round, state, _ = checkpoint.load(tmp_path)
    checkpoint.save(tmp_path, left.plan.run_id, round, state, {})  # as an earlier version would have left it
    with pytest.raises(ValueError, match="it holds none"):
        resumed(tmp_path, first, recipe=adam)
    assert resumed(tmp_path, first, recipe=FedSVD.recipe).ended == "finished"


def test_momentum_moves_the_update_of_fedsvd_as_that_of_ffa_whose_coordinates_stay():
    """The first moment is a direction, so it is rotated exactly by every refactorization. Six rounds."""
    layout, generator = layout_of("frozen-a", head=False), np.random.default_rng(0)
    still, svd = (cls(plan_of(name), layout, recipe=cls.recipe.with_optimizer("momentum", {"lr": 0.5}))
                  for cls, name in ((FFALoRA, "ffa-lora"), (FedSVD, "fedsvd")))
    start = {key: array.astype(np.float64) for key, array in start_of(layout, 0).items()}
    start = {key: np.linalg.qr(v.T)[0].T if key.endswith(".A") else v for key, v in start.items()}
    states, own = [start, start], [still.step.begin(start), svd.step.begin(start)]
    for number in range(1, 7):
        moved = generator.standard_normal((ROWS, 2))  # the clients' change, in FFA-LoRA's coordinates
        for i, strategy in enumerate((still, svd)):
            reduced = {f"{m}.B": states[i][f"{m}.B"] + moved @ start[f"{m}.A"] @ states[i][f"{m}.A"].T
                       for m in layout.modules}
            trained, own[i] = strategy.step.combine(reduced, states[i], states[i], own[i], number)
            states[i], own[i] = strategy.step.rewrite({**states[i], **trained}, own[i], number)
    for module in layout.modules:
        np.testing.assert_allclose(update_of(states[1], module), update_of(states[0], module), atol=1e-12)
        assert np.linalg.norm(states[1][f"{module}.A"] - start[f"{module}.A"]) > 0.1, "A was never refactorized"


@dataclasses.dataclass(frozen=True)
class Alternating(Constant):
    """A schedule that trains A and the head in odd rounds and B in even ones, and then halves everything."""

    def trains(self, round, layout):
        return frozenset(spec.name for spec in layout.trained if spec.name.endswith(".B") == (round % 2 == 0))


def alternating(clients=3, **changes):
    """Return a strategy with a schedule of its own, its engine with linear clients, and its start."""
    chosen = strategy_class("fedavg-lora")
    plan, layout = plan_of("fedavg-lora", **changes), layout_of("lora")
    recipe = dataclasses.replace(chosen.recipe, schedule=Alternating()).with_optimizer("adam", {"lr": 0.1})
    engine = InProcessEngine({f"c{i}": LinearSession(f"c{i}", layout) for i in range(clients)}, plan.run_id, layout)
    generator = np.random.default_rng(0)
    return chosen(plan, layout, recipe=recipe), engine, {
        spec.name: generator.standard_normal(spec.shape, np.float32) for spec in layout.state}


def test_what_does_not_train_in_a_round_is_sent_and_stays_as_it_was_with_its_moments():
    strategy, engine, state = alternating()
    arrays, memory = to_record(state), {}
    for number in (1, 2, 3):
        messages = list(strategy.configure_train(number, arrays, {}, engine))
        [(_, plan, sent), *_] = read_train_messages(messages)
        assert isinstance(plan, RoundPlan) and set(sent) == {spec.name for spec in strategy.layout.state}
        assert set(plan.active) == Alternating().trains(number, strategy.layout)
        before, memory = to_tensors(arrays), dict(strategy.memory)
        arrays, metrics = strategy.aggregate_train(number, engine.send_and_receive(messages))
        assert metrics["replies"] == 3 and metrics["update_norm"] > 0
        after = to_tensors(arrays)
        moved = {key for key in after if not np.array_equal(after[key], before[key])}
        assert moved == set(plan.active)
        turned = {key for key, array in memory.items() if not np.array_equal(array, strategy.memory[key])}
        assert {key.split("/", 2)[2] for key in turned} == moved


def test_an_upload_with_more_than_what_trains_in_the_round_adds_nothing():
    strategy, engine, state = alternating()
    messages = list(strategy.configure_train(1, to_record(state), {}, engine))
    replies = list(engine.send_and_receive(messages))
    whole = {spec.name: state[spec.name] for spec in strategy.layout.trained}
    replies[0].content["arrays"] = to_record(whole)
    _, metrics = strategy.aggregate_train(1, replies)
    assert metrics["replies"] == 2 and "unknown" in next(iter(strategy.rejected.values()))


def test_an_upload_with_more_is_refused_by_the_engine_too():
    strategy, engine, state = alternating(1)

    class Everything(LinearSession):
        def run_round(self, plan, tensors):
            return super().run_round(dataclasses.replace(plan, active=()), tensors)

    engine.join("c0", Everything("c0", strategy.layout))
    pushed = engine.push_messages(strategy.configure_train(1, to_record(state), {}, engine))
    assert engine.wait(pushed, 0.0)[pushed[0]].code == "invalid-tensors"


def test_a_schedule_that_names_what_does_not_train_is_told():
    class Lost(Constant):
        def trains(self, round, layout):
            return frozenset({"layer.0.q.Z"})

    plan = plan_of("fedsvd")
    strategy = FedSVD(plan, layout_of("frozen-a"), recipe=dataclasses.replace(FedSVD.recipe, schedule=Lost()))
    with pytest.raises(ValueError, match=r"layer\.0\.q\.Z"):
        list(strategy.configure_train(1, to_record(start_of(strategy.layout, 0)), {"nodes": [1]}, None))


def test_a_recipes_own_options_are_checked_where_they_are_given():
    assert FedSVD.recipe.with_options({"period": 3.0}).refactorization == Svd(period=3)
    for options, told in (({"priod": 1}, "period, warmup"), ({"period": 0}, "period at least 1"),
                          ({"period": 1.5}, "whole")):
        with pytest.raises(ValueError, match=told):
            FedSVD.recipe.with_options(options)
    with pytest.raises(ValueError, match="no options of its own"):
        FFALoRA.recipe.with_options({"period": 1})


@pytest.mark.parametrize(("text", "told"), [
    ("RECIPE = 7", "has a int there"), ("OTHER = 7", "has no such name"), ("import nonsense", "nonsense"),
    ("raise KeyError('x')", "KeyError"), ("def (", "SyntaxError"),
    ("from fedlora_strategies import FederatedLoRA\nclass RECIPE(FederatedLoRA): pass", "that has a recipe")])
def test_an_outside_module_that_is_none_is_told(tmp_path, monkeypatch, text, told):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "an_outside_module", raising=False)
    (tmp_path / "an_outside_module.py").write_text(text)
    with pytest.raises(ValueError, match=told):
        strategy_class("an_outside_module:RECIPE")


def test_an_outside_recipe_is_a_strategy_too(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "path", [*sys.path, str(tmp_path)])
    monkeypatch.delitem(sys.modules, "an_outside_module", raising=False)
    (tmp_path / "an_outside_module.py").write_text(
        "from dataclasses import replace\nfrom fedlora_strategies import FedSVD\n"
        "from fedlora_strategies.refactorizations.svd import Svd\n"
        "RARELY = replace(FedSVD.recipe, refactorization=Svd(period=5))\n")
    found = strategy_class("an_outside_module:RARELY")
    assert isinstance(found.recipe, Recipe) and found.recipe.private == FedSVD.recipe.private
    assert found(plan_of("fedsvd"), layout_of("frozen-a")).described["refactorization"]["period"] == 5
