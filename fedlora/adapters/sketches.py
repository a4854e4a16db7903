r"""Starts from the clients' gradients: --init dp, noised and charged like a round of training, and some without noise.

The leading singular vectors of G, the gradient (d_out, d_in) of the loss with respect to a frozen weight, are the
directions in which an adapter can best move that weight. G itself is far too large to be released under noise. So each
client releases two sketches of it. They use a random Q (d_out, r) with orthonormal columns and a random P (r, d_in)
with orthonormal rows, which are the same for all clients:

    Z = Q^T G   (r, d_in)    its right singular vectors are nearly G's leading ones (Halko et al., arXiv:0909.4061)
    Y = G P^T   (d_out, r)   its left singular vectors, likewise

Up to the factor s, these are the gradients of an adapter s·B·A at B = Q and A = P, where s is so small that the model
is practically the base model. So a release is a round of training like any other: local steps with the run's sampling
rate, noise multiplier and clip norm, in which a record's sketches of all layers are clipped once, as one vector. Before
clipping they are scaled up until they are longer than the clip norm, because a start needs directions, not lengths.

The server averages over clients. A becomes the right singular vectors of the mean Z; if the family freezes B too, B
becomes the left singular vectors of the mean Y.

In a run without privacy (--init gradient) the same steps are taken on the same model. Nothing is scaled, clipped or
noised then, and a step moves the factors by a tenth of their sketch.

Other starts without privacy need what a sketch of rank r does not hold, such as the sign of G. For them (the plan's
`whole_gradients`) clients take these steps with an adapter s·D of the weight's own shape, from D = 0, and send its
d_out·d_in values for each layer.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence

import numpy as np
import torch

from fedlora.adapters.family import Site, family_of
from fedlora.adapters.layout import AdapterLayout
from fedlora.adapters.start import Source, float32, gaussian, site_tensors, start_of
from fedlora.algebra import orthonormal_rows
from fedlora.plan import Released, RunPlan, Tensors

SCALING = 1e-4
"""The factor s. Q and P have spectral norm 1, so each weight changes by at most this much in spectral norm, where
weights have norms of some units."""

LEAST_NORM = 1e-6
"""A record whose sketches together have at least this L2 norm is clipped, so that only their direction counts."""

STEP = 1e-2
"""Distance by which one step moves the factors, in units of the clipped mean. It is so small that Q and P are
practically the same in later steps."""

PLAIN_STEP = 0.1
"""The same in a run without privacy, in units of the sketch: small beside Q and P, and well above their rounding."""


def sketch_plan(run: RunPlan) -> RunPlan:
    """Return the plan by which all clients compute what a run starts from, with or without privacy.

    Each client derives it from the run's plan. The server cannot change it.
    """
    scale = run.clip_norm / (SCALING * LEAST_NORM) if run.private else run.adapter_scale
    lr = STEP * scale / run.clip_norm if run.private else PLAIN_STEP / SCALING
    return dataclasses.replace(run, family="full" if run.whole_gradients else "lora", family_options=(), ranks=(),
                               alpha=run.rank * SCALING, train_head=False, dropout=0.0, optimizer="sgd", lr=lr,
                               lr_schedule="constant", adapter_scale=scale, adjustment="")


def sketch_layout(run: RunPlan, layout: AdapterLayout, missing: Sequence[str]) -> AdapterLayout:
    """Return the layout of the sketches: all factors travel, and heads that are missing from the checkpoint are fixed.

    It is the layout that `attach` gives for `sketch_plan`.

    Args:
        run: the run's plan.
        layout: layout of the run's own adapter.
        missing: names of the parameters that are not in the base checkpoint.
    """
    heads = [dataclasses.replace(spec, trains=False) for spec in layout.state
             if spec.name in {f"head.{name}" for name in missing}]
    sites = [dataclasses.replace(site, rank=run.rank, scaling=SCALING) for site in layout.sites]
    return AdapterLayout.of(family_of(sketch_plan(run).family), sites, heads)


def sketch_tensors(layout: AdapterLayout, state: Tensors, seed: int) -> dict[str, np.ndarray]:
    """Draw Q and P, under the names of B and A, or set D to 0, and add the heads that the run starts with.

    Args:
        layout: layout of the sketches, from `sketch_layout`.
        state: initial values of the run's own adapter, for the heads.
        seed: the run's seed.
    """
    tensors = {spec.name: state[spec.name] for spec in layout.frozen}
    if not layout.family.bases:
        return tensors | {spec.name: np.zeros(spec.shape, np.float32) for spec in layout.trained}
    for spec in layout.trained:
        rows, columns = sorted(spec.shape)
        drawn = orthonormal_rows(gaussian(seed, f"sketch/{spec.name}", (rows, columns)))
        tensors[spec.name] = float32(drawn if spec.shape == (rows, columns) else drawn.T)
    return tensors


def private_start(run: RunPlan, layout: AdapterLayout, init: str, state: Tensors, seed: int,
                  sketches: Released) -> dict[str, np.ndarray]:
    """Compute the values that a run starts from, given the released sketches.

    Args:
        run: the run's plan.
        layout: layout of the run's own adapter.
        init: the start, one that reads what clients release, as --init has it.
        state: the values of any other start of the run. Tensors that the sketches do not decide keep these values.
        seed: the run's seed.
        sketches: the mean over clients of the released Z (under the names of A) and Y (under the names of B), or of the
            gradients themselves (under the names of D), all with the sign of a step against the gradient.
    """
    def released(site: Site, factor: str) -> torch.Tensor:
        return torch.from_numpy(np.array(sketches[f"{site.name}.{factor}"]))  # PyTorch warns of read-only arrays

    def weight(site: Site) -> torch.Tensor:
        raise AssertionError("a start from the clients' releases reads no weight")

    source = Source(seed, weight, gradient=lambda site: released(site, "D") / (-PLAIN_STEP * run.local_steps),
                    sketches=lambda site: (released(site, "A"), released(site, "B")))
    return {**state, **site_tensors(layout, start_of(init)[0], source)}
