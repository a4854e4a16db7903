r"""Starts from the clients' own rows: what they release of the gradient is noised, and charged like a round.

The gradient G (d_out, d_in) of the loss with respect to a frozen weight has a few leading singular vectors, which are
where an adapter can move best. It is far too large to be released under noise. Each client releases two sketches of
it, for random Q (d_out, r) with orthonormal columns and P (r, d_in) with orthonormal rows, the same for all clients:

    Z = Q^T G   (r, d_in)    its right singular vectors are nearly G's leading ones (Halko et al., arXiv:0909.4061)
    Y = G P^T   (d_out, r)   its left singular vectors, likewise

They are the gradients, divided by s, of an adapter s·B·A at B = Q, A = P, where s is so small that the model is the
base model. So a release is a round of training like any other: local steps with the run's sampling rate, noise
multiplier and clip norm, in which a record's sketches of all layers are clipped once, as one vector. Before that they
are scaled up until they are longer than the clip norm: a start needs directions, and no lengths.

The server takes the mean over clients: A = right singular vectors of Z; where B is fixed too, B = left ones of Y.
"""

from __future__ import annotations

import dataclasses

import numpy as np
import torch

from fedlora.adapters.family import Site, family_of
from fedlora.adapters.layout import AdapterLayout
from fedlora.adapters.start import Source, float32, gaussian, site_tensors, start_of
from fedlora.algebra import orthonormal_rows
from fedlora.plan import Released, RunPlan, Tensors

PRIVATE_START = "dp"
"""Of --init."""

SCALING = 1e-4
"""s. The factors' spectral norms are 1, so the weights move by this much, where they themselves are some units long."""

LEAST_NORM = 1e-6
"""A record whose sketches together are longer than this counts by their direction alone."""

STEP = 1e-2
"""How far one step moves the factors, in units of the clipped mean: so little that a later step has about the same Q
and P."""


def sketch_plan(run: RunPlan) -> RunPlan:
    """The plan of the release within a run: what it and all clients compute by, whatever the server sends."""
    scale = run.clip_norm / (SCALING * LEAST_NORM)
    return dataclasses.replace(run, family="lora", family_options=(), alpha=run.rank * SCALING, train_head=False,
                               dropout=0.0, optimizer="sgd", lr=STEP * scale / run.clip_norm, lr_schedule="constant",
                               adapter_scale=scale, adjustment="")


def sketch_layout(layout: AdapterLayout, missing: tuple[str, ...]) -> AdapterLayout:
    """The layout of `attach` by `sketch_plan`: both factors travel; heads that no checkpoint has are fixed.

    Args:
        layout: of the run.
        missing: parameters that are not in the base checkpoint.
    """
    heads = [dataclasses.replace(spec, trains=False) for spec in layout.state
             if spec.name in {f"head.{name}" for name in missing}]
    sites = [dataclasses.replace(site, scaling=SCALING) for site in layout.sites]
    return AdapterLayout.of(family_of("lora"), sites, heads)


def sketch_tensors(layout: AdapterLayout, state: Tensors, seed: int) -> dict[str, np.ndarray]:
    """Q and P, in the places of B and A, and the heads that the run starts with.

    Args:
        layout: of the sketches.
        state: of the run's start.
    """
    tensors = {spec.name: state[spec.name] for spec in layout.frozen}
    for spec in layout.trained:
        rows, columns = sorted(spec.shape)
        drawn = orthonormal_rows(gaussian(seed, f"sketch/{spec.name}", (rows, columns)))
        tensors[spec.name] = float32(drawn if spec.shape == (rows, columns) else drawn.T)
    return tensors


def private_start(layout: AdapterLayout, state: Tensors, sketches: Released) -> dict[str, np.ndarray]:
    """The state that a run starts from.

    Args:
        layout: of the run.
        state: any start of the run; of it, what the sketches do not decide is taken.
        sketches: the mean of the released Z, under the names of A, and Y, under those of B.
    """
    def of_site(site: Site) -> tuple[torch.Tensor, torch.Tensor]:
        return torch.from_numpy(sketches[f"{site.name}.A"]), torch.from_numpy(sketches[f"{site.name}.B"])

    def weight(site: Site) -> torch.Tensor:
        raise AssertionError("a start that reads what clients released reads nothing else")

    source = Source(0, weight, sketches=of_site)
    return {**state, **site_tensors(layout, start_of(PRIVATE_START)[0], source)}
