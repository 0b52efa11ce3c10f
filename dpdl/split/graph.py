"""Who computes what: the parts of a network, the parties that hold them, and the cuts in between.

    graph = SplitGraph(
        parts=(
            Part(name="bottom", module=bottom, party="clinic", inputs=("x",)),
            Part(name="top", module=top, party="server", inputs=("bottom",)),
        ),
        heads=(Head(name="loss", party="server", part="top", loss_fn=cross_entropy_sum, labels="y"),),
        columns={"y": "clinic"},
    )

Every topology is a value of this type (`dpdl.split.topologies`), and no other code asks which one it is. Parties
that compute together hold the same graph, each with the modules of its own parts only (`seen_by`).

Public: the whole graph.

References:
    Vepakomma, Gupta, Swedish and Raskar, Split learning for health, 2018. arXiv:1812.00564, section 2.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from functools import cached_property
from typing import Literal

from torch import Tensor, nn

from dpdl.errors import ModelError, ParameterError

__all__ = ["Cut", "Head", "LossFunction", "Part", "SplitGraph"]

LossFunction = Callable[[Tensor, Tensor], Tensor]
CutKind = Literal["activations", "labels"]


@dataclass(frozen=True, kw_only=True)
class Part:
    """A piece of the network, held by one party.

    Attributes:
        name: told from all parts, heads and columns.
        module: takes one tensor for each input, rows first, and returns one tensor, rows first. None where another
            party holds it.
        party: who computes it.
        inputs: names of data columns of the same party, or of other parts.
        trains: whether it has parameters that are trained; False makes all of them constants. None: whether the
            module has parameters that require a gradient; of another party's part, that it trains.

    Raises:
        ParameterError: the module is not one.
        ModelError: it is said to train, and has no parameter that requires a gradient.
    """

    name: str
    party: str
    inputs: tuple[str, ...]
    module: nn.Module | None = None
    trains: bool | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "inputs", (self.inputs,) if isinstance(self.inputs, str) else tuple(self.inputs))
        if self.module is not None and not isinstance(self.module, nn.Module):
            raise ParameterError(f"module of part '{self.name}' must be a Module, got {type(self.module).__name__}.")
        trainable = self.module is None or any(p.requires_grad for p in self.module.parameters())
        if self.trains and not trainable:
            raise ModelError(
                f"Part '{self.name}' has no parameter that requires a gradient, but trains=True. Unfreeze some with "
                "requires_grad_(True), or say trains=False."
            )
        object.__setattr__(self, "trains", trainable if self.trains is None else self.trains)


@dataclass(frozen=True, kw_only=True)
class Head:
    """A loss on the output of a part. Several heads are several tasks, whose losses are added up.

    Attributes:
        name: told from all parts, heads and columns.
        party: who computes it, and so sees the part's output and the labels.
        part: whose output it judges.
        labels: the column of labels.
        loss_fn: (outputs, labels) to the sum over rows of each row's own loss, or to [N] losses; None where another
            party holds it. It is only ever given one row at a time, so that rows cannot meet in it.
    """

    name: str
    party: str
    part: str
    labels: str
    loss_fn: LossFunction | None = None


@dataclass(frozen=True, kw_only=True)
class Cut:
    """What one party sends another in each step.

    Attributes:
        name: the part whose output crosses, or the column of labels.
        kind: which of the two.
        sender, receiver: parties.
        returns: whether the receiver sends gradients back.
    """

    name: str
    kind: CutKind
    sender: str
    receiver: str
    returns: bool


@dataclass(frozen=True, kw_only=True)
class SplitGraph:
    """Parts, heads, and who owns the data.

    Attributes:
        parts: in any order.
        heads: at least one.
        columns: data column to the party that owns it. By default a part's columns are its party's, and labels are
            their head's.

    Raises:
        ParameterError: names do not fit together, parts go round in a circle, a part leads to no head, or raw data
            would leave its party.
        ModelError: two parts share a module or a parameter.
    """

    parts: tuple[Part, ...]
    heads: tuple[Head, ...]
    columns: Mapping[str, str] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for name in ("parts", "heads"):
            object.__setattr__(self, name, tuple(getattr(self, name)))
        known = {part.name for part in self.parts}
        owners = {
            **{name: part.party for part in self.parts for name in part.inputs if name not in known},
            **{head.labels: head.party for head in self.heads},
            **self.columns,
        }
        object.__setattr__(self, "columns", owners)
        self.validate()

    # ── what follows from it ────────────────────────────────────────────────────────────────────────

    def part(self, name: str) -> Part:
        """The part of that name."""
        return self._by_name[name]

    @cached_property
    def _by_name(self) -> dict[str, Part]:
        return {part.name: part for part in self.parts}

    @cached_property
    def parties(self) -> tuple[str, ...]:
        """Everybody, owners of data first."""
        order = [*self.columns.values(), *(p.party for p in self.order), *(head.party for head in self.heads)]
        return tuple(dict.fromkeys(order))

    @cached_property
    def order(self) -> tuple[Part, ...]:
        """The parts, each after its inputs.

        Raises:
            ParameterError: they go round in a circle.
        """
        ordered: dict[str, Part] = {}
        left = list(self.parts)
        while left:
            ready = [p for p in left if all(i in ordered or i not in self._by_name for i in p.inputs)]
            if not ready:
                raise ParameterError(
                    f"Parts {sorted(p.name for p in left)} go round in a circle: each needs another one's output "
                    "first. Take one of the inputs out."
                )
            ordered.update((p.name, p) for p in ready)
            left = [p for p in left if p.name not in ordered]
        return tuple(ordered.values())

    @cached_property
    def trained(self) -> tuple[Part, ...]:
        """The parts that train, in order."""
        return tuple(part for part in self.order if part.trains)

    @cached_property
    def gets_gradient(self) -> frozenset[str]:
        """The parts whose output's gradient is needed: those that train, and those after them."""
        needed: set[str] = set()
        for part in self.order:
            if part.trains or needed.intersection(part.inputs):
                needed.add(part.name)
        return frozenset(needed)

    @cached_property
    def cuts(self) -> tuple[Cut, ...]:
        """Everything that crosses from party to party, once for each receiver."""
        found: dict[tuple[str, str], Cut] = {}
        for receiver, name in [
            *((part.party, name) for part in self.order for name in part.inputs if name in self._by_name),
            *((head.party, head.part) for head in self.heads),
        ]:
            sender = self._by_name[name].party
            if sender != receiver:
                returns = name in self.gets_gradient
                found[name, receiver] = Cut(
                    name=name, kind="activations", sender=sender, receiver=receiver, returns=returns
                )
        for head in self.heads:
            if (owner := self.columns[head.labels]) != head.party:
                found[head.labels, head.party] = Cut(
                    name=head.labels, kind="labels", sender=owner, receiver=head.party, returns=False
                )
        return tuple(found.values())

    def calls(self, driver: str) -> dict[str, tuple[str, ...]]:
        """Who asks whom in a run that `driver` drives: those further from it answer those nearer to it.

        Raises:
            ParameterError: no such party, or a party that no cut connects with the driver.
        """
        if driver not in self.parties:
            raise ParameterError(f"driver must be one of {list(self.parties)}, got {driver!r}.")
        neighbours = {party: dict.fromkeys(self._neighbours(party)) for party in self.parties}
        reached = [driver]
        for party in reached:  # grows while it is gone through
            reached += [other for other in neighbours[party] if other not in reached]
        if apart := [party for party in self.parties if party not in reached]:
            raise ParameterError(f"No cut connects {apart} with '{driver}'. Two runs are two graphs.")
        rank = {party: position for position, party in enumerate(reached)}
        return {p: tuple(other for other in neighbours[p] if rank[other] > rank[p]) for p in reached}

    def _neighbours(self, party: str) -> list[str]:
        return [cut.receiver if cut.sender == party else cut.sender for cut in self.cuts if party in _ends(cut)]

    def seen_by(self, party: str) -> SplitGraph:
        """The same graph as a party holds it: without the modules and losses of others."""
        return replace(
            self,
            parts=tuple(p if p.party == party else replace(p, module=None) for p in self.parts),
            heads=tuple(h if h.party == party else replace(h, loss_fn=None) for h in self.heads),
        )

    def facts(self) -> dict[str, object]:
        """All that parties must agree on, as plain values: not the modules."""
        return {
            "parts": [[p.name, p.party, list(p.inputs), p.trains] for p in self.parts],
            "heads": [[h.name, h.party, h.part, h.labels] for h in self.heads],
            "columns": dict(sorted(self.columns.items())),
        }

    # ── refusals ────────────────────────────────────────────────────────────────────────────────────

    def validate(self) -> None:
        """Raise if this is not a network that can be trained; a graph that was made is one.

        Raises:
            ParameterError: names, parties or inputs do not make a network, or raw data would leave its owner.
            ModelError: no part trains, or two parts share a module or a parameter.
        """
        self._refuse_names()
        self._refuse_unknown()
        self._refuse_raw_data_that_leaves()
        self._refuse_dead_ends()
        self._refuse_sharing()

    def _refuse_names(self) -> None:
        if not self.heads:
            raise ParameterError("The graph has no head, so nothing says what to train for. Give at least one Head.")
        names = [p.name for p in self.parts] + [h.name for h in self.heads] + list(self.columns)
        for name in names:
            if not isinstance(name, str) or not name or "/" in name:
                raise ParameterError(f"A part, head or column needs a name without '/', got {name!r}.")
            if names.count(name) > 1:
                raise ParameterError(f"'{name}' names two parts, heads or columns. Give each a name of its own.")
        nodes: list[Part | Head] = [*self.parts, *self.heads]
        for node in nodes:
            if not isinstance(node.party, str) or not node.party:
                raise ParameterError(f"party of '{node.name}' must be a name, got {node.party!r}.")

    def _refuse_unknown(self) -> None:
        for part in self.parts:
            if not part.inputs:
                raise ParameterError(f"Part '{part.name}' has no inputs. Name data columns or other parts.")
        for head in self.heads:
            if head.part not in self._by_name:
                raise ParameterError(f"Head '{head.name}' judges part '{head.part}', which is not in the graph.")
            if head.labels in self._by_name:
                raise ParameterError(f"labels of head '{head.name}' are part '{head.labels}'; name a data column.")
        used = {name for part in self.parts for name in part.inputs} | {head.labels for head in self.heads}
        if unused := sorted(set(self.columns) - used):
            raise ParameterError(f"columns {unused} feed no part and no head. Leave them out.")

    def _refuse_raw_data_that_leaves(self) -> None:
        for part in self.parts:
            for name in part.inputs:
                if name not in self._by_name and self.columns[name] != part.party:
                    raise ParameterError(
                        f"Part '{part.name}' of '{part.party}' reads column '{name}' of '{self.columns[name]}': raw "
                        f"data would leave its owner. Put a part of '{self.columns[name]}' in between."
                    )

    def _refuse_dead_ends(self) -> None:
        useful = {head.part for head in self.heads}
        for part in reversed(self.order):
            if part.name in useful:
                useful.update(part.inputs)
        if dead := [part.name for part in self.parts if part.name not in useful]:
            raise ParameterError(f"Parts {dead} lead to no head, so no loss reaches them. Leave them out.")
        if not self.trained:
            raise ModelError("No part of the graph trains. Unfreeze parameters with requires_grad_(True).")

    def _refuse_sharing(self) -> None:
        owner: dict[int, str] = {}
        for part in self.parts:
            for path, child in [] if part.module is None else part.module.named_modules():
                for tensor in (*child.parameters(recurse=False), *child.buffers(recurse=False)):
                    if owner.setdefault(id(tensor), part.name) != part.name:
                        raise ModelError(
                            f"Parts '{owner[id(tensor)]}' and '{part.name}' share a tensor of module '{path}'; each "
                            "part clips, noises and trains its own parameters. Use copy.deepcopy, or one part."
                        )


def _ends(cut: Cut) -> tuple[str, str]:
    return cut.sender, cut.receiver
