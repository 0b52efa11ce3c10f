"""All private rows leave through one door, and what the door does to them is what the other side trains on."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

from dpdl.errors import DataError, ParameterError
from dpdl.split.channel import Packet
from dpdl.split.columns import Columns
from dpdl.split.direct_channel import DirectChannel
from dpdl.split.outlet import Departed, Leaving
from tests.split.core.networks import cases
from tests.split.core.runs import Mechanism, batches, plan_of, run_of
from tests.split.core.whole_network import distance, parameters

TOPOLOGIES = {case.name: case for case in cases()}
UNASKED = {"rows", "weights", "norms"}


class Door:
    """Keeps what leaves."""

    def __init__(self) -> None:
        self.seen: list[Leaving] = []

    def __call__(self, leaving: Leaving) -> Departed:
        self.seen.append(leaving)
        return Departed(rows=leaving.rows)


@pytest.mark.parametrize("name", TOPOLOGIES)
def test_nothing_crosses_a_cut_past_the_door(name: str) -> None:
    case, door = TOPOLOGIES[name].fresh(), Door()
    crossed: list[Tensor] = []

    def connect(handler: Any) -> DirectChannel:
        def watched(packet: Packet) -> Packet:
            reply = handler(packet)
            if packet.kind.split(".")[0] in ("step", "infer"):
                for tensors in (packet.tensors, reply.tensors):
                    crossed.extend(t for key, t in tensors.items() if key not in UNASKED)
            return reply

        return DirectChannel(watched)

    run = run_of(case, plan_of(), release=door, connect=connect)
    run.run(2)
    trained = len(door.seen)
    assert crossed
    assert all(any(torch.equal(tensor, leaving.rows) for leaving in door.seen) for tensor in crossed)
    # each step: every output that crosses once, and back once from each receiver; and labels
    cuts = run.graph.cuts
    outputs = {cut.name for cut in cuts}
    assert trained == 2 * (len(outputs) + sum(cut.returns for cut in cuts))
    run.predict(rows=torch.arange(3))
    assert all(any(torch.equal(tensor, leaving.rows) for leaving in door.seen) for tensor in crossed)
    assert {leaving.purpose for leaving in door.seen[trained:]} == {"infer"}
    assert {leaving.content for leaving in door.seen[trained:]} <= {"activations", "predictions"}


def test_the_door_is_told_which_rows_leave_and_when() -> None:
    case, door = TOPOLOGIES["vanilla"].fresh(), Door()
    run = run_of(case, plan_of(), release={"client": door})
    run.run(2)
    run.predict(rows=torch.tensor([5, 9]))
    run.predict(case.data["x"][:2])
    drawn = batches(run, 2)
    found = [(s.content, s.name, s.receivers, s.purpose, s.step) for s in door.seen]
    assert found[:4] == [
        ("labels", "y", ("server",), "train", 0),
        ("activations", "bottom", ("server",), "train", 0),
        ("labels", "y", ("server",), "train", 1),
        ("activations", "bottom", ("server",), "train", 1),
    ]
    numbers = [None if s.row_numbers is None else s.row_numbers.tolist() for s in door.seen]
    assert numbers == [drawn[0], drawn[0], drawn[1], drawn[1], [5, 9], None]
    assert len({s.session for s in door.seen}) == 1


def test_gradients_come_back_through_what_the_door_has_done(monkeypatch: pytest.MonkeyPatch) -> None:
    """A door that halves rows, and says so, makes the gradients of a network with the halving inside."""
    mechanism = Mechanism().use(monkeypatch)
    halved = TOPOLOGIES["vanilla"].fresh()

    def door(leaving: Leaving) -> Departed:
        if leaving.content == "labels":
            return Departed(rows=leaving.rows)
        return Departed(rows=leaving.rows / 2, pull_back=lambda gradient: gradient / 2)

    run = run_of(halved, plan_of(max_grad_norm=1e9), rate=0.0, release={"client": door})
    run.run(1)
    rows = batches(run, 1)[0]
    named = parameters(halved)
    z = halved.modules["bottom"](halved.data["x"][rows]) / 2
    loss = torch.nn.functional.cross_entropy(halved.modules["top"](z), halved.data["y"][rows], reduction="sum")
    expected = dict(zip(named, torch.autograd.grad(loss, list(named.values())), strict=True))
    assert distance(mechanism.sums[0], expected) < 1e-12


def test_predictions_need_data_for_the_parts_and_nothing_else() -> None:
    run = run_of(TOPOLOGIES["vanilla"].fresh(), plan_of())
    with pytest.raises(ParameterError, match="either columns or rows"):
        run.predict()
    with pytest.raises(ParameterError, match="needs the columns"):
        run.predict({"z": torch.zeros(2, 4)})
    with pytest.raises(DataError, match="numbered from 0"):
        run.predict(rows=torch.tensor([60]))
    assert run.steps_taken == 0
    found = run.predict({"x": torch.zeros(0, 4, dtype=torch.float64)})
    assert found["loss"].shape == (0, 3)


def test_predictions_do_not_train_and_dropout_is_off() -> None:
    case = TOPOLOGIES["vanilla"].fresh()
    case.modules["bottom"].append(torch.nn.Dropout(0.5))  # type: ignore[operator]
    run = run_of(case, plan_of(noise_multiplier=1.0))
    x = case.data["x"][:4]
    assert torch.equal(run.predict(x)["loss"], run.predict(x)["loss"])
    assert case.modules["bottom"].training
    assert run.steps_taken == 0
    run.run(2)


def test_columns_of_a_dataset_are_those_of_its_items() -> None:
    x, y = torch.randn(7, 2), torch.arange(7)
    of_items = Columns.of_dataset(torch.utils.data.TensorDataset(x, y), names=("x", "y"))
    of_tensors = Columns({"x": x, "y": y})
    for numbers in (torch.tensor([3, 1]), torch.tensor([], dtype=torch.long)):
        for name in ("x", "y"):
            assert torch.equal(of_items.rows(numbers)[name], of_tensors.rows(numbers)[name])
    first, second = of_tensors.made_up(4, seed=1), of_tensors.made_up(4, seed=1, exchanged=2)
    for name in ("x", "y"):
        differs = (first[name] != second[name]).reshape(4, -1).any(1)
        assert differs.tolist() == [False, False, True, False]
