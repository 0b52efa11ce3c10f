"""Local differential privacy of updates: a client's update is clipped, and gets its noise before it leaves.

    client = LocalUpdateDP(PlainClient(...), max_update_norm=1.0, noise_multiplier=40.0,
                           ledger=LedgerFile("ward3-updates.ledger", relation="replace_one"))

The unit is the client's whole data, and neighbours have any other data in its place: the update of one and the other,
each of norm at most S, may lie 2 S apart [1, section 3]. The noise has standard deviation noise_multiplier * S; the
relation "replace_one" of the ledger is what brings the factor of two into the accounting. Nobody has to be trusted, and
no sampling helps, because the server knows whom it has asked: every participation composes. It takes very many clients
to average that noise away.

Around a `DPClient` the reply has both guarantees: for each record by the client's ledger, for the client by this one.

References:
    [1] Duchi, Jordan, Wainwright, Local Privacy and Statistical Minimax Rates, FOCS 2013. arXiv:1302.3203
"""

from __future__ import annotations

import math
import os
from collections.abc import Callable
from typing import final

import torch
from torch import Tensor

from accountants import Gaussian, NeighboringRelation, arguments
from dpdl.claims import AdversaryReport, Claim
from dpdl.clipping import flat_weights
from dpdl.errors import ParameterError
from dpdl.federated.accountable import AccountableClient
from dpdl.federated.client_report import (
    ADVERSARIES,
    claimed,
    claims_against_all,
    of_the_budget,
    run_name,
)
from dpdl.federated.client_settings import round_stream, steps_of
from dpdl.federated.global_weights import digest_of
from dpdl.federated.inventory import Inventory, Release
from dpdl.federated.messages import Client, FitReply, FitRequest, Refusal
from dpdl.federated.refusals import refusal_of
from dpdl.federated.reply_store import ReplyStore
from dpdl.federated.round_account import RoundAccount
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.noise import gaussian_mechanism
from dpdl.process_lock import ProcessLock
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum

__all__ = ["LocalUpdateDP"]

_LABEL = "update"
_RECORD = "record"
_WITHOUT_DATA = ("budget", "request")  # reasons for which a client refuses before it looks at its data
_NOT_COVERED = (
    "that the client took part, when, and how long it took",
    "whether a round failed; one that did ends the claims of its client",
)


@final
class _Spending:
    """One update's release: claimed before the client is asked, recorded before its noise is drawn.

    Under a seed nothing else is fresh, so the key and the ledger's branch are of the update itself: were the round
    begun again on other data, it would else be another update under the same noise. What is not known yet cannot be
    claimed; that there is room for it is seen to beforehand.
    """

    def __init__(self, account: RoundAccount, event: Gaussian, run: str, randomness: RandomStream) -> None:
        self._account, self._event, self._run, self._randomness = account, event, run, randomness

    def claim(self) -> None:
        """Raise unless one more update fits into the budget."""
        if not self._randomness.secure:
            self._account.refuse_overspending(self._event, 1)
            return
        name = self._randomness.name
        self._account.claim(self._event, 1, label=_LABEL, run=self._run, branch=name, repeatable=False)

    def record(self, clipped: ClippedSum) -> RandomStream:
        """Record the update; returns the key of its noise."""
        key, number = self._randomness, None
        if not key.secure:
            key, number = key.child(f"value {digest_of(clipped.tensors)}"), 0
        self._account.within.record(self._event, label=_LABEL, run=self._run, branch=key.name, number=number)
        return key

    def spend(self) -> None:
        """Have it counted although nothing was sent: the client may have looked at its data."""
        self._account.spend(self._event, 1, label=_LABEL, run=self._run, branch=self._randomness.name)


@final
class LocalUpdateDP(AccountableClient):
    """A client whose updates are private by themselves.

    Args:
        client: who trains: a `PlainClient`, a `DPClient`, or anything that answers requests.
        max_update_norm: S, the L2 norm to which the whole update is clipped.
        noise_multiplier: z > 0, noise standard deviation over S.
        ledger: a `LedgerFile`, the path of one, or a `Ledger`, of the relation "replace_one". It is another one than a
            `DPClient`'s: its unit is the client, and it is one for all federations that the client takes part in.
        insecure_seed: makes the noise a function of (seed, name, request, update): the same update gets the same
            noise, and counts once, and another gets other noise. Research only.
        replies: as of `DPClient`: a request that comes again gets the same noisy update.
        max_failures: as of `DPClient`: a client that fails has seen its data, and that it failed is told.

    Guarantee:
        All replies together satisfy `epsilon(delta)` at delta when the client's whole data is replaced, against
        everybody. Buffers of floating point that the client sends are clipped and noised with the update; others stay
        at home, and so does the client's weight, which may be about its data: all count alike. Metrics are passed on as
        they are, and the report then has no claim against the server.

    Raises:
        ParameterError, LedgerError: arguments out of range, or a ledger of another relation.

    References:
        Duchi, Jordan, Wainwright, Local Privacy and Statistical Minimax Rates, FOCS 2013. arXiv:1302.3203
    """

    def __init__(
        self,
        client: Client,
        *,
        max_update_norm: float,
        noise_multiplier: float,
        ledger: Ledger | LedgerFile | str | os.PathLike[str],
        insecure_seed: int | None = None,
        replies: ReplyStore | str | os.PathLike[str] | None = None,
        max_failures: int = 1,
    ) -> None:
        if not isinstance(getattr(client, "name", None), str) or not callable(getattr(client, "answer", None)):
            raise ParameterError(
                f"client must be one that answers requests, got {type(client).__name__}. Give a PlainClient, a "
                "DPClient, or an object with a name and answer(request)."
            )
        self.client = client
        self._norm = _positive("max_update_norm", max_update_norm)
        self._noise_multiplier = _positive("noise_multiplier", noise_multiplier)
        self._spent = RoundAccount(ledger, relation=NeighboringRelation.REPLACE_ONE)
        if insecure_seed is not None:
            RandomStream.from_insecure_seed(insecure_seed)  # or refused
        self._seed = insecure_seed
        self._replies = replies if isinstance(replies, ReplyStore) else ReplyStore(replies)
        self._max_failures = arguments.positive_whole("max_failures", max_failures, remedy="Give 1 to stop at once.")
        self._one_at_a_time = ProcessLock()
        self._begun = False
        self._sent: dict[str, None] = dict.fromkeys(getattr(client, "metrics", ()))  # as they are

    @property
    def name(self) -> str:
        """The wrapped client's."""
        return self.client.name

    @property
    def _account(self) -> RoundAccount:
        return self._spent

    # ── rounds ──────────────────────────────────────────────────────────────────────────────────────

    def answer(self, request: FitRequest) -> FitReply | Refusal:
        """The client's answer to the request, its update made private.

        If the ledger has no room for one more update, the client is not asked: its data is not touched.
        """
        with self._one_at_a_time:
            self._begun = False
            try:
                return self._answered(request)
            except Exception as error:  # the wrapped client may raise anything, and a server has to count it
                return refusal_of(error, request, client=self.name, begun=self._begun)

    def _answered(self, request: FitRequest) -> FitReply | Refusal:
        steps_of(request, 1)  # how many is the client's business
        facts = (self.name, request.federation, request.round, request.steps, self._norm, self._noise_multiplier)
        digest = digest_of(request.state, "local update", *facts)
        answered = self._replies.find(request, digest, client=self.name)
        if answered is not None:
            return answered

        self._account.marks.refuse_to_go_on(self._max_failures)
        randomness = round_stream(self._seed, self.name, request).child(f"local update {digest}")
        run = run_name(request, digest)
        spending = _Spending(self._account, Gaussian(self._noise_multiplier), run, randomness)
        spending.claim()
        with self._account.round(run, spend=spending.spend) as mark:
            self._begun = True
            reply = self.client.answer(request)
            if isinstance(reply, Refusal):
                mark.answered = reply.reason in _WITHOUT_DATA
                if mark.answered:
                    self._account.give_back(run)
                else:
                    spending.spend()
                return reply
            private = self._private(reply, spending)
            self._replies.put(private, request, digest)
            mark.answered = True
        return private

    def _private(self, reply: FitReply, spending: _Spending) -> FitReply:
        tensors = {name: change for name, change in reply.update.items() if change.is_floating_point()}
        clipped = _clipped(tensors, self._norm)
        key = spending.record(clipped)  # before the noise is drawn
        noisy = gaussian_mechanism(clipped, noise_multiplier=self._noise_multiplier, stream=key, step=0).tensors
        mechanism = (
            f"Gaussian noise of {self._noise_multiplier:.6g} times the clipping norm {self._norm:g} of the whole update"
        )
        sent = {(kind, name) for kind in ("metric", "count") for name in reply.metrics}
        releases = []
        for release in reply.releases:
            covered = release.name in tensors and release.kind in ("parameter", "buffer")
            if covered:
                before = f", after {release.mechanism}" if release.protected else ""
                release = Release(
                    name=release.name, kind=release.kind, mechanism=f"{mechanism}{before}", shape=release.shape
                )
            if covered or (release.kind, release.name) in sent:
                releases.append(release)
        self._sent |= dict.fromkeys(reply.metrics)
        return FitReply(
            client=reply.client,
            round=reply.round,
            update={name: noisy[name].to(change.dtype) for name, change in tensors.items()},
            base=reply.base,
            tied=reply.tied,
            releases=Inventory(tuple(releases)),
            metrics=reply.metrics,
        )

    # ── what was spent ──────────────────────────────────────────────────────────────────────────────

    @property
    def unprotected(self) -> tuple[str, ...]:
        """Metrics that are sent as they are, by name."""
        return tuple(self._sent)

    def report(self, delta: float) -> AdversaryReport:
        """What is promised to the client as a whole and to each of its records, against whom.

        Args:
            delta: in (0, 1), at which epsilon is said.
        """
        spent = self.spending(delta)
        of_client = claims_against_all(
            unit="client",
            because=f"{spent.releases} updates in {self.ledger.name}, each clipped and noised before it left",
            epsilon=claimed(self.ledger, delta),
            delta=delta,
            relation="replacing the client's whole data",
            assumes=(of_the_budget(self.ledger.budget), "this ledger has all updates that were made of this data"),
            unanswered=self.unanswered,
        )
        if self._sent:
            why = f"it is sent {', '.join(self._sent)} without noise"
            of_client["server"] = Claim(against="server", unit="client", because=why)
        inner: Callable[[float], AdversaryReport] | None = getattr(self.client, "report", None)
        below = None if inner is None else inner(delta)
        claims: list[Claim] = []
        for adversary in ADVERSARIES:
            claims.append(of_client[adversary])
            if below is not None and adversary in below.adversaries:
                claims += [claim for claim in below.against(adversary) if claim.guaranteed or claim.unit == _RECORD]
        return AdversaryReport(
            title=f"Client '{self.name}', local differential privacy of updates",
            adversaries=ADVERSARIES,
            claims=tuple(claims),
            not_covered=_NOT_COVERED,
            notes=self._notes(below),
        )

    def _notes(self, below: AdversaryReport | None) -> tuple[str, ...]:
        notes = ["a client's guarantee is one for each of its records as well"]
        if self._seed is not None:
            notes.append("noise came from insecure_seed: the claims hold only against those who do not know the seed")
        if below is not None:
            notes += below.notes
        return tuple(dict.fromkeys(notes))

    def __repr__(self) -> str:
        return f"LocalUpdateDP({self.client!r}, {self.ledger!r})"


def _positive(name: str, value: float) -> float:
    checked = arguments.non_negative(name, value, remedy="Give a positive number such as 1.0.")
    if checked == 0 or math.isinf(checked):
        raise ParameterError(f"{name} must be positive and finite, got {value!r}: without it an update is not private.")
    return checked


def _clipped(tensors: dict[str, Tensor], norm: float) -> ClippedSum:
    """One update, clipped as a whole; one that is not finite counts as none."""
    wide = {name: change.detach().to("cpu", torch.float64) for name, change in tensors.items()}
    length = torch.stack([change.square().sum() for change in wide.values()] or [torch.zeros(())]).sum().sqrt()
    weight = flat_weights(length.double()[None], max_grad_norm=norm)[0]
    if not weight > 0:
        wide = {name: torch.zeros_like(change) for name, change in wide.items()}
    return ClippedSum(
        tensors={name: change * weight for name, change in wide.items()},
        sensitivity=norm,
        examples=1,
        clipped=int(weight < 1),
        non_finite=int(not math.isfinite(length.item())),
    )
