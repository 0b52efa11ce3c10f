"""The configurations of split learning, each as a `SplitGraph`. Nothing else in the package knows their names.

    graph = vanilla(bottom, top, F.cross_entropy with reduction="sum")

References:
    Vepakomma, Gupta, Swedish and Raskar, Split learning for health, 2018. arXiv:1812.00564, figures 1 and 2.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from dpdl.errors import ParameterError
from dpdl.split.graph import Head, LossFunction, Part, SplitGraph

__all__ = ["ColumnJoin", "chain", "extended", "multi_task", "u_shaped", "vanilla", "vertical"]

HEAD = "loss"


class ColumnJoin(nn.Module):
    """Puts its inputs side by side along axis 1, row by row."""

    def forward(self, *inputs: Tensor) -> Tensor:
        """[N, a, ...], [N, b, ...], ... to [N, a + b + ..., ...]."""
        return torch.cat(inputs, dim=1)


def chain(
    modules: Sequence[nn.Module | None],
    loss_fn: LossFunction | None,
    *,
    parties: Sequence[str],
    x: str = "x",
    y: str = "y",
    labels_of: str | None = None,
) -> SplitGraph:
    """Part after part, each with its own party; a party that comes again holds several parts.

    Args:
        modules: parts "part 1", "part 2", ...; None where another party's is not known here.
        loss_fn: of the last part's output, at the last party.
        parties: one for each module.
        x, y: columns of data and labels.
        labels_of: who owns the labels; by default the last party.
    """
    if len(parties) != len(modules) or not modules:
        raise ParameterError(f"parties names one party for each of {len(modules)} modules, got {list(parties)}.")
    names = [f"part {number}" for number in range(1, len(modules) + 1)]
    parts = tuple(
        Part(name=name, module=module, party=party, inputs=(before,))
        for name, module, party, before in zip(names, modules, parties, [x, *names], strict=False)
    )
    head = Head(name=HEAD, party=parties[-1], part=names[-1], labels=y, loss_fn=loss_fn)
    return SplitGraph(parts=parts, heads=(head,), columns={x: parties[0], y: labels_of or parties[-1]})


def vanilla(
    bottom: nn.Module | None,
    top: nn.Module | None,
    loss_fn: LossFunction | None,
    *,
    client: str = "client",
    server: str = "server",
    x: str = "x",
    y: str = "y",
    labels_of: str | None = None,
) -> SplitGraph:
    """The client's part, then the server's; labels are sent to the server (or are its own: `labels_of=server`)."""
    parts = (
        Part(name="bottom", module=bottom, party=client, inputs=(x,)),
        Part(name="top", module=top, party=server, inputs=("bottom",)),
    )
    head = Head(name=HEAD, party=server, part="top", labels=y, loss_fn=loss_fn)
    return SplitGraph(parts=parts, heads=(head,), columns={x: client, y: labels_of or client})


def u_shaped(
    bottom: nn.Module | None,
    middle: nn.Module | None,
    top: nn.Module | None,
    loss_fn: LossFunction | None,
    *,
    client: str = "client",
    server: str = "server",
    x: str = "x",
    y: str = "y",
) -> SplitGraph:
    """The first and the last part are the client's, and so are labels and loss; the server has the middle."""
    parts = (
        Part(name="bottom", module=bottom, party=client, inputs=(x,)),
        Part(name="middle", module=middle, party=server, inputs=("bottom",)),
        Part(name="top", module=top, party=client, inputs=("middle",)),
    )
    head = Head(name=HEAD, party=client, part="top", labels=y, loss_fn=loss_fn)
    return SplitGraph(parts=parts, heads=(head,), columns={x: client, y: client})


def vertical(
    bottoms: Mapping[str, nn.Module | None],
    top: nn.Module | None,
    loss_fn: LossFunction | None,
    *,
    server: str = "server",
    y: str = "y",
    labels_of: str | None = None,
) -> SplitGraph:
    """Several parties hold different columns of the same records; the server joins what their parts give.

    Args:
        bottoms: party to its part, which reads the column "x of <party>".
        top: takes the bottoms' outputs side by side along axis 1, in order.
        labels_of: who owns the labels; by default the server.
    """
    parts = (
        *_bottoms(bottoms),
        Part(name="join", module=ColumnJoin(), party=server, inputs=_names(bottoms), trains=False),
        Part(name="top", module=top, party=server, inputs=("join",)),
    )
    head = Head(name=HEAD, party=server, part="top", labels=y, loss_fn=loss_fn)
    return SplitGraph(parts=parts, heads=(head,), columns={y: labels_of or server})


def extended(
    bottoms: Mapping[str, nn.Module | None],
    middle: nn.Module | None,
    top: nn.Module | None,
    loss_fn: LossFunction | None,
    *,
    between: str = "between",
    server: str = "server",
    y: str = "y",
    labels_of: str | None = None,
) -> SplitGraph:
    """As `vertical`, with another client's part between the join and the server."""
    parts = (
        *_bottoms(bottoms),
        Part(name="join", module=ColumnJoin(), party=between, inputs=_names(bottoms), trains=False),
        Part(name="middle", module=middle, party=between, inputs=("join",)),
        Part(name="top", module=top, party=server, inputs=("middle",)),
    )
    head = Head(name=HEAD, party=server, part="top", labels=y, loss_fn=loss_fn)
    return SplitGraph(parts=parts, heads=(head,), columns={y: labels_of or server})


def multi_task(
    bottom: nn.Module | None,
    tops: Mapping[str, nn.Module | None],
    loss_fns: Mapping[str, LossFunction | None],
    *,
    client: str = "client",
    x: str = "x",
) -> SplitGraph:
    """Several label holders, each with a part and a loss of its own on the same client's output.

    Args:
        tops: party to its part; its labels are the column "y of <party>".
        loss_fns: party to its loss.
    """
    parts = [Part(name="bottom", module=bottom, party=client, inputs=(x,))]
    parts += [Part(name=f"top of {p}", module=m, party=p, inputs=("bottom",)) for p, m in tops.items()]
    heads = tuple(
        Head(name=f"loss of {party}", party=party, part=f"top of {party}", labels=f"y of {party}", loss_fn=loss_fn)
        for party, loss_fn in loss_fns.items()
    )
    return SplitGraph(parts=tuple(parts), heads=heads, columns={x: client})


def _bottoms(modules: Mapping[str, nn.Module | None]) -> tuple[Part, ...]:
    return tuple(
        Part(name=name, module=module, party=party, inputs=(f"x of {party}",))
        for (party, module), name in zip(modules.items(), _names(modules), strict=True)
    )


def _names(modules: Mapping[str, nn.Module | None]) -> tuple[str, ...]:
    return tuple(f"bottom of {party}" for party in modules)
