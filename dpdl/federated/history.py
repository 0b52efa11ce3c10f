"""What happened in a federated run, round by round: who answered, who refused and why, how good, at what cost.

The history is what the server's operator sees. Where the server's claim rests on the secrecy of who took part
(client-level privacy amplified by sampling clients), names, counts, and clients' epsilons, which grow when they take
part, are not covered by it. `History.public()` leaves them out, and is what may be published.

Evaluations are whatever the caller computed; on data of the clients they would be releases of their own.
"""

from __future__ import annotations

import csv
import io
import json
import math
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

from dpdl.errors import CheckpointError

__all__ = ["History", "RoundRecord"]

_SCHEMA = "dpdl.federated.history/1"
NO_PARTICIPATION = (
    "names, counts and clients' epsilons are left out: the server's claim rests on their being secret",
    "seconds are left out for the same reason",
)


@dataclass(frozen=True, kw_only=True)
class RoundRecord:
    """One round.

    Attributes:
        round: its number, from 1.
        chosen: who was asked; empty in a public history, as the next three.
        answered: whose update came.
        refused: whose update did not count, by reason: their own ("budget", "request", "failed"), or the server's
            ("not finite", "malformed", "lost").
        client_epsilon: upper bound on what each client that was asked so far has spent, at the history's delta;
            infinite for one without a guarantee. None if it was not looked at after this round.
        server_epsilon: upper bound on what the server's noise guarantees, after this round. None without such noise, or
            if it was not looked at.
        evaluation: numbers by name; None if the model was not evaluated after this round.
        seconds: from opening the round to closing it, without the evaluation; None in a public history.
    """

    round: int
    chosen: tuple[str, ...] = ()
    answered: tuple[str, ...] = ()
    refused: Mapping[str, tuple[str, ...]] = field(default_factory=dict)
    client_epsilon: Mapping[str, float] | None = None
    server_epsilon: float | None = None
    evaluation: Mapping[str, float] | None = None
    seconds: float | None = None

    @property
    def largest_epsilon(self) -> float | None:
        """The most that any client has spent; None if it was not looked at, or nobody was asked."""
        return max(self.client_epsilon.values()) if self.client_epsilon else None


@dataclass(frozen=True, kw_only=True)
class History:
    """All rounds of a run; `to_csv`, `to_json` and `from_json` keep it, `public` leaves out what may not be published.

    Epsilons are upper bounds, and grow from round to round: each is of everything that its ledger held by then, not of
    one round.

    Attributes:
        delta: of every epsilon, in (0, 1).
        rounds: in order.
        secret_participation: whether the server's claim rests on nobody knowing who took part.
        notes: what a reader should know.
    """

    delta: float
    rounds: tuple[RoundRecord, ...] = ()
    secret_participation: bool = False
    notes: tuple[str, ...] = ()

    @property
    def last_evaluation(self) -> Mapping[str, float] | None:
        """The latest there is."""
        return next((r.evaluation for r in reversed(self.rounds) if r.evaluation is not None), None)

    @property
    def refusals(self) -> dict[str, int]:
        """How often each reason was given, over all rounds."""
        counts: dict[str, int] = {}
        for record in self.rounds:
            for reason, names in record.refused.items():
                counts[reason] = counts.get(reason, 0) + len(names)
        return counts

    def of_client(self, name: str) -> list[tuple[int, float]]:
        """What the client of that name had spent: (round, epsilon) wherever it was looked at."""
        looked = [(r.round, r.client_epsilon) for r in self.rounds if r.client_epsilon is not None]
        return [(number, epsilons[name]) for number, epsilons in looked if name in epsilons]

    def followed_by(self, later: History, *, played: int, spent: Mapping[str, float]) -> History:
        """One history of a run that was stopped and resumed.

        Args:
            later: what happened after it was resumed.
            played: how many rounds there were before that.
            spent: by name, what the clients of this history had spent when it was; it stands in later rounds until they
                are asked again.

        Returns:
            All rounds that are told of, and a note that names those between them that are not.
        """
        rounds = tuple(
            record
            if record.client_epsilon is None
            else replace(record, client_epsilon={**spent, **record.client_epsilon})
            for record in later.rounds
        )
        before = self.rounds[-1].round if self.rounds else 0
        untold = range(before + 1, played + 1)
        notes = [*self.notes, *later.notes]
        if untold:
            which = f"Round {untold[0]} was" if len(untold) == 1 else f"Rounds {untold[0]} to {untold[-1]} were"
            notes.append(f"{which} played in a process that broke off: who took part is not known here")
        return replace(later, rounds=(*self.rounds, *rounds), notes=tuple(dict.fromkeys(notes)))

    def public(self) -> History:
        """What may be published with the model. The history itself, unless participation is secret."""
        if not self.secret_participation:
            return self
        rounds = tuple(
            RoundRecord(round=r.round, server_epsilon=r.server_epsilon, evaluation=r.evaluation) for r in self.rounds
        )
        return replace(self, rounds=rounds, notes=(*self.notes, *NO_PARTICIPATION))

    def to_dict(self) -> dict[str, Any]:
        """Plain values; of a number that JSON lacks, its name: "inf" of an infinite epsilon."""
        rounds = []
        for record in self.rounds:
            values = asdict(record)
            values["chosen"], values["answered"] = list(record.chosen), list(record.answered)
            values["refused"] = {reason: list(names) for reason, names in record.refused.items()}
            values["server_epsilon"] = _finite(record.server_epsilon)
            for numbers in ("client_epsilon", "evaluation"):
                if values[numbers] is not None:
                    values[numbers] = {name: _finite(value) for name, value in values[numbers].items()}
            rounds.append(values)
        return {
            "schema": _SCHEMA,
            "delta": self.delta,
            "secret_participation": self.secret_participation,
            "notes": list(self.notes),
            "rounds": rounds,
        }

    def to_json(self) -> str:
        """The history as JSON, with its schema."""
        return json.dumps(self.to_dict(), indent=2)

    @classmethod
    def from_json(cls, text: str) -> History:
        """The history that `to_json` wrote.

        Raises:
            CheckpointError: it is something else.
        """
        try:
            values = json.loads(text)
            if values["schema"] != _SCHEMA:
                raise CheckpointError(f"not a federated history of schema {_SCHEMA}: got {values['schema']!r}.")
            return cls(
                delta=values["delta"],
                rounds=tuple(_record(record) for record in values["rounds"]),
                secret_participation=values["secret_participation"],
                notes=tuple(values["notes"]),
            )
        except (KeyError, TypeError, ValueError, AttributeError) as error:
            raise CheckpointError(f"not a federated history of schema {_SCHEMA}: {error!r}.") from error

    def to_csv(self) -> str:
        """One row a round: counts, evaluations, the server's epsilon, then one column for each client's epsilon.

        Empty where something was not looked at.
        """
        metrics = _in_order(name for r in self.rounds for name in r.evaluation or ())
        reasons = _in_order(reason for r in self.rounds for reason in r.refused)
        clients = _in_order(name for r in self.rounds for name in r.client_epsilon or ())
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        counted = ["chosen", "answered", *(f"refused: {reason}" for reason in reasons)]
        spent = ["server epsilon", *(f"epsilon: {name}" for name in clients)]
        writer.writerow(["round", *counted, *metrics, *spent, "seconds"])
        for r in self.rounds:
            evaluation, epsilons = r.evaluation or {}, r.client_epsilon or {}
            counts: list[object] = [len(r.chosen), len(r.answered)]
            counts += [len(r.refused.get(reason, ())) for reason in reasons]
            if r.seconds is None:  # a public history
                counts = [""] * len(counts)
            evaluated = [evaluation.get(name, "") for name in metrics]
            epsilon = ["" if r.server_epsilon is None else r.server_epsilon, *(epsilons.get(n, "") for n in clients)]
            writer.writerow([r.round, *counts, *evaluated, *epsilon, "" if r.seconds is None else f"{r.seconds:.3f}"])
        return text.getvalue()


def _record(values: Mapping[str, Any]) -> RoundRecord:
    epsilons, evaluation = values["client_epsilon"], values["evaluation"]
    return RoundRecord(
        round=values["round"],
        chosen=tuple(values["chosen"]),
        answered=tuple(values["answered"]),
        refused={reason: tuple(names) for reason, names in values["refused"].items()},
        client_epsilon=None if epsilons is None else {name: float(value) for name, value in epsilons.items()},
        evaluation=None if evaluation is None else {name: float(value) for name, value in evaluation.items()},
        server_epsilon=None if values["server_epsilon"] is None else float(values["server_epsilon"]),
        seconds=values["seconds"],
    )


def _finite(value: float | None) -> float | str | None:
    return value if value is None or math.isfinite(value) else str(value)


def _in_order(names: Iterable[str]) -> list[str]:
    """Each name once, in the order in which they first stand."""
    return list(dict.fromkeys(names))
