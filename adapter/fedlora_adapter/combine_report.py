"""What fedlora-adapter combine writes and prints."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

from fedlora.console import messages

from .agreement import read_agreeing
from .combining import DENSE, Way, combined, whole_tensors
from .errors_shown import show_errors
from .known_epsilon import known
from .peft_folder import Adapter
from .written import check_new, write


def combine(adapters: Sequence[Path], how: str, weights: str | tuple[float, ...] | None, rank: int | None,
            density: float, seed: int, base: str | None, column: Mapping[str, str], max_length: int,
            describe: Sequence[str], encoder: str, same_base: bool, out: Path, as_json: bool) -> int:
    """Combine adapters, write the result, and print what each layer lost.

    Args:
        adapters: the adapters' folders.
        how: one of the ways of `combining`.
        weights: numbers, "public:FILE", "description:TEXT", or None for the way's own.
        rank: largest rank of the result; None for the way's own.
        density: share of the values that TIES and DARE keep.
        seed: seed of what DARE drops.
        base: the base model, for weights from public rows.
        column: the public rows' names of columns.
        max_length: tokens kept of a public row.
        describe: descriptions of the adapters' tasks.
        encoder: the encoder of descriptions.
        same_base: the base models are the same, although their names differ.
        out: the new folder.
        as_json: print JSON instead of a table.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: something does not fit; the message says what.
    """
    check_new(out)
    sources = read_agreeing(adapters, "combine", same_base=same_base)
    way = Way(how, rank, density, seed)
    chosen, reason = _weights(sources, way, weights, base, column, max_length, describe, encoder)
    names = sorted(set().union(*(source.targets for source in sources)))
    made = {name: combined(sources, name, chosen, way) for name in names}
    worst = max((one.error for one in made.values()), default=0.0)
    dense = f" at density {density:g}" if how in DENSE else ""
    shares = ", ".join(f"{source.name} ({weight:.4g})" for source, weight in zip(sources, chosen, strict=True))
    privacy = known(sources)
    write(out, sources, {name: one.target for name, one in made.items()}, whole_tensors(sources, chosen),
          how={"how": "combine", "by": how, "weights_from": reason, "largest_error": worst,
               **({"density": density, "seed": seed} if how in DENSE else {})},
          told=f"`fedlora-adapter combine --how {how}`{dense} made it of {shares}, with weights {reason}. Cutting to "
               f"the written ranks took at most {worst:.2%} of a layer's combined update in the Frobenius norm.",
          known=privacy, weights=chosen)
    show_errors(out, {name: (one.exact_rank, one.target.rank, one.error) for name, one in made.items()},
                as_json=as_json, about={"weights": list(chosen), "weights_from": reason,
                                        "privacy": privacy.to_dict()})
    if not as_json:
        print(f"Weights {reason}: {shares}. {privacy.sentence()}")
    return 0


def _weights(sources: Sequence[Adapter], way: Way, given: str | tuple[float, ...] | None, base: str | None,
             column: Mapping[str, str], max_length: int, describe: Sequence[str],
             encoder: str) -> tuple[tuple[float, ...], str]:
    """Return the weights, and where they come from in words."""
    default = way.default_weight(len(sources))
    if given is None:
        return (default,) * len(sources), "that are equal"
    if isinstance(given, tuple):
        return given, "as given"
    kind, _, rest = given.partition(":")
    if kind == "public":
        from .fitting import fitted

        assert base is not None
        shares, told = fitted(sources, way, Path(rest), base, column, max_length)
        messages().print(told)
        return shares, "fitted to public rows"
    from .descriptions import alike

    return (tuple(share * default * len(sources) for share in alike(rest, describe, encoder)),
            "from descriptions of the tasks")
