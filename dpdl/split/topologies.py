"""The configurations of split learning, each as a `SplitGraph`. Nothing else in the package knows their names.

    graph = vanilla(bottom, top, F.cross_entropy with reduction="sum")

References:
    Vepakomma, Gupta, Swedish and Raskar, Split learning for health, 2018. arXiv:1812.00564.
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
    """Puts its inputs side by side along axis 1, row by row: what joins the feature holders' activations.

    Has no parameters, draws nothing, and keeps rows apart: row i of the result is made of the rows i of its inputs.
    """

    def forward(self, *inputs: Tensor) -> Tensor:
        """Join.

        Args:
            inputs: shapes [N, a, ...], [N, b, ...], ..., alike but in axis 1.

        Returns:
            Shape [N, a + b + ..., ...], in the order of the inputs.

        Raises:
            RuntimeError: other axes differ.
        """
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

    Returns:
        The graph. In a step activations [N, ...] of each part go to the next party and gradients of the same shape come
        back; labels [N] cross if they are not the last party's own.

    Raises:
        ParameterError: not one party for each module, or as `SplitGraph`.

    Source:
        arXiv:1812.00564 (multi-hop).
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
    """The client's part, then the server's, who computes the loss; labels are sent to it, or are its own.

    Args:
        bottom: the client's part: rows of column x to activations [N, ...]. None where it is not known here.
        top: the server's part: those activations to outputs. None likewise.
        loss_fn: (outputs [N, ...], labels [N, ...]) to the *sum* over rows, or [N] losses; None likewise.
        client, server: what the parties are called.
        x, y: columns of data and labels.
        labels_of: who owns the labels; by default the client, who sends them in clear where no door flips them.

    Returns:
        The graph of parts "bottom" and "top", cut in between: one round trip a step.

    Guarantee:
        None by itself: activations and labels leave as they are. `ReleaseDoor` protects them, DP-SGD the weights.

    Raises:
        ParameterError, ModelError: as `SplitGraph`.

    Source:
        Gupta and Raskar, 2018, arXiv:1810.06060; arXiv:1812.00564.
    """
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
    """The first and the last part are the client's, and so are labels and loss; the server has the middle.

    Args:
        bottom: rows of column x to activations [N, ...], at the client. None where it is not known here.
        middle: those to others, at the server. None likewise.
        top: those to outputs, at the client. None likewise.
        loss_fn: (outputs [N, ...], labels [N, ...]) to the *sum* over rows, or [N] losses; None likewise.
        client, server: what the parties are called.
        x, y: columns of data and labels, both the client's.

    Returns:
        The graph of parts "bottom", "middle" and "top": two round trips a step.

    Guarantee:
        None by itself. Labels never leave, but the gradient of "middle"'s output, which does, tells them: a second
        release (`GradientRelease`) beside the activations'.

    Raises:
        ParameterError, ModelError: as `SplitGraph`.

    Source:
        arXiv:1812.00564 (without label sharing).
    """
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
        loss_fn: (outputs [N, ...], labels [N, ...]) to the *sum* over rows, or [N] losses; at the server.
        server: who joins, and computes the loss.
        y: column of labels.
        labels_of: who owns the labels; by default the server.

    Returns:
        The graph of parts "bottom of <party>", "join" and "top". Row n of every column is the same record.

    Guarantee:
        None by itself; parties that get gradients learn of each other's columns of the same records: reports say so.

    Raises:
        ParameterError, ModelError: as `SplitGraph`.

    Source:
        arXiv:1812.00564 (vertically partitioned data).
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
    """As `vertical`, with another client's part between the join and the server.

    Args:
        bottoms: party to its part, which reads the column "x of <party>".
        middle: takes the bottoms' outputs side by side along axis 1, in order; at `between`.
        top: takes the middle's output; at the server.
        loss_fn: (outputs [N, ...], labels [N, ...]) to the *sum* over rows, or [N] losses; at the server.
        between: who joins, and holds the middle.
        server: who computes the loss.
        y: column of labels.
        labels_of: who owns the labels; by default the server.

    Returns:
        The graph of parts "bottom of <party>", "join", "middle" and "top".

    Guarantee:
        None by itself, as `vertical`; `between` sees the feature holders' rows.

    Raises:
        ParameterError, ModelError: as `SplitGraph`.

    Source:
        arXiv:1812.00564 (extended vanilla).
    """
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
        bottom: the client's part, whose output [N, ...] all label holders get.
        tops: party to its part; its labels are the column "y of <party>".
        loss_fns: party to its loss, (outputs, labels) to the *sum* over rows, or [N] losses.
        client: who has the data.
        x: column of data.

    Returns:
        The graph; gradients that come back are added up, so that a record's gradient is clipped once, as the sum.

    Guarantee:
        None by itself; label holders get the same rows, and share one account of a door.

    Raises:
        ParameterError, ModelError: as `SplitGraph`.

    Source:
        arXiv:1812.00564 (multi-task output, there with vertically partitioned input).
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
