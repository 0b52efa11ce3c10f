"""Labels that are answered at random, once for ever: epsilon does not grow with epochs.

    plan = MemoizedRandomizedResponse(epsilon=2.0, classes=10, path="labels.store")
    labels = LabelStore(plan, stream=stream, ledger=ledger, run="labels seen by the server")
    sent = labels.release(ids, y)

Randomised response [1]: with probability p = k / (e^epsilon + k - 1) a class drawn uniformly, else the true one; two
true labels make any answer at most e^epsilon times likelier [2, section 2]. A row's answer is drawn when it is first
asked for, and kept (`dpdl.split.draw_once`): averaging over epochs, retries or restarts finds nothing to average.

Whoever holds labels releases them through here, whether the same party has features or not. What is computed from the
answers alone, by anybody, is covered too: losses, gradients, models.

Private: true labels, and the file as a whole. Public: answers, once they are sent.

References:
    [1] Warner, Randomized Response: A Survey Technique for Eliminating Evasive Answer Bias, 1965.
    [2] Ghazi et al., Deep Learning with Label Differential Privacy, 2021. arXiv:2102.06062
"""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from accountants import Event, NeighboringRelation, RandomizedResponse, arguments
from dpdl.errors import DataError, ParameterError
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.secure_random import RandomStream
from dpdl.split.draw_once import DrawOnce

__all__ = ["AnsweredLabels", "LabelStore", "MemoizedRandomizedResponse"]

_WORDS = 2**64
_LABEL_BYTES = 8
# p is made larger by this part of itself, so that float64's roundings, in it and in what is drawn by whole numbers of
# 2^-64, stay below the epsilon that was asked for.
_MARGIN = 2.0**-40
_LARGEST_EPSILON = 30.0  # beyond, less than one label in 10^12 is drawn, and the margin above would no longer do


@dataclass(frozen=True, kw_only=True)
class MemoizedRandomizedResponse:
    """How labels leave: one random answer a row, for ever.

    Attributes:
        epsilon: of one row's label, whatever becomes of the answer; in (0, 30].
        classes: k, at least 2.
        path: where answers are kept, made if there is nothing; None for memory, where they last as long as the process.

    Guarantee:
        epsilon-differentially private for the label of one row, whatever is computed from the answers and how often.

    Raises:
        ParameterError: a value is out of range.

    References:
        Warner, 1965; Ghazi et al., 2021. arXiv:2102.06062, section 2 (the module has both). Answers kept for ever:
        Erlingsson, Pihur, Korolova, RAPPOR, 2014. arXiv:1407.6981
    """

    epsilon: float
    classes: int
    path: str | os.PathLike[str] | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "epsilon", arguments.epsilon(self.epsilon))
        if not 0 < self.epsilon <= _LARGEST_EPSILON:
            raise ParameterError(
                f"epsilon of labels must be in (0, {_LARGEST_EPSILON:g}], got {self.epsilon!r}. At 0 labels say "
                "nothing: leave them out. Beyond, they are as good as in clear: send them so, and the report says it."
            )
        remedy = "Count the categories that can be answered."
        object.__setattr__(self, "classes", arguments.whole("classes", self.classes, remedy=remedy))
        if self.classes < 2:
            raise ParameterError(f"classes must be >= 2, got {self.classes}. {remedy}")

    @property
    def p(self) -> float:
        """Probability of a uniform answer."""
        return min(1.0, self.classes / (math.expm1(self.epsilon) + self.classes) * (1 + _MARGIN))

    @property
    def event(self) -> Event:
        """All that is ever released of one row's label, under REPLACE_ONE."""
        return RandomizedResponse(self.p, self.classes)

    def __str__(self) -> str:
        return f"labels answered at random once a row, {self.classes} classes, label epsilon {self.epsilon:g}"


@dataclass(frozen=True, kw_only=True)
class AnsweredLabels(MemoizedRandomizedResponse):
    """The mechanism, where a record's labels were answered more than once: several columns, or several stores.

    Attributes:
        spent: all answers about one record, as the ledger has them.
    """

    spent: Event

    @property
    def event(self) -> Event:
        """All that was ever released of one record's labels, under REPLACE_ONE."""
        return self.spent

    def __str__(self) -> str:
        return (
            f"labels answered at random once a row and store, {self.classes} classes, label epsilon {self.epsilon:g} "
            "each; several columns or stores have answered"
        )


class LabelStore:
    """The answers that were drawn.

    Args:
        plan: the mechanism, and where they are kept.
        stream: of this store alone.
        ledger: where the one release is recorded before the first answer leaves, under REPLACE_ONE; None if the epsilon
            of labels is kept nowhere else.
        run: the release's name in it, for who gets the answers.

    Guarantee:
        That of `MemoizedRandomizedResponse`, once in the ledger. A store that is lost draws anew: another release.

    Raises:
        CheckpointError: the file is damaged, or was drawn by another mechanism.
        ParameterError: the ledger is of another relation.
    """

    def __init__(
        self,
        plan: MemoizedRandomizedResponse,
        *,
        stream: RandomStream,
        ledger: Ledger | LedgerFile | None = None,
        run: str = "labels",
    ) -> None:
        if ledger is not None and ledger.relation is not NeighboringRelation.REPLACE_ONE:
            raise ParameterError(
                f"Labels are accounted for replacing one, but the ledger is for {ledger.relation.phrase}: whoever "
                "gets answers sees whose are there. Keep them in a ledger with relation='replace_one'."
            )
        self.plan = plan
        self._stream = stream
        self._ledger = ledger
        self._run = run
        settings: dict[str, str | int | float] = {"epsilon": plan.epsilon, "classes": plan.classes}
        self._store = DrawOnce(plan.path, kind="labels", settings=settings)

    def release(self, ids: Sequence[object] | Tensor, labels: Tensor) -> Tensor:
        """The rows' answers, drawn now where there is none.

        Args:
            ids: n names, which stay with the records.
            labels: true classes, shape [n], whole numbers in [0, classes).

        Returns:
            Answers, shape [n], int64, on the device of `labels`.

        Raises:
            DataError: labels are not such numbers; none is drawn. The error does not show which.
            BudgetExceededError: the one release would overspend.
            CheckpointError: the file is damaged or cannot be written.
        """
        if labels.ndim != 1 or labels.dtype.is_floating_point or labels.dtype.is_complex or len(labels) != len(ids):
            raise DataError(
                f"Labels to be answered at random are whole numbers, one for each of the {len(ids)} names, got "
                f"{labels.dtype} of shape {tuple(labels.shape)}. Real or one-hot targets have no such mechanism here."
            )
        true: list[int] = labels.to(torch.int64).tolist()
        if not all(0 <= label < self.plan.classes for label in true):
            raise DataError(
                f"There are labels outside of [0, {self.plan.classes}). Give as many classes as there can be, and "
                "leave out rows that have no label."
            )
        if true and self._ledger is not None:
            self._ledger.record(self.plan.event, label="labels, once", run=self._run, branch=self._store.id, number=0)
        values = self._store.get(
            ids, None, draw=lambda places, number: self._drawn([true[place] for place in places], number)
        )
        answers = [int.from_bytes(value, "big") for value in values]
        return torch.tensor(answers, dtype=torch.int64, device=labels.device)

    def _drawn(self, true: list[int], number: int) -> list[bytes]:
        """Two words a label: whether to draw at all, and what."""
        words = self._stream.words(2 * len(true), message=number).tolist()
        below = math.ceil(self.plan.p * _WORDS)
        answers = [
            word * self.plan.classes // _WORDS if coin < below else label
            for label, coin, word in zip(true, words[::2], words[1::2], strict=True)
        ]
        return [answer.to_bytes(_LABEL_BYTES, "big") for answer in answers]

    @property
    def count(self) -> int:
        """How many labels have been answered."""
        return self._store.count

    def close(self) -> None:
        """Let go of the file."""
        self._store.close()
