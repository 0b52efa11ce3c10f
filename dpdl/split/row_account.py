"""How often each row has been released, and what the most released one has spent.

    account = RowAccount(ledger=ledger, run="seen by the server", training=PartTraining.private(noise_multiplier=2.0))
    account.spend("activations", release.event, ids, step=7, branch=stream.name)        # before they leave

Neighbouring datasets differ in what one row holds. Its releases are its own; other rows' releases depend on it through
the weights alone. So the claim is that of the row released most often, and the ledger gets one more entry whenever some
row is released more often than any was before. Rows that nobody can name may all be one record's, and count so; but
in a training step, which has no row twice, one of them. Which rows are drawn is taken as seen: no amplification by
sampling.

Counts start at zero in a new process while the ledger goes on: the sum over processes of their worst rows, which is not
less than the worst row's sum.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Hashable, Sequence

from torch import Tensor

from accountants import Composed, Event, Interval, NeighboringRelation, PRVAccountant
from dpdl.errors import ParameterError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.process_lock import ProcessLock
from dpdl.split.part_training import PartTraining
from dpdl.split.row_id import RowId, row_ids

__all__ = ["RowAccount"]

_TRAINING = "steps of the part"
_ANYONE = ""  # no row's name: what may have been any row's release


class RowAccount:
    """What one receiver has been given of each row.

    Args:
        ledger: where the worst row's releases are recorded, under REPLACE_ONE, before they leave.
        run: the releases' name in it, one for each receiver.
        training: of the parts that come before these releases, on this side.

    Guarantee:
        `epsilon` is an upper bound on what the receiver learns of any one row, also of the one released most often.

    Raises:
        ParameterError: the ledger's relation is another: a row that is missing would be missed by whoever receives it.
    """

    def __init__(self, *, ledger: Ledger | LedgerFile, run: str, training: PartTraining) -> None:
        if ledger.relation is not NeighboringRelation.REPLACE_ONE:
            raise ParameterError(
                f"Rows at the cut are accounted for {NeighboringRelation.REPLACE_ONE.phrase}, but the ledger is for "
                f"{ledger.relation.phrase}: whoever receives rows sees which are there. Keep them in a ledger of "
                "their own, with relation='replace_one'."
            )
        if not run:
            raise ParameterError("run must name who receives the rows, for example 'seen by the server'; got ''.")
        self.ledger = ledger
        self.run = run
        self.training = training
        self._lock = ProcessLock()
        self._counts: dict[str, Counter[RowId]] = {}
        self._worst: dict[str, int] = {}
        self._last_step: dict[RowId, Hashable] = {}

    def spend(
        self,
        kind: str,
        event: Event,
        ids: Sequence[object] | Tensor | None,
        *,
        rows: int | None = None,
        step: Hashable | None,
        branch: str,
    ) -> None:
        """Count a release of these rows, which must not have left yet.

        Args:
            kind: what is released, for example "activations". Always the same event.
            event: one release of one row.
            ids: the rows' n names; one that is there twice is released twice. None if nobody knows which they
                are: then all of them may be one row's, or in a training step one of them.
            rows: how many there are; needed if `ids` is None.
            step: of the training. A row takes part in the part's own step once, however much of it is released then.
                None if no step of the part follows (inference).
            branch: the name of the stream that draws the noise.

        Raises:
            BudgetExceededError: it would overspend the ledger's budget. Nothing is counted.
            ParameterError: a step of a trained part has a row twice: one record would move it by more than one clipped
                gradient.
        """
        if ids is None and rows is None:
            raise ParameterError(f"{kind} without names: say how many rows there are, since all may be one record's.")
        unnamed = min(rows or 0, 1) if step is not None else rows or 0
        released: Counter[RowId] = Counter({_ANYONE: unnamed}) if ids is None else Counter(row_ids(ids))
        if self.training.trained and step is not None and max(released.values(), default=0) > 1:
            raise ParameterError(
                f"A training step has a row more than once in {kind}: one record would move the "
                "part by several clipped gradients, where its noise is for one. Draw each row at most once a step."
            )
        with self._lock:
            if kind == _TRAINING:
                raise ParameterError(f"kind {kind!r} is the account's own. Name the release.")
            rise = self._rise(kind, released)
            due = [event] if rise == 1 else [event * rise] if rise else []
            moved: Counter[RowId] = Counter()
            if (stepped := self.training.event) is not None and step is not None:
                moved = Counter([row for row in released if self._last_step.get(row) != step])
                if self._rise(_TRAINING, moved):
                    due.append(stepped)
            if due:
                whole = due[0] if len(due) == 1 else Composed(tuple(due))
                self.ledger.record(whole, label=kind, run=self.run, branch=branch)
            self._count(kind, released)
            self._count(_TRAINING, moved)
            self._last_step |= dict.fromkeys(moved, step)

    def spend_once(self, kind: str, event: Event, *, store: str) -> None:
        """Count one release of every row that `store`, which never draws twice, will ever hold; again is no more.

        Args:
            kind: as in `spend`.
            event: one release of one row.
            store: what keeps them, by a name of its own.

        Raises:
            BudgetExceededError: it would overspend the ledger's budget.
            ParameterError: the part is trained: rows do not stay what they were.
        """
        if self.training.trained:
            raise ParameterError(
                "Rows are released once from a part that is frozen; this one is "
                f"{self.training}. Freeze it (PartTraining.frozen()), or release at each step."
            )
        self.ledger.record(event, label=kind, run=self.run, branch=store, number=0)

    def _rise(self, kind: str, more: Counter[RowId]) -> int:
        """By how much the worst row's count goes up."""
        known = self._counts.get(kind, Counter())
        top = max((known[row] + n for row, n in more.items() if row != _ANYONE), default=0)
        worst = max(self._worst.get(kind, 0), top) + known[_ANYONE] + more[_ANYONE]
        return worst - self.most(kind)

    def _count(self, kind: str, more: Counter[RowId]) -> None:
        counts = self._counts.setdefault(kind, Counter())
        counts.update(more)
        top = max((counts[row] for row in more if row != _ANYONE), default=0)
        self._worst[kind] = max(self._worst.get(kind, 0), top)

    @property
    def kinds(self) -> tuple[str, ...]:
        """What has been released, and taken as steps, in this process."""
        return tuple(kind for kind in self._counts if self.most(kind))

    def most(self, kind: str) -> int:
        """How often the row that was released most has been, of that kind, in this process."""
        return self._worst.get(kind, 0) + self._counts.get(kind, Counter())[_ANYONE]

    def of(self, row: object, kind: str) -> int:
        """How often `row` may have been released, of that `kind`, in this process."""
        counts = self._counts.get(kind, Counter())
        return counts[row_ids([row])[0]] + counts[_ANYONE]

    @property
    def event(self) -> Event:
        """All that the worst row has spent under this name, as the ledger has it, earlier processes' included."""
        return Composed(tuple(segment.event * segment.count for segment in self.ledger.of_run(self.run)))

    def interval(self, delta: float) -> Interval:
        """Bounds on the worst row's epsilon at `delta`."""
        return PRVAccountant(relation=NeighboringRelation.REPLACE_ONE).compose(self.event).interval(delta)

    def epsilon(self, delta: float) -> float:
        """An upper bound on the worst row's epsilon at `delta`; infinite if the part is trained without noise."""
        return self.interval(delta).upper
