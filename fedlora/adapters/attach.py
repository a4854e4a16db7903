"""Attachment of an adapter to a loaded base model, and access to the adapter's tensors.

For each target layer, the family builds a module whose output is added to the layer's output. Every trained tensor
belongs to a leaf (`fedlora.adapters.leaves`), which can compute the gradient of each record separately. The base
model's weights are frozen and never written. One copy therefore serves any number of simulated clients, whose tensors
are written to the adapter in turn.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from torch import nn
from transformers.pytorch_utils import Conv1D
from typing_extensions import override

from fedlora.adapters.family import Delta, Leaves, Site, TensorSpec, check_private, family_of
from fedlora.adapters.layout import AdapterLayout
from fedlora.adapters.leaves import Leaf, Linear
from fedlora.adapters.targets import is_inside, target_modules, top
from fedlora.models import LoadedModel
from fedlora.plan import RunPlan, Tensors
from fedlora.tasks import task_named


class AdaptedLinear(nn.Module):
    """A linear layer with an adapter: computes base(x) + delta(x). The base layer itself is unchanged.

    The delta receives x after dropout, in the dtype of its own tensors. The sum has the dtype of the base's output.
    """

    def __init__(self, base: nn.Linear | Conv1D, delta: Delta, dropout: float) -> None:
        super().__init__()
        self.base, self.delta = base, delta
        self.dropout: nn.Module = nn.Dropout(dropout) if dropout else nn.Identity()

    @override
    def forward(self, inputs: torch.Tensor) -> torch.Tensor:
        output: torch.Tensor = self.base(inputs)
        own = next(self.delta.parameters()).dtype
        added: torch.Tensor = self.delta(self.dropout(inputs.to(own)), output, self.base)
        return (output + added).to(output.dtype)

    @property
    def weight(self) -> torch.Tensor:
        """The base layer's weight, which the code of some models reads."""
        return self.base.weight

    @property
    def bias(self) -> torch.Tensor | None:
        """The base layer's bias."""
        return self.base.bias


class AdaptedModel:
    """A base model with an adapter, as `attach` makes it.

    Attributes:
        model: the module to call. It is the loaded model, changed in place.
        layout: names, shapes and roles of the adapter's tensors.
        tokenizer: the base model's tokenizer, as the run uses it.
        base_path: folder of the base checkpoint.
        task: key of the task (see `fedlora.tasks`).
        head: name of the classifier's final linear module; None if the task has no head.
        missing: names of the parameters that are not in the base checkpoint.
        classifier: copies of the classifier's frozen parameters that are in the base checkpoint, as they were loaded.
            Few models have any. `export` needs them unrounded, even if a trainer has stored the base in bfloat16 since.
    """

    def __init__(self, loaded: LoadedModel, layout: AdapterLayout, head: str | None,
                 leaves: dict[str, tuple[nn.Module, str]]) -> None:
        self.model = loaded.model
        self.tokenizer = loaded.tokenizer
        self.layout = layout
        self.base_path: Path = loaded.path
        self.task = loaded.task
        self.head = head
        self.missing = loaded.missing
        self.classifier = {name: parameter.detach().cpu().clone() for name, parameter in loaded.model.named_parameters()
                           if head and is_inside(name, top(head)) and f"head.{name}" not in leaves}
        self._leaves = leaves  # tensor name -> its module and the parameter's name there
        self._narrow: dict[str, nn.Parameter] = {}  # tensor name -> the parameter of a view of smaller ranks
        self._whole: dict[str, nn.Parameter] = {}  # shared by all views: those that a view's take the place of

    def parameter(self, name: str) -> nn.Parameter:
        """Return the parameter for a tensor of `layout.state`."""
        for known in (self._narrow, self._whole):
            if name in known:
                return known[name]
        return self._in_model(name)

    def _in_model(self, name: str) -> nn.Parameter:
        module, parameter_name = self._leaves[name]
        return cast(nn.Parameter, getattr(module, parameter_name))

    def _put_into_model(self, name: str, parameter: nn.Parameter) -> None:
        module, parameter_name = self._leaves[name]
        setattr(module, parameter_name, parameter)

    def take_place(self) -> None:
        """Let the model compute with this view's parameters, in place of those of a view of other ranks."""
        for name in list(self._whole):
            self._put_into_model(name, self._whole.pop(name))
        for name, parameter in self._narrow.items():
            self._whole[name] = self._in_model(name)
            self._put_into_model(name, parameter)

    def base_layer(self, module_name: str) -> nn.Linear | Conv1D:
        """Return the frozen layer below an adapted module."""
        return cast(AdaptedLinear, self.model.get_submodule(module_name)).base

    def base_weight(self, module_name: str) -> torch.Tensor:
        """Return the frozen weight W0 of an adapted module, (d_out, d_in) even if the module stores its transpose."""
        base = self.base_layer(module_name)
        return base.weight.detach().T if isinstance(base, Conv1D) else base.weight.detach()

    def write(self, tensors: Tensors) -> None:
        """Overwrite tensors of the adapter in place, on their device. The model then computes with this view's.

        Args:
            tensors: new values for any subset of `layout.state`.

        Raises:
            ValueError: a name is unknown or a shape is wrong. Nothing is written then.
        """
        for name, array in tensors.items():
            if name not in self._leaves:
                raise ValueError(f"{name!r} is not a tensor of this adapter")
            if array.shape != self.parameter(name).shape:
                raise ValueError(f"{name} has shape {array.shape}; it must be {tuple(self.parameter(name).shape)}")
        self.take_place()
        with torch.no_grad():
            for name, array in tensors.items():
                self.parameter(name).copy_(torch.tensor(array))

    def read(self, which: str = "trained") -> dict[str, np.ndarray]:
        """Return float32 copies of the adapter's tensors, in the layout's order.

        Args:
            which: "trained", "frozen", or "state" for both.
        """
        specs: Sequence[TensorSpec] = getattr(self.layout, which)
        if not specs:
            return {}
        # in one transfer: with one for each tensor, a GPU would have to be waited for each time
        values = torch.cat([self.parameter(spec.name).detach().float().flatten() for spec in specs]).cpu()
        sizes = [math.prod(spec.shape) for spec in specs]
        return {spec.name: part.reshape(spec.shape).numpy().copy()
                for spec, part in zip(specs, torch.split(values, sizes), strict=True)}

    def trained_parameters(self) -> list[tuple[TensorSpec, nn.Parameter]]:
        """Return the spec and the parameter of every trained tensor, in the order of `layout.trained`."""
        return [(spec, self.parameter(spec.name)) for spec in self.layout.trained]

    def parameters(self) -> dict[str, nn.Parameter]:
        """Return the model's parameter for every tensor of `layout.state`, by name."""
        return {spec.name: self.parameter(spec.name) for spec in self.layout.state}

    def activated(self, active: Sequence[str], prefixes: Mapping[str, int] | None = None) -> AdaptedModel:
        """Return a view of this model in which only the named trained tensors train and all others are frozen.

        The view shares the model: its parameters' `requires_grad` are set in place. Tensors that the view has in part
        are parameters of its own. The model computes with them until another view takes their place: when it is made or
        written to, or by `take_place`.

        Args:
            active: names of the tensors that train; () for all.
            prefixes: site → the rank that it has in the view, for sites of a smaller rank.

        Raises:
            ValueError: a name is not a trained tensor of this adapter, or a rank does not fit it.
        """
        chosen = set(active or (spec.name for spec in self.layout.trained))
        if unknown := chosen - {spec.name for spec in self.layout.trained}:
            raise ValueError(f"{', '.join(sorted(unknown)[:3])} cannot train: the adapter trains "
                             f"{', '.join(spec.name for spec in self.layout.trained[:3])}, …")
        view = copy.copy(self)
        view.layout = self.layout.narrowed(prefixes or {}).activated(chosen)
        own = {spec.name: spec for spec in view.layout.state if spec.shape != self.parameter(spec.name).shape}
        view._narrow = {name: nn.Parameter(self.parameter(name).detach()[tuple(map(slice, spec.shape))].clone(
            memory_format=torch.contiguous_format)) for name, spec in own.items()}
        for spec in view.layout.state:
            view.parameter(spec.name).requires_grad_(spec.trains)
        view.take_place()
        return view

    def trained_leaves(self) -> list[Leaf]:
        """Return every leaf that holds a trained tensor, in the order of `layout.trained`."""
        return list(dict.fromkeys(cast(Leaf, self._leaves[spec.name][0]) for spec in self.layout.trained))

    def dropouts(self) -> list[nn.Module]:
        """Return the dropout modules on the adapters' inputs."""
        return [module.dropout for module in self.model.modules() if isinstance(module, AdaptedLinear)]


def attach(loaded: LoadedModel, *, family: str, rank: int, alpha: float, targets: Sequence[str], train_head: bool,
           dropout: float = 0.0, options: Sequence[tuple[str, float]] = (),
           ranks: Sequence[tuple[str, int]] = ()) -> AdaptedModel:
    """Put an adapter on a loaded model, in place. The adapter's values are all 0; set them with `AdaptedModel.write`.

    The adapter's tensors are float32, whatever the base's dtype. So are the head's parameters and all others that are
    missing from the checkpoint.

    Args:
        loaded: a model without an adapter.
        family: a key of `fedlora.adapters.families`.
        rank: r, at least 1.
        alpha: the update is scaled by alpha / rank.
        targets: full names or suffixes of linear modules; () adapts none. The classifier, and modules that are not in
            the base checkpoint, are left out even if they match.
        train_head: train the classifier's final linear layer too. Other parameters that are missing from the
            checkpoint stay frozen.
        dropout: probability of dropout on the adapter's input, in train mode only.
        options: (name, value) of the family's own options.
        ranks: (full module name, rank) of the modules whose rank is not `rank`.

    Raises:
        ValueError: a family, target or option is unknown, nothing would be trained, or the model already has an
            adapter.
    """
    chosen = family_of(family, options)
    model = loaded.model
    if any(isinstance(module, AdaptedLinear) for module in model.modules()):
        raise ValueError("this model already has an adapter; load it afresh")
    if not targets and not train_head:
        raise ValueError("nothing would be trained: name targets or train the head")
    task = task_named(loaded.task)
    head = task.head(model)
    if train_head and head is None:
        raise ValueError(f"{task.model_is} has no task head to train; leave train_head off")
    modules = target_modules(model, targets, loaded.missing, head)
    own_ranks = dict(ranks)
    if unknown := own_ranks.keys() - set(modules):
        raise ValueError(f"a rank is given for {', '.join(sorted(unknown)[:3])}, and the adapted modules are "
                         f"{', '.join(modules[:3])}{', …' if len(modules) > 3 else ''}")
    model.requires_grad_(False)

    sites, leaves = [], Leaves(model.device)
    for name in modules:
        base = cast("nn.Linear | Conv1D", model.get_submodule(name))
        d_out, d_in = reversed(base.weight.shape) if isinstance(base, Conv1D) else base.weight.shape
        site = Site(name, d_out, d_in, r := own_ranks.get(name, rank), alpha / r)
        sites.append(site)
        adapted = AdaptedLinear(base, chosen.build(site, leaves), dropout)
        model.set_submodule(name, adapted.train(model.training))
    heads = _heads(loaded, head if train_head else None, leaves)
    layout = AdapterLayout.of(chosen, sites, heads)
    if lacking := {spec.name for spec in layout.state} - leaves.made.keys():
        raise ValueError(f"the adapter family {family} builds no leaf for {', '.join(sorted(lacking)[:3])}")
    for spec in layout.state:
        module, parameter_name = leaves.made[spec.name]
        parameter = getattr(module, parameter_name)
        assert parameter.shape == spec.shape, f"{spec.name} has the shape that its family says"
        parameter.data = parameter.data.float()
        parameter.requires_grad_(spec.trains)
    return AdaptedModel(loaded, layout, head, leaves.made)


def _heads(loaded: LoadedModel, trained: str | None, leaves: Leaves) -> list[TensorSpec]:
    """Turn the trained head into a leaf, and return the specs of its parameters and of all missing ones.

    Args:
        loaded: the model. Missing parameters are those that its checkpoint lacks.
        trained: name of the head's final linear layer; None if it is not trained.
        leaves: takes the parameters.
    """
    model, specs, parameters = loaded.model, [], set[str]()
    if trained:
        leaf = Linear.of(cast(nn.Linear, model.get_submodule(trained)))
        model.set_submodule(trained, leaf)
        parameters = {f"{trained}.{name}" for name, _ in leaf.named_parameters()}
    for name in sorted({*loaded.missing, *parameters}):
        module_name, _, parameter_name = name.rpartition(".")
        module = model.get_submodule(module_name)
        leaves.made[f"head.{name}"] = module, parameter_name
        shape = tuple(getattr(module, parameter_name).shape)
        specs.append(TensorSpec(f"head.{name}", shape, "head", trains=name in parameters))
    return specs


def attach_planned(loaded: LoadedModel, run: RunPlan) -> AdaptedModel:
    """Put the adapter on a loaded model that the plan of a run describes; see `attach`.

    Raises:
        ValueError: as for `attach`, or the run is private and the family refuses that.
    """
    if run.private:
        check_private(family_of(run.family, run.family_options))
    return attach(loaded, family=run.family, rank=run.rank, alpha=run.alpha, targets=run.targets,
                  train_head=run.train_head, dropout=run.dropout, options=run.family_options, ranks=run.ranks)
