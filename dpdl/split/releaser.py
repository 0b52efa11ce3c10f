"""Rows leave through here, and nowhere else: counted in the ledger first, then clipped and noised.

    step = RowReleaser(CutRelease(max_norm=1.0, noise_multiplier=4.0), kind="activations", account=account, stream=s)
    sent = step.release(rows, ids, number=7, step=7)

    once = CachedRelease(CutRelease(..., mode="release_once"), cache=RowCache(path), encoder=encoder, ...)
    sent = once.release(inputs, ids)

Private: rows and inputs. Public: what `release` returns, names of rows, steps.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Protocol

import torch
from torch import Tensor, nn

from accountants import Event
from dpdl.errors import CheckpointError, ParameterError, StepError
from dpdl.process_lock import ProcessLock
from dpdl.secure_random import RandomStream
from dpdl.split.cut_release import CutRelease
from dpdl.split.row_account import RowAccount
from dpdl.split.row_cache import RowCache, encoder_digest
from dpdl.split.row_noise import noised_rows, refuse_other_than_rows

__all__ = ["CachedRelease", "RowMechanism", "RowReleaser"]


class RowMechanism(Protocol):
    """`CutRelease` or `GradientRelease`: a norm, noise, and what one release of one row gives away."""

    @property
    def max_norm(self) -> float:
        """C, largest L2 norm of a row."""

    @property
    def noise_multiplier(self) -> float:
        """s, noise std over C."""

    @property
    def event(self) -> Event:
        """One release of one row, under REPLACE_ONE."""


class RowReleaser:
    """Releases rows with fresh noise, each time they are sent.

    Args:
        mechanism: how rows are clipped and noised.
        kind: what they are, for the ledger: "activations", "gradients".
        account: of who receives them.
        stream: of this releaser alone: two that share one add the same noise.

    Guarantee:
        Before rows leave, the ledger has an upper bound on what the row that left most often has spent.

    Raises:
        ParameterError: the mechanism releases rows once, which is `CachedRelease`'s.
    """

    def __init__(self, mechanism: RowMechanism, *, kind: str, account: RowAccount, stream: RandomStream) -> None:
        if isinstance(mechanism, CutRelease) and mechanism.mode != "per_step":
            raise ParameterError(
                f"mode {mechanism.mode!r} keeps rows that were released: use CachedRelease, or mode='per_step'."
            )
        self.mechanism = mechanism
        self.account = account
        self._kind = kind
        self._stream = stream
        self._lock = ProcessLock()
        self._next = 0

    def release(
        self, rows: Tensor, ids: Sequence[object] | Tensor | None, *, number: int, step: Hashable | None
    ) -> Tensor:
        """Rows as they may leave, recorded before they are made.

        Args:
            rows: shape [n, ...], one an example.
            ids: their n names, which stay with the examples; None if they are not known.
            number: of this release, counted upwards. Noise is drawn for it once: what is sent again, after a lost
                reply, is what was sent.
            step: of the training, as `RowAccount.spend` has it.

        Returns:
            Clipped and noised rows, detached, as `rows` in shape, dtype and device. Of no rows: none, and nothing is
            counted.

        Raises:
            StepError: rows were released under this number, or a later one.
            BudgetExceededError: it would overspend. Nothing is counted, and no noise drawn.
            ParameterError, ModelError: names and rows are not as many, or rows are not floating point.
        """
        with self._lock:
            if number < self._next:
                raise StepError(
                    f"{self._kind} were released under number {self._next - 1}; under {number} the same noise would be "
                    "drawn twice. Send again what was sent, or go on with the next number."
                )
            refuse_other_than_rows(rows)
            if ids is not None and len(rows) != len(ids):
                raise ParameterError(
                    f"{len(ids)} names were given for {len(rows)} rows of {self._kind}. Each row on axis 0 needs one."
                )
            if len(rows):
                self.account.spend(
                    self._kind, self.mechanism.event, ids, rows=len(rows), step=step, branch=self._stream.name
                )
            self._next = number + 1
            return noised_rows(
                rows,
                max_norm=self.mechanism.max_norm,
                noise_multiplier=self.mechanism.noise_multiplier,
                stream=self._stream,
                number=number,
            )


class CachedRelease:
    """Releases each row once, from a frozen public encoder, and what was released ever after.

    Args:
        mechanism: with mode "release_once".
        cache: where released rows are kept.
        encoder: what computes rows. Its weights must not have been trained on the private rows.
        account: of who receives them; its part is frozen.
        stream: of this release alone.

    Guarantee:
        One Gaussian release a row, however often it is asked for: the ledger has it before the first row leaves.

    Raises:
        ParameterError: the mode is another, or the part is trained.
        CheckpointError: the cache holds rows of another encoder or release.
    """

    def __init__(
        self,
        mechanism: CutRelease,
        *,
        cache: RowCache,
        encoder: nn.Module,
        account: RowAccount,
        stream: RandomStream,
    ) -> None:
        if mechanism.mode != "release_once":
            raise ParameterError(f"mode {mechanism.mode!r} noises rows at each step: use RowReleaser.")
        if account.training.trained:
            raise ParameterError(
                f"Rows are released once from a part that is frozen and public; this one is {account.training}. Give "
                "the account PartTraining.frozen(), if that is true, or release at each step."
            )
        self.mechanism = mechanism
        self.account = account
        self._encoder = encoder
        self._stream = stream
        self._digest = encoder_digest(encoder)
        self._cache = cache
        self._store = cache.belong_to(mechanism, self._digest)

    def release(self, inputs: Tensor, ids: Sequence[object] | Tensor) -> Tensor:
        """The released rows of these examples; those that have none are encoded, noised and kept, once for ever.

        Args:
            inputs: the examples, shape [n, ...].
            ids: their n names.

        Returns:
            Rows, shape [n, ...].

        Raises:
            CheckpointError: an example or the encoder has changed; the cache is damaged, or cannot be written.
            BudgetExceededError: the one release would overspend. No noise was drawn.
            ParameterError: names and examples are not as many.
        """
        if inputs.ndim == 0 or len(inputs) != len(ids):
            raise ParameterError(f"{len(ids)} names were given for inputs of shape {tuple(inputs.shape)}: one each.")
        if not len(ids):
            return self._empty(inputs)
        self.account.spend_once("activations, once", self.mechanism.event, store=self._store)

        def noised(places: list[int], number: int) -> Tensor:
            self._refuse_another_encoder()
            return noised_rows(
                self._encoded(inputs[places]),
                max_norm=self.mechanism.max_norm,
                noise_multiplier=self.mechanism.noise_multiplier,
                stream=self._stream,
                number=number,
            )

        return self._cache.get(ids, inputs, noised=noised)

    def _refuse_another_encoder(self) -> None:
        """Where a row is about to be computed; where it was released before, the encoder is not asked."""
        if encoder_digest(self._encoder) != self._digest:
            raise CheckpointError(
                "The encoder has changed since this release began. Rows of another encoder would be a second release: "
                "freeze it (requires_grad_(False), no optimizer), or begin another cache, which the ledger counts."
            )

    def _empty(self, inputs: Tensor) -> Tensor:
        with torch.no_grad():
            rows: Tensor = self._encoder(inputs)
        return rows

    def _encoded(self, inputs: Tensor) -> Tensor:
        """Each example by itself: what is kept of a row must not depend on which others it came with.

        It is done once a row, and an encoder that mixes examples cannot break the claim.
        """
        training = self._encoder.training
        self._encoder.eval()
        try:
            with torch.no_grad():
                return torch.cat([self._encoder(example[None]) for example in inputs])
        finally:
            self._encoder.train(training)
