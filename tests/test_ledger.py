"""The ledger holds each release, in order, and reads back as it was written."""

from __future__ import annotations

import itertools
import json
import math
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from accountants import Composed, Event, Gaussian, Laplace, NeighboringRelation, PoissonSampled, PRVAccountant
from dpdl import Ledger
from dpdl.errors import CheckpointError
from tests.small_run import small_run, train_on

ADD_OR_REMOVE = NeighboringRelation.ADD_OR_REMOVE
STEP = PoissonSampled(0.1, Gaussian(1.5))


def ledger_of(*events: Event, relation: NeighboringRelation = ADD_OR_REMOVE) -> Ledger:
    ledger = Ledger(relation=relation)
    for event in events:
        ledger.record(event)
    return ledger


def test_nothing_released_costs_nothing() -> None:
    ledger = Ledger(relation=ADD_OR_REMOVE)
    assert (ledger.releases, ledger.entries, ledger.epsilon(1e-5)) == (0, (), 0.0)
    assert ledger.interval(1e-5).lower == 0.0


def test_equal_neighbours_are_counted_together_and_order_is_kept() -> None:
    other = Gaussian(3.0)
    ledger = ledger_of(STEP, STEP, other, STEP)
    assert [(entry.event, entry.count) for entry in ledger.entries] == [(STEP, 2), (other, 1), (STEP, 1)]
    assert ledger.releases == 4


def test_epsilon_is_the_accountants_of_the_composition() -> None:
    ledger = ledger_of(*[STEP] * 5, Gaussian(3.0))
    expected = PRVAccountant().compose(Composed([STEP * 5, Gaussian(3.0)]))
    assert ledger.epsilon(1e-5) == expected.epsilon(1e-5)
    assert ledger.interval(1e-5).lower <= ledger.epsilon(1e-5)


def test_epsilon_never_falls() -> None:
    ledger, spent = ledger_of(), [0.0]
    for _ in range(6):
        ledger.record(STEP)
        spent.append(ledger.epsilon(1e-5))
    assert all(a < b for a, b in itertools.pairwise(spent))


def test_a_release_without_noise_is_infinite_whatever_else_there_was() -> None:
    assert ledger_of(STEP, PoissonSampled(0.1, Gaussian(0.0)), STEP).epsilon(1e-5) == math.inf


@given(
    events=st.lists(
        st.one_of(
            st.builds(Gaussian, st.floats(0.0, 100.0)),
            st.builds(Laplace, st.floats(0.01, 100.0)),
            st.builds(lambda q, s: PoissonSampled(q, Gaussian(s)), st.floats(0.0, 1.0), st.floats(0.1, 100.0)),
        ),
        max_size=8,
    ),
    relation=st.sampled_from(NeighboringRelation),
)
@settings(max_examples=80, deadline=None, derandomize=True)
def test_json_gives_the_same_ledger_again(events: list[Event], relation: NeighboringRelation) -> None:
    written = ledger_of(*events, relation=relation)
    read = Ledger.from_json(written.to_json())
    assert (read.entries, read.relation, read.releases) == (written.entries, relation, len(events))
    assert read.to_json() == written.to_json()
    read.record(STEP)
    assert written.releases == len(events)


def as_json(**changes: Any) -> str:
    return json.dumps({**json.loads(ledger_of(STEP, STEP).to_json()), **changes})


def entry(**changes: Any) -> list[dict[str, Any]]:
    return [{**json.loads(as_json())["entries"][0], **changes}]


@pytest.mark.parametrize(
    "text",
    [
        "",
        "not json",
        "[]",
        "3",
        "null",
        '"text"',
        "{}",
        None,
        7,
        as_json(schema="dpdl.ledger/2"),
        as_json(schema="dpdl.ledger/4"),
        as_json(relation="nearby"),
        as_json(relation=None),
        as_json(entries=None),
        as_json(entries=5),
        as_json(entries=[3]),
        as_json(entries=["text"]),
        as_json(entries=[{}]),
        as_json(entries=entry(count=0)),
        as_json(entries=entry(count=-2)),
        as_json(entries=entry(count=1.5)),
        as_json(entries=entry(count=True)),
        as_json(entries=entry(count="2")),
        as_json(entries=entry(event=None)),
        as_json(entries=entry(event={"schema_version": 1, "event": {"kind": "unheard of"}})),
        as_json(entries=entry(event={"schema_version": 1, "event": {"kind": "gaussian", "noise_multiplier": -1}})),
        as_json()[:-5],
    ],
)
def test_what_is_not_a_ledger_is_refused(text: Any) -> None:
    with pytest.raises(CheckpointError, match=r"[Ll]edger"):
        Ledger.from_json(text)


def test_a_run_records_its_step_before_the_weights_move() -> None:
    """Whatever breaks afterwards, nothing released is unaccounted for."""
    private = small_run(noise_multiplier=1.0)
    seen: list[int] = []

    def broken_step(*_: Any) -> None:
        seen.append(private.optimizer.ledger.releases)
        raise RuntimeError("power cut")

    private.optimizer.inner.register_step_pre_hook(broken_step)
    with pytest.raises(RuntimeError, match="power cut"):
        train_on(private, next(iter(private.loader)))
    assert seen == [1]
    assert private.optimizer.ledger.releases == 1


def test_a_run_records_the_plans_event_once_for_each_logical_batch() -> None:
    private = small_run(noise_multiplier=2.0, batch_size=6, steps=4, max_physical_batch_size=2)
    for _ in range(2):
        for batch in private.loader:
            train_on(private, batch)
    (entry,) = private.optimizer.ledger.entries
    assert entry.event * entry.count == PoissonSampled(0.5, Gaussian(2.0)) * 4
    assert private.optimizer.ledger.event == Composed([private.optimizer.plan.event()])
    assert private.optimizer.ledger.relation is ADD_OR_REMOVE
