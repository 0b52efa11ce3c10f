"""Which examples each client of a simulated federation holds.

    parts = dirichlet(labels, 5, alpha=0.5, seed=0)      # five index arrays, each example in exactly one of them
    hospitals = [Subset(dataset, part) for part in parts]

Four ways, from the mildest to the real thing:

| partitioner | clients differ in |
| --- | --- |
| `iid` | size, if asked for |
| `dirichlet` | label proportions and size [1] |
| `shards` | which labels they have at all [2] |
| `by_owner` | whatever their owners differ in: writer, patient, hospital |

A partition is for simulation. It is the same for the same seed, which therefore protects nothing, and its sizes are
treated as public, as the number of records of every client is.

References:
    [1] Yurochkin et al., Bayesian Nonparametric Federated Learning of Neural Networks, 2019, section 4.
        arXiv:1905.12022
    [2] McMahan et al., Communication-Efficient Learning of Deep Networks from Decentralized Data, 2017, section 3.
        arXiv:1602.05629
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
from numpy.typing import ArrayLike, NDArray
from torch import Tensor

from accountants import arguments
from dpdl.errors import ParameterError

__all__ = ["by_owner", "dirichlet", "iid", "shards"]

Part = NDArray[np.int64]

# Draws of a whole partition before the minimum is given up. At ten clients and alpha = 0.5 one in ten draws or more
# leaves everybody ten examples of 4,000; what a thousand draws do not find is not worth waiting for.
ATTEMPTS = 1000


def iid(
    size: int, clients: int, *, proportions: Sequence[float] | None = None, minimum: int = 1, seed: int = 0
) -> list[Part]:
    """Examples at random, equally many for each client or in given proportions.

    Args:
        size: how many examples there are.
        clients: how many parts.
        proportions: of the parts' sizes, one a client, > 0; they need not add up to 1. Equal by default.
        minimum: the fewest examples that a client may get.
        seed: the same seed, the same partition.

    Returns:
        For each client the indices of its examples, ascending. Without proportions, sizes differ by one at most.

    Raises:
        ParameterError: a client would have fewer than `minimum` examples, or an argument is out of range.

    Example:
        >>> [len(part) for part in iid(7, 2)], [len(part) for part in iid(8, 2, proportions=[3, 1])]
        ([4, 3], [6, 2])
    """
    size = arguments.positive_whole("size", size, remedy="Give the number of examples, len(dataset).")
    clients, minimum = _room(size, clients, minimum)
    shuffled = _generator(seed).permutation(size)
    if proportions is None:
        return _checked(np.array_split(shuffled, clients), size, minimum, "iid", "Ask for fewer clients.")
    shares = arguments.reals("proportions", list(proportions), remedy="Give one number a client.")
    if shares.shape != (clients,) or not np.all(np.isfinite(shares) & (shares > 0)):
        raise ParameterError(f"proportions must be {clients} numbers > 0, one a client, got {list(proportions)}.")
    parts = np.split(shuffled, _cuts(shares / shares.sum(), size))
    return _checked(parts, size, minimum, "iid", "Give it a larger proportion, or ask for fewer clients.")


def dirichlet(labels: ArrayLike | Tensor, clients: int, *, alpha: float, minimum: int = 1, seed: int = 0) -> list[Part]:
    """Each label's examples spread over the clients in proportions drawn from a symmetric Dirichlet distribution [1].

    Args:
        labels: one an example, shape [N].
        clients: how many parts.
        alpha: > 0; the smaller, the more a label is with a few clients. 0.1 is harsh, 1 is uneven, 100 nearly even.
        minimum: the fewest examples that a client may get. The partition is drawn again until all have them, up to a
            thousand times.
        seed: the same seed, the same partition.

    Returns:
        For each client the indices of its examples, ascending.

    Raises:
        ParameterError: no draw leaves every client `minimum` examples, or an argument is out of range.

    Example:
        >>> parts = dirichlet([0, 0, 0, 0, 1, 1, 1, 1], 2, alpha=0.5, seed=3)
        >>> sorted(index for part in parts for index in part.tolist())
        [0, 1, 2, 3, 4, 5, 6, 7]
    """
    values = _column("labels", labels)
    clients, minimum = _room(len(values), clients, minimum)
    alpha = arguments.non_negative("alpha", alpha, remedy="0.5 is a common choice.")
    if alpha == 0:
        raise ParameterError("alpha must be > 0, got 0. For clients with a few labels only, use shards(...).")
    generator = _generator(seed)
    by_label = [np.flatnonzero(values == label) for label in np.unique(values)]
    for _ in range(ATTEMPTS):
        pieces: list[list[Part]] = [[] for _ in range(clients)]
        for examples in by_label:
            cuts = _cuts(generator.dirichlet(np.full(clients, alpha)), len(examples))
            for piece, some in zip(pieces, np.split(generator.permutation(examples), cuts), strict=True):
                piece.append(some)
        parts = [np.concatenate(piece) for piece in pieces]
        if min(map(len, parts)) >= minimum:
            return _checked(parts, len(values), minimum, "dirichlet", "")
    raise ParameterError(
        f"{ATTEMPTS} draws at alpha={alpha:g} left some of the {clients} clients with fewer than minimum={minimum} of "
        f"the {len(values)} examples. Give a larger alpha, a smaller minimum, or fewer clients."
    )


def shards(
    labels: ArrayLike | Tensor, clients: int, *, per_client: int = 2, minimum: int = 1, seed: int = 0
) -> list[Part]:
    """Examples sorted by label, cut into equal shards, a few of which go to each client [2].

    With two shards a client most clients see two labels, and none more than a few.

    Args:
        labels: one an example, shape [N].
        clients: how many parts.
        per_client: shards a client.
        minimum: the fewest examples that a client may get.
        seed: the same seed, the same partition.

    Returns:
        For each client the indices of its examples, ascending.

    Raises:
        ParameterError: there are fewer examples than shards, a client would have fewer than `minimum`, or an argument
            is out of range.

    Example:
        >>> sorted(part.tolist() for part in shards([0, 1, 0, 1], 2, per_client=1))
        [[0, 2], [1, 3]]
    """
    values = _column("labels", labels)
    clients, minimum = _room(len(values), clients, minimum)
    per_client = arguments.positive_whole("per_client", per_client, remedy="Give a number of shards such as 2.")
    number = clients * per_client
    if number > len(values):
        raise ParameterError(
            f"{clients} clients of {per_client} shards each are {number} shards, but there are {len(values)} examples. "
            "Ask for fewer clients or shards."
        )
    generator = _generator(seed)
    in_label_order = np.argsort(values, kind="stable")
    pieces = np.array_split(in_label_order, number)
    order = generator.permutation(number)
    parts = [np.concatenate([pieces[i] for i in order[k::clients]]) for k in range(clients)]
    return _checked(parts, len(values), minimum, "shards", "Ask for fewer clients.")


def by_owner(owners: ArrayLike | Tensor, *, minimum: int = 1) -> list[Part]:
    """Each owner's examples to a client of its own: the partition that the data came with.

    Args:
        owners: whose each example is, shape [N]: numbers or names.
        minimum: the fewest examples that an owner may have.

    Returns:
        For each owner, in the order of `numpy.unique(owners)`, the indices of its examples, ascending.

    Raises:
        ParameterError: an owner has fewer than `minimum` examples; none are dropped.

    Example:
        >>> [part.tolist() for part in by_owner(["St. Mary", "Charité", "St. Mary"])]
        [[1], [0, 2]]
    """
    values = _column("owners", owners)
    minimum = arguments.positive_whole("minimum", minimum, remedy="A client has at least one example.")
    names, owner, counts = np.unique(values, return_inverse=True, return_counts=True)
    few = [f"{name} has {count}" for name, count in zip(names, counts, strict=True) if count < minimum]
    if few:
        more = f", and {len(few) - 3} more" if len(few) > 3 else ""
        raise ParameterError(
            f"{len(few)} of {len(names)} owners have fewer than minimum={minimum} examples: {', '.join(few[:3])}{more}"
            ". Leave their examples out, or give a smaller minimum."
        )
    order = np.argsort(owner, kind="stable")
    return [part.astype(np.int64) for part in np.split(order, np.cumsum(counts)[:-1])]


def _cuts(shares: NDArray[np.float64], size: int) -> NDArray[np.int64]:
    """Where to cut `size` things so that the pieces have these shares, which add up to 1; one cut less than pieces."""
    ends = np.floor(np.cumsum(shares)[:-1] * size + 1e-9)  # a share of exactly k things must not come out as k - 1
    return np.clip(ends, 0, size).astype(np.int64)


def _room(size: int, clients: int, minimum: int) -> tuple[int, int]:
    clients = arguments.positive_whole("clients", clients, remedy="Give a number of clients such as 10.")
    minimum = arguments.positive_whole("minimum", minimum, remedy="A client has at least one example.")
    if clients * minimum > size:
        raise ParameterError(
            f"{clients} clients with at least minimum={minimum} examples each need {clients * minimum}, but there are "
            f"{size}. Ask for fewer clients, or a smaller minimum."
        )
    return clients, minimum


def _column(name: str, values: ArrayLike | Tensor) -> NDArray[np.generic]:
    column = values.detach().cpu().numpy() if isinstance(values, Tensor) else np.asarray(values)
    if column.ndim != 1 or len(column) == 0:
        raise ParameterError(f"{name} must be one value an example, shape [N], got shape {list(column.shape)}.")
    if column.dtype.kind not in "iubUS":
        raise ParameterError(f"{name} must be whole numbers or names, got {column.dtype}.")
    return column


def _generator(seed: int) -> np.random.Generator:
    return np.random.default_rng(arguments.whole("seed", seed, remedy="Give a number such as 0."))


def _checked(parts: Sequence[NDArray[np.int64]], size: int, minimum: int, name: str, remedy: str) -> list[Part]:
    """The parts, ascending; refused if one is too small. Every example is in exactly one of them, or we are wrong."""
    smallest = min(map(len, parts))
    if smallest < minimum:
        client = [len(part) for part in parts].index(smallest)
        raise ParameterError(
            f"{name} leaves client {client} with {smallest} of {size} examples, fewer than minimum={minimum}. {remedy}"
        )
    assert sum(map(len, parts)) == size
    return [np.sort(part).astype(np.int64) for part in parts]
