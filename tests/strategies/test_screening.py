"""Screening accepts what a client can have trained, whatever the others send, and leaves out what none can have."""

import dataclasses
import math

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from fedlora.training.optimizers import make_optimizer
from fedlora_simulations.in_process import InProcessEngine
from fedlora_strategies import Diverged, FedAvgLoRA, strategy_class
from fedlora_strategies.messages import to_record, to_tensors
from fedlora_strategies.reductions import Collected
from fedlora_strategies.screening import (
    EXAMPLES,
    PLAIN,
    PRIVATE,
    Measured,
    Reach,
    left_out,
    lower_median,
    most_examples,
    reach_of,
)
from tests.federation import STRATEGIES, LinearSession, layout_of, plan_of, start_of

NORMS = st.floats(1e-6, 1e6)
FREE = Reach()


def measured(*norms, **others):
    return {node: Measured(norm, **others) for node, norm in enumerate(norms, start=1)}


@given(st.lists(NORMS, min_size=1, max_size=9))
def test_the_lower_median_is_one_of_the_values_that_at_least_half_are_not_below(values):
    median = lower_median(values)
    assert median in values and 2 * sum(value >= median for value in values) >= len(values)


@given(st.floats(0.5, 2.0), st.lists(st.floats(0.3, 1.0), min_size=3, max_size=9), st.data())
def test_honest_clients_are_taken_and_minorities_that_go_further_than_k_times_are_not(scale, honest, data):
    hostile = data.draw(st.lists(st.floats(PLAIN * 1.01, 1e30), max_size=(len(honest) - 1) // 2))
    found = left_out(measured(*[scale * norm for norm in (*honest, *hostile)]), PLAIN, (), FREE)
    assert set(found) == set(range(len(honest) + 1, len(honest) + len(hostile) + 1))


@given(st.lists(NORMS, min_size=3, max_size=9))
def test_nobody_is_left_out_by_an_infinite_measure_and_never_all_by_a_finite_one(norms):
    assert left_out(measured(*norms), math.inf, (), FREE) == {}
    assert len(left_out(measured(*norms), 1.0, (), FREE)) < len(norms)


def test_two_uploads_are_compared_with_earlier_rounds_alone_and_in_the_first_with_nothing():
    assert left_out(measured(1.0, 1e6), PLAIN, (), FREE) == {}
    assert set(left_out(measured(1.0, 1e6), PLAIN, (0.8, 1.2), FREE)) == {2}
    assert set(left_out(measured(1e6), PLAIN, (0.8, 1.2), FREE)) == {1}
    assert set(left_out(measured(20.0, 25.0), PLAIN, (1.0,), FREE)) == set(), "both go further: one cannot be told"
    assert set(left_out(measured(1.0, 1e6), PLAIN, (), FREE, among_few=True)) == {2}, "once something is wrong"


def test_clients_that_move_nothing_do_not_make_the_others_suspect():
    assert left_out(measured(0.0, 0.0, 1.0, 2.0), PLAIN, (), FREE) == {}


def test_an_upload_says_why_it_is_left_out():
    assert left_out(measured(1.0, 1.0, 50.0), PLAIN, (), FREE)[3] == (
        "it moves the adapter by 50, more than 5 times the lower median of the round's uploads, 1")
    assert "8 steps of adamw" in left_out(measured(9.0), PLAIN, (), Reach(1.0, 0.0, "8 steps of adamw"))[1]


@pytest.mark.parametrize("steps", [1, 2, 8, 40])
def test_no_gradients_take_adamw_further_than_its_reach(steps):
    """The gradients that make the last step the longest follow from equality in Cauchy-Schwarz; others are random."""
    plan = plan_of("fedavg-lora", optimizer="adamw", local_steps=steps)
    layout = layout_of("lora")
    most = reach_of(plan, layout, plan.lr, 0.0).fixed / math.sqrt(layout.num_trained)
    generator = torch.Generator().manual_seed(0)
    furthest = torch.tensor([(0.9 / 0.999) ** (steps - t) for t in range(1, steps + 1)])
    for gradients in (furthest, torch.ones(steps), torch.randn(steps, generator=generator),
                      torch.randn(steps, generator=generator).exp(), 1e6 ** torch.linspace(-1, 1, steps)):
        value = torch.nn.Parameter(torch.zeros(1))
        optimizer = make_optimizer("adamw", [value], plan.lr)
        for gradient in gradients:
            value.grad = gradient.reshape(1).clone()
            optimizer.step()
        assert 0 < abs(value.item()) <= most
    assert most < 1.7 * plan.lr * steps, "and it is not far above one rate for each step"


@pytest.mark.parametrize("head_scale", [1.0, 3.5])
def test_private_sgd_stays_within_its_reach_though_every_record_pulls_the_same_way(head_scale):
    """The clipped sums have twice the expected batch, all in one direction, and the noise is the announced one."""
    plan = plan_of("fedavg-lora", private=True, local_steps=4, expected_batch=64, head_scale=head_scale)
    layout, random = layout_of("lora"), np.random.default_rng(0)
    scales = np.concatenate([np.full(spec.size, {"head": head_scale}.get(spec.group, 1.0)) for spec in layout.trained])
    for noise in (0.5, 5.0):
        reach = reach_of(plan, layout, plan.lr, 0.0)
        for _ in range(200):
            pull = random.standard_normal(layout.num_trained)
            pull *= plan.clip_norm * 2 * plan.expected_batch / np.linalg.norm(pull)
            steps = [(pull + noise * plan.clip_norm * random.standard_normal(layout.num_trained)) / scales
                     for _ in range(plan.local_steps)]
            moved = plan.lr * np.linalg.norm(sum(steps)) / plan.expected_batch
            assert moved <= reach.fixed + noise * reach.per_noise


def test_announced_noise_counts_up_to_ten_times_what_is_usual():
    reach = Reach(0.0, 1.0, "steps")
    announced = {1: Measured(1.0, 1.0), 2: Measured(1.0, 1.0), 3: Measured(9.0, 9.5), 4: Measured(9.0, 1.0),
                 5: Measured(90.0, 1e9), 6: Measured(9.0, None)}
    assert set(left_out(announced, PRIVATE, (), reach)) == {4, 5}, "a σ without bound gives no reach without bound"
    unsaid = {node: Measured(one.norm) for node, one in announced.items()}
    assert set(left_out(unsaid, PRIVATE, (), reach)) == set() and PRIVATE * 9.0 == 90.0


def test_nothing_bounds_what_plain_sgd_or_an_adjusted_gradient_does():
    layout = layout_of("lora")
    assert not reach_of(plan_of("fedavg-lora"), layout, 1.0, 0.0).bounded
    assert not reach_of(plan_of("fedavg-lora", private=True, adjustment="scaled-gd"), layout, 1.0, 0.0).bounded


@pytest.mark.parametrize("claimed", [2**62, 10**6])
def test_a_number_of_examples_counts_up_to_ten_times_what_is_usual(claimed):
    claims = {node: Measured(1.0, examples=count) for node, count in enumerate([90, 100, 110, claimed])}
    assert most_examples(claims) == EXAMPLES * 100


# With real strategies.


class Times(LinearSession):
    """A client that sends its update times a factor, and claims a number of examples."""

    def __init__(self, name, layout, factor=1.0, examples=None):
        super().__init__(name, layout)
        self.factor, self.examples = factor, examples

    def run_round(self, plan, tensors):
        upload = super().run_round(plan, tensors)
        sent = {name: np.float32(tensors[name] + self.factor * (array - tensors[name]))
                for name, array in upload.tensors.items()} if self.factor != 1 else upload.tensors
        return dataclasses.replace(upload, tensors=sent, num_examples=self.examples or upload.num_examples)


def one_round(strategy, sessions, layout, state, round=1):
    engine = InProcessEngine({session.name: session for session in sessions}, strategy.plan.run_id, layout)
    return strategy.aggregate_train(round, engine.send_and_receive(
        strategy.configure_train(round, to_record(state), {}, engine)))


def clients(layout, hostile=(), **how):
    return [Times(name, layout, **how) if name in hostile else LinearSession(name, layout) for name in "abcde"]


@pytest.mark.parametrize("factor", [1e6, -10.0, 1e14])
@pytest.mark.parametrize("name", STRATEGIES)
def test_the_state_is_that_without_the_client_that_goes_too_far(name, factor):
    def state_of(sessions):
        plan = plan_of(name)
        layout = layout_of(plan.family)
        strategy = strategy_class(name)(plan, layout)
        arrays, _ = one_round(strategy, sessions(layout), layout, start_of(layout, 1))
        return to_tensors(arrays), strategy

    screened, strategy = state_of(lambda layout: clients(layout, "c", factor=factor))
    without, _ = state_of(lambda layout: [one for one in clients(layout) if one.name != "c"])
    assert len(strategy.rejected) == 1 and len(strategy.disclosed) == 5
    assert all(np.array_equal(screened[tensor], without[tensor]) for tensor in without)


def test_one_client_is_never_the_average_whatever_it_claims():
    plan = plan_of("fedavg-lora", weight_by_examples=True)
    layout = layout_of("lora")
    strategy = FedAvgLoRA(plan, layout)
    liar = clients(layout, "c", examples=2**62)
    arrays, _ = one_round(strategy, liar, layout, start_of(layout, 1))
    assert len(strategy.curbed) == 1 and not strategy.rejected
    alike = clients(layout, "c", examples=int(EXAMPLES) * 12)
    expected, _ = one_round(FedAvgLoRA(plan, layout), alike, layout, start_of(layout, 1))
    mean, other = to_tensors(arrays), to_tensors(expected)
    assert all(np.array_equal(mean[tensor], other[tensor]) for tensor in other)


def test_where_no_uploads_give_a_state_the_memory_is_that_of_before():
    plan = plan_of("fedavg-lora")
    layout = layout_of("lora")
    recipe = FedAvgLoRA.recipe.with_optimizer("momentum", {"lr": 1e25})
    strategy, state = FedAvgLoRA(plan, layout, recipe=recipe), start_of(layout, 1)
    with pytest.raises(Diverged, match="lower learning rate"):
        one_round(strategy, clients(layout), layout, state)
    begun = strategy.step.begin(state)
    assert strategy.usual_norms == () and strategy.memory.keys() == begun.keys()
    assert all(np.array_equal(strategy.memory[slot], begun[slot]) for slot in begun)


def test_a_private_state_that_clients_would_not_take_is_not_taken():
    plan = plan_of("fedavg-lora", private=True)
    layout = layout_of("lora")
    recipe = FedAvgLoRA.recipe.with_optimizer("momentum", {"lr": 1e8})
    with pytest.raises(Diverged, match="beyond 10000"):
        one_round(FedAvgLoRA(plan, layout, recipe=recipe), clients(layout), layout, start_of(layout, 1))


def test_a_robust_reduction_is_given_what_screening_leaves_and_nothing_else():
    plan = plan_of("fedavg-lora")
    layout = layout_of("lora")

    def state_of(sessions):
        recipe = dataclasses.replace(FedAvgLoRA.recipe, reduction=Longest())
        return to_tensors(one_round(FedAvgLoRA(plan, layout, recipe=recipe), sessions, layout, start_of(layout, 1))[0])

    screened = state_of(clients(layout, "c", factor=100.0))
    without = state_of([one for one in clients(layout) if one.name != "c"])
    assert all(np.array_equal(screened[name], without[name]) for name in without)


@dataclasses.dataclass(frozen=True)
class Longest:
    """A reduction that takes for each tensor the upload with the largest value in it, and needs all uploads at once."""

    linear = False
    fewest = 1

    def begin(self, sent):
        return Collected(lambda uploads, weights: {
            name: max((upload[name] for upload in uploads), key=lambda array: float(np.abs(array).max()))
            for name in uploads[0]})


def test_few_uploads_are_compared_with_the_rounds_that_the_strategy_has_seen():
    plan = plan_of("ffa-lora")
    layout = layout_of(plan.family)
    strategy, state = strategy_class("ffa-lora")(plan, layout), start_of(layout, 1)
    pair = [Times("a", layout), LinearSession("b", layout)]
    one_round(strategy, pair, layout, state, round=1)
    assert strategy.uncompared and len(strategy.usual_norms) == 1
    pair[0].factor = 1e6
    one_round(strategy, pair, layout, state, round=2)
    assert not strategy.uncompared and len(strategy.rejected) == 1 and len(strategy.usual_norms) == 2
