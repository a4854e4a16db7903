"""What fedlora-adapter resize writes and prints."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

from .errors_shown import show_errors
from .known_epsilon import known
from .peft_folder import read
from .resizing import resized
from .written import check_new, write


def resize(adapter: Path, rank: int, by: str, out: Path, as_json: bool) -> int:
    """Write an adapter at a smaller rank, and print each layer's error.

    Args:
        adapter: the adapter's folder.
        rank: the new rank.
        by: one of `resizing.WAYS`.
        out: the new folder.
        as_json: print JSON instead of a table.

    Returns:
        The exit code, 0.

    Raises:
        ValueError: there is nothing to cut, or something does not fit; the message says what.
    """
    check_new(out)
    source = read(adapter)
    ranks = Counter(target.rank for target in source.targets.values())
    if not ranks or max(ranks) <= rank:
        has = f"its layers have rank {max(ranks)} at most" if ranks else "it adapts no layer, but has a head alone"
        raise ValueError(f"{adapter} has nothing to cut to rank {rank}: {has}")
    new = {name: resized(source, name, rank, by) for name in source.targets}
    errors = {name: error for name, (_, error) in new.items()}
    worst = max(errors.values())
    write(out, [source], {name: target for name, (target, _) in new.items()},
          {key: source.tensor(key) for key in source.others},
          how={"how": "resize", "by": by, "rank": rank, "largest_error": worst},
          told=f"`fedlora-adapter resize --rank {rank} --by {by}` made it of {source.name}. The updates of its layers "
               f"changed by at most {worst:.2%} in the Frobenius norm.", known=known([source]))
    show_errors(out, {name: (source.targets[name].rank, target.rank, errors[name])
                      for name, (target, _) in new.items()}, as_json=as_json)
    return 0
