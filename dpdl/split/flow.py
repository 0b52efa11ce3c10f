"""One walk of rows through one party's parts: what can be computed is, what crosses a cut waits to be sent.

A walk is a training step, a probe or an inference. A party's flow holds what has arrived; `advance` computes every part
and head whose inputs are there, and goes back through every part whose output's gradient is complete. It knows the
graph and nothing of topologies: vanilla is a flow whose only cut is crossed once in each direction.

Names of tensors on the way: "z/<part>" outputs, "d/<part>" their gradients, "y/<column>" labels.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Literal

import torch
from torch import Tensor

from dpdl.errors import ChannelError, DataError
from dpdl.per_sample.engine import PerSampleGradients
from dpdl.split.graph import Head, Part, SplitGraph
from dpdl.split.outlet import Departed, Leaving, Outlet
from dpdl.split.part_run import PartPass, PartRunner
from dpdl.split.row_loss import RowLoss

__all__ = ["Address", "Flow", "Kit", "WalkKind"]

WalkKind = Literal["train", "probe", "infer"]
OnGradients = Callable[[str, PerSampleGradients], None]


@dataclass(frozen=True, kw_only=True)
class Address:
    """Which walk of which session, and what it is.

    Attributes:
        kind: training, a probe with made-up rows, or inference.
        session: of the driver.
        number: within the session and kind.
    """

    kind: WalkKind
    session: str
    number: int


@dataclass(frozen=True, kw_only=True)
class Kit:
    """What a party computes with, walk after walk.

    Attributes:
        graph: all of it.
        party: whose kit it is.
        runners: of its parts, by name.
        losses: of its heads, by name.
        trainable: the parameters of a part that are trained, as of now.
        outlet: the door.
        proven: by part or column, rows' shapes and dtypes with which a probe went through this party.
    """

    graph: SplitGraph
    party: str
    runners: Mapping[str, PartRunner]
    losses: Mapping[str, RowLoss]
    trainable: Callable[[str], Mapping[str, Tensor]]
    outlet: Outlet
    proven: dict[str, set[tuple[torch.Size, torch.dtype]]] = field(default_factory=dict)


@dataclass(kw_only=True)
class _Waiting:
    """The gradient of a part's output, until everybody who uses it has added to it."""

    missing: set[str]
    total: Tensor | None = None

    def add(self, source: str, gradient: Tensor) -> None:
        self.missing.remove(source)
        self.total = gradient if self.total is None else self.total + gradient.to(self.total.device)


@dataclass(kw_only=True)
class Flow:
    """One party's share of one walk.

    Args:
        kit: what to compute with.
        address: which walk.
        columns: this party's data in it, by column; empty where it has none.
        row_numbers: of that data; None where made up, or given from outside.
        on_gradients: is shown the per-sample gradients of each part that trains, in pieces.
    """

    kit: Kit
    address: Address
    columns: Mapping[str, Tensor]
    row_numbers: Tensor | None
    on_gradients: OnGradients
    outbox: dict[str, dict[str, Tensor]] = field(default_factory=dict)  # by receiver
    received: dict[str, Tensor] = field(default_factory=dict)  # gradients from other parties, by part
    size: int | None = None

    def __post_init__(self) -> None:
        graph, party = self.kit.graph, self.kit.party
        self._values: dict[str, Tensor] = {}
        self._passes: dict[str, PartPass] = {}
        self._sent: dict[str, Departed] = {}
        own_heads = [head for head in graph.heads if head.party == party]
        self._parts_left = [part for part in graph.order if part.party == party]
        self._heads_left: list[Head] = own_heads if self.address.kind != "infer" else []
        self._gradients: dict[str, _Waiting] = {}
        if self.address.kind != "infer":
            self._gradients = {name: _Waiting(missing=users) for name, users in self._users().items()}
        for name, rows in self.columns.items():
            self._count(name, rows)
            self._values[name] = rows
        self._labels_left = list(self.columns) if self.address.kind != "infer" else []

    def _users(self) -> dict[str, set[str]]:
        """For each output whose gradient passes here, who adds to it: own parts and heads, and other parties."""
        graph, party = self.kit.graph, self.kit.party
        uses = [(part.party, part.name, name) for part in graph.order for name in part.inputs]
        uses += [(head.party, head.name, head.part) for head in graph.heads]
        users: dict[str, set[str]] = {}
        for user, node, name in uses:
            if name not in graph.gets_gradient:
                continue
            if user == party:
                users.setdefault(name, set()).add(node)
            elif graph.part(name).party == party:
                users.setdefault(name, set()).add(f"party {user}")
        return users

    @property
    def finished(self) -> bool:
        """Whether nothing is left to be computed here."""
        return not (self._parts_left or self._heads_left or self._gradients)

    @property
    def outputs(self) -> dict[str, Tensor]:
        """What has been computed or has arrived, by part."""
        return {name: value for name, value in self._values.items() if name not in self.columns}

    # ── from other parties ──────────────────────────────────────────────────────────────────────────

    def refuse(self, tensors: Mapping[str, Tensor], *, sender: str) -> None:
        """Raise unless these may come from that party, now.

        Raises:
            ChannelError: they may not; nothing was taken.
        """
        size = self.size
        for key, rows in tensors.items():
            what, _, name = key.partition("/")
            if not self._expects(what, name, sender):
                raise ChannelError(f"'{sender}' sent '{key}' to '{self.kit.party}', which does not wait for it.")
            if rows.ndim == 0 or (size is not None and len(rows) != size):
                raise ChannelError(
                    f"'{sender}' sent '{key}' of shape {tuple(rows.shape)}, but this batch has {size} rows. All that "
                    "crosses a cut in a step has the same rows."
                )
            size = len(rows)
            if what == "d" and (rows.shape != self._values[name].shape or rows.dtype != self._values[name].dtype):
                raise ChannelError(
                    f"'{sender}' sent a gradient of shape {tuple(rows.shape)} and {rows.dtype} for the output of part "
                    f"'{name}', which has {tuple(self._values[name].shape)} and {self._values[name].dtype}."
                )
            if what == "z" and not rows.is_floating_point():
                raise ChannelError(f"'{sender}' sent '{key}' in {rows.dtype}; activations are floating point numbers.")
            if what != "d" and (
                self.address.kind == "train" or (self.address.kind == "infer" and name in self.kit.proven)
            ):
                self._refuse_unproven(key, name, rows, sender=sender)

    def _refuse_unproven(self, key: str, name: str, rows: Tensor, *, sender: str) -> None:
        """What does not fit is refused before the step is spent, not by a part in the middle of it."""
        proven = self.kit.proven.get(name, set())
        labels = key.startswith("y/")
        if not any(rows.shape[1:] == shape and (labels or rows.dtype == dtype) for shape, dtype in proven):
            known = ", ".join(f"{tuple(shape)} of {dtype}" for shape, dtype in proven) or "none yet"
            raise ChannelError(
                f"'{sender}' sent '{key}' with rows of shape {tuple(rows.shape[1:])} of {rows.dtype}; a probe has gone "
                f"through '{self.kit.party}' with {known}. Probe first, with rows like those of the training."
            )
        for head in self._heads_left:
            if labels and head.labels == name:
                try:
                    self.kit.losses[head.name].refuse_labels(rows)
                except DataError as error:
                    raise ChannelError(f"'{sender}' sent '{key}': {error}") from error

    def refuse_own_labels(self) -> None:
        """Raise unless the losses here can be computed from this party's own labels.

        Raises:
            DataError: they cannot.
        """
        for head in self._heads_left:
            if self.address.kind == "train" and head.labels in self.columns:
                self.kit.losses[head.name].refuse_labels(self.columns[head.labels])

    def accept(self, tensors: Mapping[str, Tensor], *, sender: str) -> None:
        """Take what another party has sent, which `refuse` let pass."""
        for key, rows in tensors.items():
            what, _, name = key.partition("/")
            self.size = len(rows)
            if what == "d":
                sent = self._sent[name]
                self.received[name] = self.received[name] + rows if name in self.received else rows
                gradient = rows if sent.pull_back is None else sent.pull_back(rows)
                self._gradients[name].add(f"party {sender}", gradient)
            else:
                self._values[name] = rows

    def _expects(self, what: str, name: str, sender: str) -> bool:
        if what == "d":
            waiting = self._gradients.get(name)
            return waiting is not None and name in self._sent and f"party {sender}" in waiting.missing
        kind = {"z": "activations", "y": "labels"}.get(what)
        party = self.kit.party
        known = any((c.name, c.kind, c.sender, c.receiver) == (name, kind, sender, party) for c in self.kit.graph.cuts)
        return known and name not in self._values and not (what == "y" and self.address.kind == "infer")

    # ── computing ───────────────────────────────────────────────────────────────────────────────────

    def advance(self) -> None:
        """Compute all that can be computed from what is here."""
        while self._labels_left:
            self._send_labels(self._labels_left.pop(0))
        while self._forward_one() or self._judge_one() or self._back_one():
            pass
        if self.address.kind == "probe" and self.finished:
            for name, rows in self._values.items():
                self.kit.proven.setdefault(name, set()).add((rows.shape[1:], rows.dtype))

    def _forward_one(self) -> bool:
        for part in self._parts_left:
            if all(name in self._values for name in part.inputs):
                self._parts_left.remove(part)
                self._values[part.name] = self._forward(part)
                self._send_outputs(part)
                return True
        return False

    def _forward(self, part: Part) -> Tensor:
        runner, graph = self.kit.runners[part.name], self.kit.graph
        inputs = [self._values[name] for name in part.inputs]
        if self.address.kind == "infer":
            return runner.predict(inputs)
        needed = [name in graph.gets_gradient for name in part.inputs]
        trainable = self.kit.trainable(part.name) if part.trains else {}
        done = runner.forward(inputs, trainable, needed=needed, made_up=self.address.kind == "probe")
        if part.name in self._gradients:
            self._passes[part.name] = done
        return done.outputs

    def _judge_one(self) -> bool:
        for head in self._heads_left:
            if head.part in self._values and head.labels in self._values:
                self._heads_left.remove(head)
                made_up = self.address.kind == "probe"
                outputs, labels = self._values[head.part], self._values[head.labels]
                rows = self.kit.losses[head.name].gradients(outputs, labels, made_up=made_up)
                if head.part in self._gradients:
                    self._gradients[head.part].add(head.name, rows)
                return True
        return False

    def _back_one(self) -> bool:
        for name, waiting in self._gradients.items():
            if not waiting.missing:
                del self._gradients[name]
                assert waiting.total is not None
                self._back(self.kit.graph.part(name), waiting.total)
                return True
        return False

    def _back(self, part: Part, gradient: Tensor) -> None:
        """The gradient of a part's output is complete: through the part, or to whom it belongs."""
        if part.party != self.kit.party:
            self._leave(f"d/{part.name}", "gradients", part.name, gradient, (part.party,))
            return
        done = self._passes.pop(part.name)
        inputs = done.back(gradient)
        if part.trains:
            done.visit(lambda piece: self.on_gradients(part.name, piece))
        found: dict[str, Tensor] = {}
        for name, rows in zip(part.inputs, inputs, strict=True):
            if rows is not None:
                found[name] = found[name] + rows if name in found else rows
        for name, rows in found.items():
            self._gradients[name].add(part.name, rows)

    # ── to other parties ────────────────────────────────────────────────────────────────────────────

    def _send_outputs(self, part: Part) -> None:
        cuts = [cut for cut in self.kit.graph.cuts if cut.name == part.name]
        if self.address.kind == "infer":
            used = {node.party for node in self.kit.graph.parts if part.name in node.inputs}
            cuts = [cut for cut in cuts if cut.receiver in used]
        if cuts:
            receivers = tuple(cut.receiver for cut in cuts)
            rows = self._values[part.name]
            self._sent[part.name] = self._leave(f"z/{part.name}", "activations", part.name, rows, receivers)

    def _send_labels(self, name: str) -> None:
        receivers = tuple(cut.receiver for cut in self.kit.graph.cuts if (cut.kind, cut.name) == ("labels", name))
        if receivers:
            self._leave(f"y/{name}", "labels", name, self.columns[name], receivers)

    def _leave(
        self,
        key: str,
        content: Literal["activations", "gradients", "labels", "predictions"],
        name: str,
        rows: Tensor,
        receivers: tuple[str, ...],
    ) -> Departed:
        departed = Departed(rows=rows.detach())
        if self.address.kind != "probe":
            departed = self.kit.outlet(
                Leaving(
                    content=content,
                    name=name,
                    sender=self.kit.party,
                    receivers=receivers,
                    rows=rows.detach(),
                    row_numbers=self.row_numbers,
                    purpose="train" if self.address.kind == "train" else "infer",
                    step=self.address.number,
                    session=self.address.session,
                )
            )
        for receiver in receivers:
            self.outbox.setdefault(receiver, {})[key] = departed.rows
        return departed

    def predictions(self, receiver: str) -> dict[str, Tensor]:
        """What this party's heads' parts say, for whoever asked; released like all that leaves."""
        found = {}
        for head in self.kit.graph.heads:
            if self.kit.graph.part(head.part).party == self.kit.party and head.part in self._values:
                rows = self._values[head.part]
                if receiver != self.kit.party:
                    self._leave(f"p/{head.name}", "predictions", head.part, rows, (receiver,))
                    rows = self.outbox[receiver].pop(f"p/{head.name}")
                found[head.name] = rows
        return found

    def _count(self, name: str, rows: Tensor) -> None:
        if self.size is not None and len(rows) != self.size:
            raise ChannelError(f"Column '{name}' has {len(rows)} rows in a batch of {self.size}.")
        self.size = len(rows)
