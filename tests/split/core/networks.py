"""Small split networks of every topology, and beside each the whole network, written out by hand."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from functools import partial

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl.split import topologies as top
from dpdl.split.graph import Head, Part, SplitGraph

Modules = Mapping[str, nn.Module]
ROWS = 60


def sum_of_cross_entropies(outputs: Tensor, labels: Tensor) -> Tensor:
    return F.cross_entropy(outputs, labels, reduction="sum")


def sum_of_squares(outputs: Tensor, labels: Tensor) -> Tensor:
    return (outputs.squeeze(1) - labels).square().sum()


@dataclass(frozen=True, kw_only=True)
class Case:
    """A network in pieces.

    Attributes:
        name: of the topology.
        modules: part to module.
        graph: from modules.
        loss: the whole network's loss on a batch of one, from modules and columns. Shares no code with dpdl.
        data: columns.
        driver: who begins the steps; None for the default.
    """

    name: str
    modules: Modules
    graph: Callable[[Modules], SplitGraph]
    loss: Callable[[Modules, Mapping[str, Tensor]], Tensor]
    data: Mapping[str, Tensor]
    driver: str | None = None

    def fresh(self) -> Case:
        """The same case with modules of its own."""
        return replace(self, modules=copy.deepcopy(dict(self.modules)))


def _linear(a: int, b: int) -> nn.Module:
    return nn.Sequential(nn.Linear(a, b), nn.Tanh())


def _data(**columns: Tensor) -> dict[str, Tensor]:
    return {name.replace("_", " "): tensor for name, tensor in columns.items()}


def cases() -> list[Case]:
    torch.manual_seed(3)
    x, y = torch.randn(ROWS, 4), torch.randint(3, (ROWS,))
    found = []

    two = {"bottom": _linear(4, 5), "top": nn.Linear(5, 3)}

    def of_two(m: Modules, c: Mapping[str, Tensor]) -> Tensor:
        return F.cross_entropy(m["top"](m["bottom"](c["x"])), c["y"])

    for name, labels_of in (("vanilla", "client"), ("vanilla, labels with the server", "server")):
        found.append(
            Case(
                name=name,
                modules=two,
                graph=partial(_vanilla, labels_of=labels_of),
                loss=of_two,
                data={"x": x, "y": y},
            )
        )

    def with_a_label_holder(m: Modules) -> SplitGraph:
        graph = _vanilla(m, labels_of="server")
        head = replace(graph.heads[0], party="label holder")
        return SplitGraph(parts=graph.parts, heads=(head,), columns={"x": "client"})

    found.append(
        Case(
            name="a label holder who gets logits",
            modules=two,
            graph=with_a_label_holder,
            loss=of_two,
            data={"x": x, "y": y},
        )
    )

    three = {"bottom": _linear(4, 5), "middle": _linear(5, 6), "top": nn.Linear(6, 3)}
    found.append(
        Case(
            name="u-shaped",
            modules=three,
            graph=lambda m: top.u_shaped(m["bottom"], m["middle"], m["top"], sum_of_cross_entropies),
            loss=lambda m, c: F.cross_entropy(m["top"](m["middle"](m["bottom"](c["x"]))), c["y"]),
            data={"x": x, "y": y},
        )
    )

    sides = {"bottom of a": _linear(4, 3), "bottom of b": _linear(2, 4), "top": nn.Linear(7, 3)}
    columns = {"x of a": x, "x of b": torch.randn(ROWS, 2), "y": y}

    def of_sides(m: Modules, c: Mapping[str, Tensor]) -> Tensor:
        joined = torch.cat([m["bottom of a"](c["x of a"]), m["bottom of b"](c["x of b"])], dim=1)
        return F.cross_entropy(m["top"](joined), c["y"])

    for name, labels_of, driver in (
        ("vertical", None, None),
        ("vertical, driven by a feature holder", None, "b"),
        ("vertical, labels with a feature holder", "a", "a"),
    ):
        found.append(
            Case(
                name=name,
                modules=sides,
                graph=partial(_vertical, labels_of=labels_of),
                loss=of_sides,
                data=columns,
                driver=driver,
            )
        )

    longer = {**sides, "middle": _linear(7, 5), "top": nn.Linear(5, 3)}

    def of_longer(m: Modules, c: Mapping[str, Tensor]) -> Tensor:
        joined = torch.cat([m["bottom of a"](c["x of a"]), m["bottom of b"](c["x of b"])], dim=1)
        return F.cross_entropy(m["top"](m["middle"](joined)), c["y"])

    for name, labels_of, driver in (
        ("extended", None, None),
        ("extended, parties in a circle", "a", "a"),
    ):
        found.append(
            Case(
                name=name,
                modules=longer,
                graph=partial(_extended, labels_of=labels_of),
                loss=of_longer,
                data=columns,
                driver=driver,
            )
        )

    hops = {"part 1": _linear(4, 5), "part 2": _linear(5, 4), "part 3": _linear(4, 6), "part 4": nn.Linear(6, 3)}

    def of_hops(m: Modules, c: Mapping[str, Tensor]) -> Tensor:
        z = c["x"]
        for number in (1, 2, 3, 4):
            z = m[f"part {number}"](z)
        return F.cross_entropy(z, c["y"])

    for name, parties, labels_of in (
        ("chain", ["c1", "c2", "c3", "server"], None),
        ("chain, labels with the first", ["c1", "c2", "c3", "server"], "c1"),
        ("chain through one party twice", ["c1", "server", "server", "c1"], None),
    ):
        found.append(
            Case(
                name=name,
                modules=hops,
                graph=partial(_chain, parties=parties, labels_of=labels_of),
                loss=of_hops,
                data={"x": x, "y": y},
            )
        )

    tasks = {"bottom": _linear(4, 5), "top of kind": nn.Linear(5, 3), "top of size": nn.Linear(5, 1)}
    found.append(
        Case(
            name="multi-task",
            modules=tasks,
            graph=lambda m: top.multi_task(
                m["bottom"],
                {"kind": m["top of kind"], "size": m["top of size"]},
                {"kind": sum_of_cross_entropies, "size": sum_of_squares},
            ),
            loss=lambda m, c: (
                F.cross_entropy(m["top of kind"](m["bottom"](c["x"])), c["y of kind"])
                + (m["top of size"](m["bottom"](c["x"]))[0, 0] - c["y of size"][0]) ** 2
            ),
            data={"x": x, "y of kind": y, "y of size": torch.randn(ROWS)},
        )
    )
    found += [_with_a_skip(x, y), _convolutional(y)]
    return [_in_double(case) for case in found]


def _with_a_skip(x: Tensor, y: Tensor) -> Case:
    """A part whose output is used at home, elsewhere, and twice by one part; and one that is frozen."""
    modules = {
        "bottom": _linear(4, 5),
        "frozen": _linear(5, 5),
        "side": _linear(5, 5),
        "twice": nn.Bilinear(5, 5, 4),
        "top": nn.Linear(9, 3),
    }

    def graph(m: Modules) -> SplitGraph:
        return SplitGraph(
            parts=(
                Part(name="bottom", module=m["bottom"], party="client", inputs=("x",)),
                Part(name="frozen", module=m["frozen"], party="server", inputs=("bottom",), trains=False),
                Part(name="side", module=m["side"], party="client", inputs=("bottom",)),
                Part(name="twice", module=m["twice"], party="server", inputs=("frozen", "frozen")),
                Part(name="join", module=top.ColumnJoin(), party="server", inputs=("twice", "side"), trains=False),
                Part(name="top", module=m["top"], party="server", inputs=("join",)),
            ),
            heads=(Head(name="loss", party="client", part="top", labels="y", loss_fn=sum_of_cross_entropies),),
        )

    def loss(m: Modules, c: Mapping[str, Tensor]) -> Tensor:
        z = m["bottom"](c["x"])
        f = m["frozen"](z)
        return F.cross_entropy(m["top"](torch.cat([m["twice"](f, f), m["side"](z)], dim=1)), c["y"])

    return Case(name="skips, and a frozen part", modules=modules, graph=graph, loss=loss, data={"x": x, "y": y})


def _convolutional(y: Tensor) -> Case:
    modules = {
        "bottom": nn.Sequential(nn.Conv2d(1, 3, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)),
        "top": nn.Sequential(nn.Conv2d(3, 4, 3), nn.GroupNorm(2, 4), nn.ReLU(), nn.Flatten(), nn.Linear(16, 3)),
    }
    return Case(
        name="vanilla, convolutions",
        modules=modules,
        graph=_vanilla,
        loss=lambda m, c: F.cross_entropy(m["top"](m["bottom"](c["x"])), c["y"]),
        data={"x": torch.randn(ROWS, 1, 8, 8), "y": y},
    )


def _vanilla(m: Modules, labels_of: str | None = None) -> SplitGraph:
    return top.vanilla(m["bottom"], m["top"], sum_of_cross_entropies, labels_of=labels_of)


def _vertical(m: Modules, labels_of: str | None) -> SplitGraph:
    bottoms = {"a": m["bottom of a"], "b": m["bottom of b"]}
    return top.vertical(bottoms, m["top"], sum_of_cross_entropies, labels_of=labels_of)


def _extended(m: Modules, labels_of: str | None) -> SplitGraph:
    bottoms = {"a": m["bottom of a"], "b": m["bottom of b"]}
    return top.extended(bottoms, m["middle"], m["top"], sum_of_cross_entropies, labels_of=labels_of)


def _chain(m: Modules, parties: list[str], labels_of: str | None) -> SplitGraph:
    return top.chain(list(m.values()), sum_of_cross_entropies, parties=parties, labels_of=labels_of)


def _in_double(case: Case) -> Case:
    doubled = {name: copy.deepcopy(module).double() for name, module in case.modules.items()}
    data = {name: t.double() if t.is_floating_point() else t for name, t in case.data.items()}
    return replace(case, modules=doubled, data=data)
