"""A history says what happened, goes to JSON and back, and has a form without what must stay secret."""

from __future__ import annotations

import csv
import json
import math

import pytest

from dpdl.errors import CheckpointError
from dpdl.federated.history import History, RoundRecord

FIRST = RoundRecord(
    round=1,
    chosen=("a", "b", "c"),
    answered=("a",),
    refused={"budget": ("b",), "lost": ("c",)},
    client_epsilon={"a": 0.5, "b": 1.0, "c": math.inf},
    server_epsilon=0.25,
    evaluation={"accuracy": 0.5, "loss": math.nan},
    seconds=0.125,
)
SECOND = RoundRecord(round=2, chosen=("a",), answered=("a",), seconds=0.25)
THIRD = RoundRecord(
    round=3,
    chosen=("b",),
    refused={"budget": ("b",)},
    client_epsilon={"a": 0.75, "b": 1.0, "c": math.inf},
    server_epsilon=math.inf,
    evaluation={"accuracy": 0.75},
    seconds=0.5,
)
HISTORY = History(delta=1e-5, rounds=(FIRST, SECOND, THIRD), secret_participation=True, notes=("a note",))


def test_what_it_sums_up() -> None:
    assert HISTORY.refusals == {"budget": 2, "lost": 1}
    assert HISTORY.last_evaluation == {"accuracy": 0.75}
    assert HISTORY.of_client("a") == [(1, 0.5), (3, 0.75)]
    assert HISTORY.of_client("nobody") == []
    assert FIRST.largest_epsilon == math.inf
    assert SECOND.largest_epsilon is None


def test_json_is_standard_and_reads_back() -> None:
    text = HISTORY.to_json()
    plain = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert plain["rounds"][0]["client_epsilon"]["c"] == "inf"
    again = History.from_json(text)
    assert again.to_json() == text
    assert again.rounds[1:] == HISTORY.rounds[1:]
    assert math.isnan(again.rounds[0].evaluation["loss"])


@pytest.mark.parametrize(
    "text", ["", "[]", "{}", '{"schema": "other"}', '{"schema": "dpdl.federated.history/1", "rounds": [{}]}']
)
def test_something_else_is_refused(text: str) -> None:
    with pytest.raises(CheckpointError):
        History.from_json(text)


def test_csv_has_a_row_a_round_and_a_column_a_client() -> None:
    rows = list(csv.DictReader(HISTORY.to_csv().splitlines()))
    assert [row["round"] for row in rows] == ["1", "2", "3"]
    assert rows[0]["chosen"] == "3"
    assert rows[0]["answered"] == "1"
    assert rows[0]["refused: lost"] == "1"
    assert rows[2]["refused: lost"] == "0"
    assert rows[2]["epsilon: a"] == "0.75"
    assert rows[1]["epsilon: a"] == rows[1]["accuracy"] == rows[1]["server epsilon"] == ""
    assert rows[2]["server epsilon"] == "inf"


def test_the_public_form_tells_nothing_of_participation() -> None:
    public = HISTORY.public()
    assert [r.evaluation for r in public.rounds] == [r.evaluation for r in HISTORY.rounds]
    assert [r.server_epsilon for r in public.rounds] == [0.25, None, math.inf]
    assert any("left out" in note for note in public.notes)
    for name in ("chosen", "answered", "refused", "client_epsilon", "seconds"):
        assert not any(getattr(record, name) for record in public.rounds), name

    def others(answered: tuple[str, ...], seconds: float) -> History:
        rounds = [
            RoundRecord(
                round=r.round,
                answered=answered,
                chosen=answered,
                server_epsilon=r.server_epsilon,
                evaluation=r.evaluation,
                client_epsilon=dict.fromkeys(answered, 2.0),
                seconds=seconds,
            )
            for r in HISTORY.rounds
        ]
        return History(delta=1e-5, rounds=tuple(rounds), secret_participation=True, notes=("a note",))

    assert next(csv.DictReader(public.to_csv().splitlines()))["chosen"] == ""  # unknown, not nobody
    other = others(("x", "y"), 9.0).public()
    assert other.to_csv() == public.to_csv()
    assert other.to_json() == public.to_json()


def test_without_a_secret_the_public_form_is_the_history() -> None:
    open_history = History(delta=1e-5, rounds=(FIRST,))
    assert open_history.public() is open_history
