"""How a walk begins at a party, the driver or another: checked, recorded, and only then computed."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from accountants import Composed, Event
from dpdl.errors import BudgetExceededError, ChannelError, StepError
from dpdl.split.client_run import Client
from dpdl.split.door import ReleaseDoor
from dpdl.split.flow import Address, Flow
from dpdl.split.party import Party
from dpdl.split.walk import Peers, Walk

__all__ = ["PROBE_ROWS", "begin_walk"]

PROBE_ROWS = 4
_PROBE_DATA_SEED = 7


def begin_walk(
    party: Party,
    client: Client,
    address: Address,
    peers: Peers,
    *,
    row_numbers: Tensor | None = None,
    given: Mapping[str, Tensor] | None = None,
    weights: Tensor | None = None,
    exchanged: int = -1,
    brought: Mapping[str, Tensor] | None = None,
    sender: str = "",
) -> Walk:
    """A walk at its beginning. A training step is recorded as spent here.

    Args:
        party: whose side.
        client: whose records.
        address: which walk.
        peers: whom to ask.
        row_numbers: of the records, in the data of all who have some.
        given: data in place of this party's own, by column.
        weights: of the step before, to be passed on.
        exchanged: in a probe, the row that is another than in the probe before; -1 for none.
        brought: what comes with the first request, to be looked at before anything is recorded.
        sender: who brings it.

    Raises:
        ChannelError: what is brought is not waited for, does not fit, or a row is in the batch twice.
        PlanExhaustedError, BudgetExceededError: the step is not within the plan and all budgets, the door's too.
        DataError: the rows are not there. In all cases nothing was recorded.
    """
    position = None
    if address.kind == "train":
        client.run.refuse_overspending()
        _refuse_a_spent_door(party)
        if row_numbers is not None:
            _refuse_rows_twice(party.name, row_numbers)
    columns = _data(party, address, row_numbers, given, exchanged)
    sums = client.clipped_parts()
    flow = Flow(
        kit=party.kit,
        address=address,
        columns=columns,
        row_numbers=None if given is not None else row_numbers,
        on_gradients=sums.add if address.kind == "train" else _ignore,
    )
    flow.refuse(brought or {}, sender=sender)
    flow.refuse_own_labels()
    if address.kind == "train":
        for part in party.trained_parts:
            party.trainable(part)  # or is refused
        position = client.run.next_step()
    return Walk(
        party=party,
        client=client,
        address=address,
        flow=flow,
        sums=sums,
        position=position,
        peers=peers,
        row_numbers=row_numbers,
        weights=weights,
        exchanged=exchanged,
    )


def _data(
    party: Party, address: Address, row_numbers: Tensor | None, given: Mapping[str, Tensor] | None, exchanged: int
) -> dict[str, Tensor]:
    wanted = party.owns_columns(labels=address.kind != "infer")
    if not wanted:
        return {}
    if given is not None:
        return {name: given[name] for name in wanted}
    assert party.columns is not None
    if address.kind == "probe":
        pair = address.number - (exchanged >= 0)  # all parties know it: the same rows twice, and others in the next
        rows = party.columns.made_up(
            PROBE_ROWS, seed=_PROBE_DATA_SEED + pair, exchanged=None if exchanged < 0 else exchanged
        )
    elif row_numbers is None:
        raise StepError(
            f"'{party.name}' has the columns {list(wanted)} and was not told which rows to take. Ask by row numbers "
            "that all parties share."
        )
    else:
        rows = party.columns.rows(row_numbers)
    return {name: rows[name] for name in wanted}


def _refuse_a_spent_door(party: Party) -> None:
    """Raise unless the door can release the rows of another batch, whichever they are: a step is not spent for none.

    The worst row is counted on, as if it were in every batch: who is in one must not decide.
    """
    door = party.kit.outlet
    if not isinstance(door, ReleaseDoor):
        return
    cuts = [cut for cut in party.graph.cuts if cut.kind == "activations"]
    due: list[Event] = []
    if door.activations is not None and door.activations.mode == "per_step":
        due += [door.activations.event] * len({cut.name for cut in cuts if cut.sender == party.name})
    if door.gradients is not None:
        due += [door.gradients.event] * len({cut.name for cut in cuts if cut.receiver == party.name and cut.returns})
    if due and door.training.event is not None:
        due += [door.training.event] * len({cut.sender if cut.receiver == party.name else cut.receiver for cut in cuts})
    if due and not door.ledger.fits(Composed(tuple(due)), label="rows of one more batch", run="batches to come"):
        raise BudgetExceededError(
            f"The door of '{party.name}' has no budget left for the rows of another batch: the step is not begun. "
            "Give its ledger a larger budget, or end the run here."
        )


def _refuse_rows_twice(party: str, numbers: Tensor) -> None:
    """The noise is for one clipped gradient of a record; a record that is there k times would move the sum by k."""
    if numbers.ndim != 1 or numbers.dtype != torch.int64 or len(numbers.unique()) != len(numbers):
        raise ChannelError(
            f"'{party}' was told the rows of a step as {numbers.dtype} of shape {tuple(numbers.shape)}. They are whole "
            "numbers, and each record is in a batch at most once."
        )


def _ignore(part: str, piece: object) -> None:
    """What a probe's gradients are good for."""
