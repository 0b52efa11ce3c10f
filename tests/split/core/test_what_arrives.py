"""What other parties send is looked at before a step is spent for it: rows, labels, row numbers, norms, probes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from dpdl.errors import ChannelError, DataError, ParameterError
from dpdl.split.channel import Handler, Packet
from dpdl.split.clip import JointClip, PartClip
from dpdl.split.columns import Columns
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.graph import Head
from dpdl.split.row_loss import RowLoss
from dpdl.split.session import SplitRun
from tests.split.core.networks import ROWS, cases, sum_of_cross_entropies
from tests.split.core.runs import Mechanism, plan_of, run_of

TOPOLOGIES = {case.name: case for case in cases()}
Change = Callable[[Packet], Packet]


class Meddling:
    """Channels whose answers to training steps are changed on the way."""

    change: Change | None = None

    def connect(self, handler: Handler) -> DirectChannel:
        def changed(packet: Packet) -> Packet:
            reply = handler(packet)
            return self.change(reply) if self.change is not None and packet.kind.startswith("step") else reply

        return DirectChannel(changed)


def ask(run: SplitRun, server: str, step: int, tensors: dict[str, Tensor], **more: Any) -> Packet:
    header = {
        "session": run.client.session,
        "step": step,
        "client": run.client.name,
        "sender": run.client.party.name,
        **more.pop("header", {}),
    }
    return run.servers[server].handle(Packet(kind=more.pop("kind", "step"), header=header, tensors=tensors))


@pytest.mark.parametrize(
    "rows",
    [torch.full((500,), 7), torch.tensor([3, 4, 3]), torch.tensor([1.0, 2.0]), torch.tensor([[1, 2]])],
    ids=["one record 500 times", "twice", "no whole numbers", "two axes"],
)
def test_a_record_is_in_a_batch_once_whoever_asks(rows: Tensor, monkeypatch: pytest.MonkeyPatch) -> None:
    mechanism = Mechanism().use(monkeypatch)
    released: list[Any] = []
    run = run_of(TOPOLOGIES["vertical"].fresh(), plan_of(noise_multiplier=1.0), release={"b": released.append})
    run.client.get_ready()
    b = run.servers["b"].party.client(run.client.name)
    with pytest.raises(ChannelError, match="at most once"):
        ask(run, "b", 0, {"rows": rows})
    assert b.run.steps_taken == 0
    assert released == []
    assert not mechanism.sums


GOOD = {"z/bottom": torch.zeros(3, 5, dtype=torch.float64), "y/y": torch.tensor([0, 1, 2])}


@pytest.mark.parametrize(
    "change",
    [
        {"z/bottom": torch.zeros(3, 9, dtype=torch.float64)},
        {"z/bottom": torch.zeros(3, 5)},
        {"z/bottom": torch.zeros(3, dtype=torch.float64)},
        {"y/y": torch.tensor([0, 1, 99])},
        {"y/y": torch.zeros(3)},
        {"y/y": torch.zeros(3, 7, dtype=torch.int64)},
    ],
    ids=["width", "dtype", "one axis", "class out of range", "labels that are no classes", "labels of two axes"],
)
def test_rows_and_labels_that_do_not_fit_cost_no_step_and_no_speed(change: dict[str, Tensor]) -> None:
    run = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=1.0))
    run.client.get_ready()
    server = run.servers["server"]
    fast = server.party.kit.losses["loss"]._vectorised
    with pytest.raises(ChannelError):
        ask(run, "server", 0, {**GOOD, **change})
    assert server.party.clients[0].run.steps_taken == 0
    assert server.party.kit.losses["loss"]._vectorised is fast is True
    assert ask(run, "server", 0, GOOD).header["done"]


def test_a_step_before_any_probe_is_refused() -> None:
    run = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of(noise_multiplier=1.0))
    run.client._greet()
    with pytest.raises(ChannelError, match="Probe first"):
        ask(run, "server", 0, GOOD)
    assert run.servers["server"].party.clients[0].run.steps_taken == 0


def test_own_labels_that_do_not_fit_are_named_before_the_step() -> None:
    case = TOPOLOGIES["u-shaped"].fresh()
    labels = torch.full((ROWS,), 7)
    run = run_of(case, plan_of(noise_multiplier=1.0, sample_rate=1.0, expected_batch_size=60))
    run.client.party.columns = Columns({"x": case.data["x"], "y": labels})
    with pytest.raises(DataError, match="loss of head"):
        run.step()
    assert run.steps_taken == 0


@pytest.mark.parametrize("exchanged", [10, -7, True, 4, "1"])
def test_a_probe_exchanges_a_row_that_there_is(exchanged: Any) -> None:
    run = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of())
    run.client.get_ready()
    with pytest.raises(ChannelError, match="exchanged row"):
        ask(run, "server", 9, {"z/bottom": torch.zeros(4, 5)}, kind="probe", header={"exchanged": exchanged})


@pytest.mark.parametrize(
    "change",
    [lambda t: t.repeat(1, 2), lambda t: t.float(), lambda t: t[:, 0], lambda t: t[:-1]],
    ids=["width", "dtype", "axes", "rows"],
)
def test_activations_of_a_server_that_do_not_fit_are_refused_by_name(change: Callable[[Tensor], Tensor]) -> None:
    line = Meddling()
    run = run_of(TOPOLOGIES["u-shaped"].fresh(), plan_of(), connect=line.connect)
    run.client.get_ready()
    line.change = lambda reply: Packet(
        kind=reply.kind,
        header=reply.header,
        tensors={k: change(t) if k == "z/middle" else t for k, t in reply.tensors.items()},
    )
    with pytest.raises(ChannelError, match="z/middle"):
        run.step()
    line.change = None
    run.step()


@pytest.mark.parametrize(
    "norms",
    [torch.zeros(1), torch.zeros(16, dtype=torch.int64), torch.zeros(16, 2), torch.full((60,), -1.0), None],
    ids=["short", "whole numbers", "two axes", "negative", "left out"],
)
def test_norms_that_are_no_norms_of_the_rows_are_refused(norms: Tensor | None) -> None:
    line, case = Meddling(), TOPOLOGIES["vanilla"].fresh()
    plan = plan_of(noise_multiplier=1.0, sample_rate=1.0, expected_batch_size=60)
    run = run_of(case, plan, clip=JointClip(max_grad_norm=0.7), connect=line.connect)
    run.client.get_ready()
    before = {name: p.detach().clone() for name, p in case.modules["bottom"].named_parameters()}

    def meddle(reply: Packet) -> Packet:
        tensors = {name: t for name, t in reply.tensors.items() if name != "norms"}
        header = {name: v for name, v in reply.header.items() if norms is not None or name != "normed"}
        return Packet(kind=reply.kind, header=header, tensors=tensors if norms is None else {**tensors, "norms": norms})

    line.change = meddle
    with pytest.raises(ChannelError, match="norms"):
        run.step()
    assert all(torch.equal(before[name], p) for name, p in case.modules["bottom"].named_parameters())


def test_norms_that_are_changed_after_the_run_was_made_clip_nothing_else(monkeypatch: pytest.MonkeyPatch) -> None:
    norms = {"bottom": 0.42, "top": 0.56}
    mechanism = Mechanism().use(monkeypatch)
    plan = plan_of(sample_rate=1 / 60, expected_batch_size=1)
    run = run_of(TOPOLOGIES["vanilla"].fresh(), plan, clip=PartClip(max_grad_norm=norms))
    norms["bottom"] = norms["top"] = 1000.0
    run.run(6)
    totals = [sum(float(t.square().sum()) for t in sums.values()) ** 0.5 for sums in mechanism.sums.values()]
    rows = [max(counts) for counts in mechanism.examples.values()]
    assert max(rows) > 0
    assert all(total <= 0.7 * n + 1e-9 for total, n in zip(totals, rows, strict=True))


@pytest.mark.parametrize("norm", ["a", None, {"bottom": "x", "top": 1.0}, True, float("nan")])
def test_norms_are_numbers(norm: Any) -> None:
    with pytest.raises(ParameterError, match="max_grad_norm"):
        PartClip(max_grad_norm=norm)
    if not isinstance(norm, dict):
        with pytest.raises(ParameterError, match="max_grad_norm"):
            JointClip(max_grad_norm=norm)


def test_one_label_that_is_out_of_range_does_not_make_a_loss_slow() -> None:
    loss = RowLoss(Head(name="h", party="p", part="top", labels="y", loss_fn=sum_of_cross_entropies))
    outputs = torch.randn(4, 3)
    with pytest.raises((IndexError, RuntimeError)):
        loss.gradients(outputs, torch.tensor([0, 1, 2, 99]))
    assert loss._vectorised is None
    loss.gradients(outputs, torch.tensor([0, 1, 2, 0]))
    assert loss._vectorised
    with pytest.raises(DataError):
        loss.refuse_labels(torch.tensor([0, 99]))
    loss.refuse_labels(torch.tensor([0, 2]))


def test_a_loss_that_cannot_be_vectorised_is_still_computed() -> None:
    def by_hand(outputs: Tensor, labels: Tensor) -> Tensor:
        weights = 1.0 if labels.tolist() else 0.0  # vmap cannot look at values
        return F.cross_entropy(outputs, labels, reduction="sum") * weights

    loss = RowLoss(Head(name="h", party="p", part="top", labels="y", loss_fn=by_hand))
    found = loss.gradients(torch.zeros(2, 3), torch.tensor([0, 1]))
    assert loss._vectorised is False
    assert nn.functional.one_hot(torch.tensor([0, 1]), 3).sub(1 / 3).neg().allclose(found, atol=1e-6)
