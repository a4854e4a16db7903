"""Split of one data set over simulated clients: evenly, by Dirichlet label shares, or by shards of sorted labels.

"dirichlet:α" draws each label's shares over the clients from Dirichlet(α, …, α) (Hsu et al., arXiv:1909.06335, in the
form that most federated papers use). "shards:k" gives each client k pieces of the data sorted by label (McMahan et al.,
arXiv:1602.05629).
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

_DRAWS = 1000


def partition(n: int, labels: Sequence[str | int | None] | None, scheme: str, clients: int, seed: int
              ) -> list[np.ndarray]:
    """Split rows over clients.

    Args:
        n: number of rows.
        labels: one label for each row; only "dirichlet" and "shards" need them. None counts as a label like any other,
            so leave out rows that will not be trained on.
        scheme: "iid", "dirichlet:α" with α > 0, or "shards:k" with k >= 1.
        clients: number of clients.
        seed: seed of the split.

    Returns:
        The row indices of each client. Each array is sorted and not empty; together they hold each row exactly once.

    Raises:
        ValueError: the scheme is unknown, or cannot give every client a row.
    """
    name, _, value = scheme.partition(":")
    if not 1 <= clients <= n:
        raise ValueError(f"{n} rows cannot be split over {clients} clients. Take between 1 and {n} clients")
    rng = np.random.default_rng(seed)
    if scheme == "iid":
        return [np.sort(part) for part in np.array_split(rng.permutation(n), clients)]
    if name not in ("dirichlet", "shards") or not _positive(value, whole=name == "shards"):
        raise ValueError(f"partition {scheme!r} is unknown. Choose iid, dirichlet:α (like dirichlet:0.5), shards:k "
                         "(like shards:2) or files (one file for each client)")
    if labels is None:
        raise ValueError(f"partition {scheme!r} splits by label, and these rows have none. Choose iid")
    if len(labels) != n:
        raise ValueError(f"there are {len(labels)} labels for {n} rows; there must be one for each")
    codes = np.unique([str(label) for label in labels], return_inverse=True)[1]
    return (_shards(codes, int(value), clients, rng) if name == "shards"
            else _dirichlet(codes, float(value), clients, rng))


def _positive(value: str, *, whole: bool) -> bool:
    try:
        number = int(value) if whole else float(value)
    except ValueError:
        return False
    return 0 < number < float("inf")


def _dirichlet(codes: np.ndarray, alpha: float, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    """Draw label shares until every client has a row."""
    for _ in range(_DRAWS):
        parts: list[list[np.ndarray]] = [[] for _ in range(clients)]
        for code in range(codes.max() + 1):
            rows = rng.permutation(np.flatnonzero(codes == code))
            cuts = np.cumsum(rng.dirichlet(np.full(clients, alpha)))[:-1] * len(rows)
            for part, piece in zip(parts, np.split(rows, cuts.astype(np.int64)), strict=True):
                part.append(piece)
        merged = [np.sort(np.concatenate(part)) for part in parts]
        if all(len(part) for part in merged):
            return merged
    raise ValueError(f"dirichlet:{alpha:g} left one of {clients} clients without rows in each of {_DRAWS} draws. "
                     "Take a larger α or fewer clients")


def _shards(codes: np.ndarray, k: int, clients: int, rng: np.random.Generator) -> list[np.ndarray]:
    if clients * k > len(codes):
        raise ValueError(f"shards:{k} over {clients} clients needs {clients * k} rows, and there are {len(codes)}. "
                         "Take fewer shards or clients")
    by_label = rng.permutation(len(codes))
    by_label = by_label[np.argsort(codes[by_label], kind="stable")]
    pieces = np.array_split(by_label, clients * k)
    order = rng.permutation(clients * k).reshape(clients, k)
    return [np.sort(np.concatenate([pieces[i] for i in mine])) for mine in order]
