"""A federation small enough to check theorems on: linear clients, with loss and gradients written out here."""

from collections.abc import Callable, Mapping, Sequence

import numpy as np

from fedlora import registry
from fedlora.adapters import AdapterLayout, Site, TensorSpec, family_of
from fedlora.plan import ModelRef, Refusal, RoundPlan, RunPlan, Tensors, Upload
from fedlora.wire import rounded, tensors_digest
from fedlora_strategies import strategy_class
from fedlora_strategies.recipe import RECIPES

STRATEGIES = registry.keys(RECIPES)
"""The keys of all built-in strategies."""

ROWS, COLUMNS = 6, 4
"""Shape of a target weight: (d_out, d_in)."""

W0 = np.random.default_rng(3).standard_normal((ROWS, COLUMNS))
"""The frozen weight of each target, for families that change its rows."""


def layout_of(family: str, *, rank: int = 2, modules: tuple[str, ...] = ("layer.0.q", "layer.1.q"), head: bool = True,
              rows: int = ROWS, columns: int = COLUMNS,
              options: Sequence[tuple[str, float]] = ()) -> AdapterLayout:
    """Return the layout of `modules` targets of shape (rows, columns) and a trained head of three values."""
    heads = [TensorSpec("head.out.bias", (3,), "head")] if head else []
    sites = [Site(module, rows, columns, rank, 1.0) for module in modules]
    return AdapterLayout.of(family_of(family, options), sites, heads)


def start_of(layout: AdapterLayout, seed: int) -> dict[str, np.ndarray]:
    """Return a start as in the papers: orthonormal A (and B if it is frozen), gamma 1, and zero for what trains."""
    generator = np.random.default_rng(seed)
    state = {}
    for spec in layout.state:
        draw = generator.standard_normal(spec.shape)
        if spec.name.endswith(".A"):
            draw = np.linalg.qr(draw.T)[0].T
        elif spec.name.endswith((".B", ".P")) and not spec.trains:
            draw = np.linalg.qr(draw)[0]
        elif spec.name.endswith(".V"):
            draw = 1 / np.linalg.norm(W0, axis=1) if len(draw) == ROWS else np.ones(len(draw))
        elif spec.name.endswith(".gamma"):
            draw = np.ones(spec.shape)
        else:
            draw = np.zeros(spec.shape)
        state[spec.name] = draw.astype(np.float32)
    return state


def plan_of(strategy: str, **changes) -> RunPlan:
    """Return a non-private plan of one local SGD step. `changes` replace its fields."""
    values = dict(
        run_id="0123456789abcdef", fedlora_version="0.1.0", strategy=strategy,
        family=strategy_class(strategy).recipe.family, private=False,
        model=ModelRef("local", "0" * 64, "1" * 64, "2" * 64), task="classification", labels=("no", "yes"),
        max_length=16, rank=2, alpha=2.0, targets=("q",), train_head=True,
        dropout=0.0, rounds=3, max_participations=3, local_steps=2, expected_batch=4, optimizer="sgd",
        lr=0.03 if strategy == "bone" else 0.3,  # its b is multiplied with whole blocks of W0
        clip_norm=1.0, adapter_scale=1.0, head_scale=1.0, weight_by_examples=False)
    return RunPlan(**values | changes)


def update_of(state: Mapping[str, np.ndarray], module: str) -> np.ndarray:
    """Return the module's ΔW [rows, columns] in float64, by the definition of its family."""
    own = own_of(state, module)
    if "b" in own:
        r = own["b"].shape[1]
        return ((blocks(W0, r) + np.eye(r)) @ own["b"].reshape(-1, 1, r, r)).swapaxes(1, 2).reshape(ROWS, COLUMNS)
    if "V" in own:
        return (own["e"] * own["V"])[:, None] * W0 + (own["B"] @ own["A"] if "B" in own else 0)
    if "lambda" in own:
        left, right = sides_of(own)
        return left * own["lambda"] @ right
    B, A = own["B"], own["A"]
    if "dA" in own:
        return (B + own["dB"]) @ (A + own["dA"]) - B @ A
    if "e" in own and len(own["e"]) == ROWS:
        scale, turned = turned_of(own)
        return scale * turned - W0
    if "D" in own:
        return B @ A + own["D"] @ own["C"]
    for name, between in (("R", lambda R: R), ("e", np.diag)):
        if name in own:
            B = B @ between(own[name])
    return B @ A + (own["P"] @ own["Y"] @ (np.eye(COLUMNS) - A.T @ A) if "P" in own else 0)


def blocks(matrix: np.ndarray, r: int) -> np.ndarray:
    """Return the r × r blocks of a matrix, [rows of blocks, columns of blocks, r, r]."""
    return matrix.reshape(len(matrix) // r, r, -1, r).swapaxes(1, 2)


def own_of(state: Mapping[str, np.ndarray], module: str) -> dict[str, np.ndarray]:
    """Return the tensors of a module's update by their last name, in float64, with those that modules share."""
    return {name.rpartition(".")[2]: array.astype(np.float64) for name, array in state.items()
            if name.startswith((f"{module}.", "shared."))}


def turned_of(own: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return DoRA's factor on each row, [rows, 1], and W0 + B A."""
    turned = W0 + own["B"] @ own["A"]
    before, after = (np.linalg.norm(matrix, axis=1, keepdims=True) for matrix in (W0, turned))
    return (before + own["e"][:, None]) / after, turned


def sides_of(own: Mapping[str, np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """Return RandLoRA's factors on both sides of lambda: [rows, r N] and [r N, columns]."""
    return own["B"], (own["A"] * own["gamma"].reshape(-1, 1, COLUMNS)).reshape(-1, COLUMNS)


def gradients_of(own: Mapping[str, np.ndarray], G: np.ndarray) -> dict[str, Callable[[], np.ndarray]]:
    """Return functions for the gradients of a module's tensors, by their last name, for a gradient G of ΔW."""
    B, A, V = (own.get(factor) for factor in "BAV")
    if "lambda" in own:
        left, right = sides_of(own)
        of_right = (own["lambda"] * left).T @ G
        return {"lambda": lambda: np.diag(left.T @ G @ right.T),
                "gamma": lambda: (of_right.reshape(-1, len(A), COLUMNS) * A).sum(axis=1).reshape(-1)}
    if "dA" in own:
        return {"dA": lambda: (B + own["dB"]).T @ G, "dB": lambda: G @ (A + own["dA"]).T}
    if V is None and len(own.get("e", ())) == ROWS:
        scale, turned = turned_of(own)
        return {"A": lambda: B.T @ (scale * G), "B": lambda: scale * G @ A.T,
                "e": lambda: (G * turned).sum(axis=1) / np.linalg.norm(turned, axis=1)}
    if "b" in own:
        r = own["b"].shape[1]
        return {"b": lambda: ((blocks(W0, r) + np.eye(r)).swapaxes(2, 3) @ blocks(G, r)).sum(1)}
    return {"A": lambda: B.T @ G, "B": lambda: G @ A.T, "R": lambda: B.T @ G @ A.T,
            "Y": lambda: own["P"].T @ G @ (np.eye(COLUMNS) - A.T @ A),
            "e": lambda: np.diag(B.T @ G @ A.T) if V is None else V * (G * W0).sum(1)}


class LinearSession:
    """A client that trains for real, on a tiny problem: the least squares of each module's update on its own data.

    It behaves as `fedlora_client.session.ClientSession` does: it keeps the frozen tensors that it was sent, trains once
    for each key, and moves and uploads only the tensors that train in the round.

    Attributes:
        forgets_in: the round at whose first attempt it loses the frozen tensors; 0 for none.
    """

    def __init__(self, name: str, layout: AdapterLayout, *, records: int = 12) -> None:
        generator = np.random.default_rng(list(name.encode()))
        self.name, self.layout = name, layout
        truth = np.random.default_rng(0).standard_normal((ROWS, COLUMNS))
        self.inputs = generator.standard_normal((records, COLUMNS))
        self.outputs = {m: self.inputs @ truth.T + 0.1 * generator.standard_normal((records, ROWS))
                        for m in layout.modules}
        self.held: dict[str, Tensors] = {}
        self.keys: list[tuple[int, int]] = []
        self.forgets_in = 0

    def run_round(self, plan: RoundPlan, tensors: Tensors) -> Upload | Refusal:
        if (plan.round, plan.attempt) == (self.forgets_in, 0):
            self.held.clear()
        names = {spec.name for spec in self.layout.frozen}
        received = {name: array for name, array in tensors.items() if name in names}
        if received:
            received = {**next(iter(self.held.values()), {}), **received}
            if received.keys() != names:
                return Refusal("missing-tensors")
            assert tensors_digest(received) == plan.frozen_sha256
            self.held = {plan.frozen_sha256: received}
        elif names and plan.frozen_sha256 not in self.held:
            return Refusal("missing-tensors")
        assert (plan.round, plan.attempt) not in self.keys, "trained twice for one (run, round, attempt)"
        self.keys.append((plan.round, plan.attempt))
        state = self.layout.narrowed(dict(plan.prefixes)).cut(
            {**tensors, **self.held.get(plan.frozen_sha256, {})})
        for _ in range(plan.run.local_steps):
            moved = self._step(state, plan.run.lr)
            state = {**state, **{name: array for name, array in moved.items() if name in (plan.active or moved)}}
        active = [spec for spec in self.layout.trained if spec.name in plan.active or not plan.active]
        trained = rounded({spec.name: np.asarray(state[spec.name], np.float32) for spec in active},
                          plan.run.wire_dtype)
        private = plan.run.private
        return Upload(*plan.key, tensors=trained, steps=plan.run.local_steps, delta=1e-5 if private else None,
                      noise_multiplier=1.5 if private else None,
                      num_examples=None if private else len(self.inputs),
                      train_loss=None if private else self.loss(state))

    def loss(self, state: Tensors) -> float:
        residuals = (self.inputs @ update_of(state, m).T - self.outputs[m] for m in self.layout.modules)
        return float(sum((r**2).sum() for r in residuals)) / (2 * len(self.inputs))

    def _step(self, state: Tensors, lr: float) -> Tensors:
        moved = {"head.out.bias": state["head.out.bias"] + np.float32(lr)} if "head.out.bias" in state else {}
        for module in self.layout.modules:
            residual = self.inputs @ update_of(state, module).T - self.outputs[module]
            G = residual.T @ self.inputs / len(self.inputs)  # gradient of ΔW
            gradients = gradients_of(own_of(state, module), G)
            for name in (spec.name for spec in self.layout.trained if spec.sites == (module,)):
                moved[name] = state[name] - lr * gradients[name.rpartition(".")[2]]().reshape(state[name].shape)
        return moved
