"""The server of a federation: chooses clients, adds up their updates, adds noise where a plan says so, and moves on.

    plan = ClientLevelPlan(clients=100, sample_rate=0.1, rounds=50, noise_multiplier=1.0, max_update_norm=0.5)
    server = FederatedServer(model, plan=plan, ledger=LedgerFile("clients.ledger"))
    chosen = server.open_round(names)             # refused if it would overspend; nothing has happened then
    request = server.request(steps=20)            # to each of the chosen, by whatever carries it
    for answer in answers:
        server.add(answer)                        # as they come: added up, not kept
    summary = server.close_round()                # recorded, noised, released; those who did not answer count as zero

Transport is somebody else's: a loop in one process (`dpdl.federated.runner`), or Flower. Without a plan the same server
takes the plain weighted mean and guarantees nothing.

Private: every update, who was chosen, and the rounds' `private` summaries. To be published: the state, what
`RoundSummary.to_publish` has, and the claims.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, final

from torch import Tensor, nn

from accountants import arguments
from dpdl.claims import Claim
from dpdl.errors import StepError
from dpdl.federated.aggregation import ClippedUpdates, WeighedUpdates
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.client_sampling import ClientSampling, EveryClient, in_order
from dpdl.federated.global_model import GlobalModel
from dpdl.federated.messages import FitReply, FitRequest, Refusal, Scalar
from dpdl.federated.open_round import OpenRound, refuse_no_answer
from dpdl.federated.round_release import NoisyRounds
from dpdl.federated.round_summary import RoundSummary
from dpdl.federated.server_arguments import (
    SCHEMA,
    checked_state,
    refuse_contradictions,
    refuse_other_numbers,
    refuse_wrong_parts,
)
from dpdl.federated.server_claims import claims_of
from dpdl.federated.server_optimizers import FedAvg, ServerOptimizer
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.secure_random import RandomStream

__all__ = ["FederatedServer"]

_log = logging.getLogger(__name__)


@final
class FederatedServer:
    """A federation's global model, round by round.

    Args:
        state: the model, or its state by name; see `dpdl.federated.global_model` for what is averaged of it.
        sampling: who is chosen; that of the plan by default, and everybody where there is none.
        optimizer: what becomes of a mean update; plain FedAvg by default.
        plan: of client-level privacy; None for none.
        ledger: where the clients' data is accounted, if this federation is not all that is released from it or there
            is a budget. Its unit is the client. Only with a plan.
        max_weight: to which larger weights are lowered where there is no plan (a plan has its own); None for no limit.
        insecure_seed: makes draws and noise reproducible, and removable by whoever knows it: research only.
        federation: a name that tells this federation from others on the same data.
        trained: the names of the tensors that rounds change, if `state` does not tell.

    Guarantee:
        With a plan, what leaves the server (the states after each round, and `RoundSummary.to_publish`) satisfies
        `epsilon(delta)` at delta for the plan's relation, one client's whole data being the unit, against those who do
        not see updates or cohorts; the assumptions are in `claims(delta)`. Each round is in the ledger before its noise
        is drawn, and neither refusals nor lost clients change noise or denominator. Without a plan: nothing.

    Raises:
        ParameterError: arguments contradict each other, or are out of range.
        ModelError: the state has nothing to average, or tensors that nobody said what to do with.
        LedgerError: the ledger is of another relation.
        WrapError: the ledger is none, or a run's own.
    """

    def __init__(
        self,
        state: Mapping[str, Tensor] | nn.Module,
        *,
        sampling: ClientSampling | None = None,
        optimizer: ServerOptimizer | None = None,
        plan: ClientLevelPlan | None = None,
        ledger: Ledger | LedgerFile | None = None,
        max_weight: float | None = None,
        insecure_seed: int | None = None,
        federation: str = "federation",
        trained: Iterable[str] | None = None,
    ) -> None:
        refuse_wrong_parts(
            sampling=sampling, optimizer=optimizer, plan=plan, ledger=ledger, federation=federation, trained=trained
        )
        refuse_contradictions(plan=plan, sampling=sampling, ledger=ledger, max_weight=max_weight)
        self.plan = plan
        self.federation = federation
        self.optimizer = optimizer or FedAvg()
        self.sampling = sampling or (EveryClient() if plan is None else plan.client_sampling)
        self._max_weight = None if max_weight is None else float(max_weight)
        self._model = GlobalModel(state, trained=trained)
        root = RandomStream.from_os() if insecure_seed is None else RandomStream.from_insecure_seed(insecure_seed)
        self._randomness = root.child(f"server of {federation}")
        self._noisy: NoisyRounds | None = None
        if plan is not None:
            self._noisy = NoisyRounds(plan, ledger=ledger, federation=federation, randomness=self._randomness)
        self._closed = 0
        self._open: OpenRound | None = None

    # ── what there is ───────────────────────────────────────────────────────────────────────────────

    @property
    def state(self) -> dict[str, Tensor]:
        """The global model's state by name: released, and never changed in place by the server."""
        return dict(self._model.state)

    @property
    def trained(self) -> tuple[str, ...]:
        """Names of the tensors that rounds change."""
        return self._model.trained

    @property
    def excluded(self) -> tuple[str, ...]:
        """Names of those that stay as they are: buffers, whole numbers, frozen parameters."""
        return self._model.excluded

    @property
    def round(self) -> int:
        """The number of the open round; if none is open, of the last one that was closed, 0 before the first."""
        return self._closed + (self._open is not None)

    @property
    def secure(self) -> bool:
        """Whether draws and noise come from a key that nobody knows."""
        return self._randomness.secure if self._noisy is None else self._noisy.run.secure

    @property
    def ledger(self) -> Ledger | None:
        """This federation's releases, within the ledger that was given; None without a plan."""
        return None if self._noisy is None else self._noisy.ledger

    @property
    def max_update_norm(self) -> float | None:
        """The norm that clips the open round, or the next one; None without a plan."""
        return None if self._noisy is None else self._noisy.max_update_norm

    def epsilon(self, delta: float) -> float:
        """An upper bound at `delta` on what the rounds so far have spent; infinite without a plan.

        The unit is one client.
        """
        delta = arguments.delta(delta)
        return math.inf if self._noisy is None else self._noisy.ledger.epsilon(delta)

    def claims(self, delta: float) -> tuple[Claim, ...]:
        """What the server's noise promises of one client: to the server, to other clients, to model consumers.

        Args:
            delta: in (0, 1), at which epsilon is said.
        """
        return claims_of(
            self.plan,
            self.ledger,
            delta=arguments.delta(delta),
            coordinates=self._model.coordinates,
            secure=self.secure,
        )

    # ── a round ─────────────────────────────────────────────────────────────────────────────────────

    def open_round(self, names: Sequence[str]) -> tuple[str, ...]:
        """Choose the clients of the next round.

        Args:
            names: of the clients that are available.

        Returns:
            The chosen ones, possibly none: such a round is a release too. **Private** where the claim is amplified.

        Raises:
            StepError: a round is open.
            PlanExhaustedError: the plan's rounds are all taken.
            BudgetExceededError: the round would overspend.
            ParameterError: there are more clients than planned, or too few for the cohort.
        """
        if self._open is not None:
            raise StepError(
                f"Round {self.round} is open. Close it with close_round(answers): clients without an answer count as "
                "lost. If it was broken off, abandon_round() takes it back."
            )
        names = in_order(names)
        if self._noisy is None:
            chosen = self.sampling.select(names, self._closed, self._randomness.child("sampling"))
        else:
            refuse_other_numbers(self._noisy.plan, len(names))
            chosen = self.sampling.select(names, self._noisy.run.position, self._noisy.run.sampling)
            self._noisy.refuse_overspending()
        self._open = OpenRound(self._closed + 1, chosen, self._new_sum())
        return chosen

    def request(self, *, steps: int | None = None, config: Mapping[str, Scalar] | None = None) -> FitRequest:
        """What to send to the clients of the open round, in tensors of its own.

        Args:
            steps: local steps; None leaves them to the clients.
            config: further settings for the clients.

        Raises:
            StepError: no round is open.
            ParameterError: steps is no positive whole number.
        """
        self._opened("request")
        if steps is not None:
            steps = arguments.positive_whole("steps", steps, remedy="Give local steps, or None.")
        return FitRequest(
            round=self.round,
            state=self._model.copy(),
            steps=steps,
            federation=self.federation,
            config=dict(config or {}),
        )

    def add(self, answer: FitReply | Refusal) -> str:
        """Take one answer into the open round. Each chosen client's first one counts; nothing of it is kept.

        Returns:
            What became of it: "accepted", "not finite", "malformed", a refusal's reason, or, of answers that were not
            looked at, "duplicate", "not chosen", "another round". Private.

        Raises:
            StepError: no round is open.
            ParameterError: it is no answer.
        """
        return self._opened("add").add(answer)

    def close_round(self, answers: Iterable[FitReply | Refusal] = ()) -> RoundSummary:
        """Take the last answers, record the round, add noise, divide, and move the global model.

        Chosen clients without an answer count as lost. Neither they nor refusals change the noise or the denominator.

        Raises:
            StepError: no round is open.
            ParameterError: an answer is none; no answer was added.
            BudgetExceededError: another run has spent what this round needs since it was opened. It stays open.
            LedgerError: the ledger's file was damaged. The round stays open.
        """
        opened = self._opened("close_round")
        listed = list(answers)
        for answer in listed:
            refuse_no_answer(answer)
        while listed:
            opened.add(listed.pop(0))  # what nobody else holds is freed as it goes
        if isinstance(opened.updates, ClippedUpdates):
            assert self._noisy is not None
            released = self._release(self._noisy, opened.updates)
        else:
            released = {}
            self._open = None
            if (mean := opened.updates.mean()) is not None:
                self._model.replaced(self.optimizer.step(self._model.state, mean))
        self._closed += 1
        summary = RoundSummary(round=self._closed, private=opened.private(), **released)
        if summary.private.problem:
            _log.warning("round %d: an update counts as zero: %s", self._closed, summary.private.problem)
        return summary

    def abandon_round(self) -> None:
        """Take the open round back: nothing was released. The next one has its number, and chooses the same clients.

        Raises:
            StepError: no round is open.
        """
        self._opened("abandon_round")
        self._open = None

    def _release(self, noisy: NoisyRounds, updates: ClippedUpdates) -> dict[str, Any]:
        """From the sum to the next state; what may be published of it."""
        position = noisy.record()
        self._open = None  # whatever fails from here on, this sum gets no other noise
        norm = noisy.max_update_norm
        clipped = updates.total()
        std = noisy.plan.update_noise_multiplier * clipped.sensitivity
        mean = noisy.mean_update(clipped, position=position)
        fraction = noisy.adapt(updates.centred_bits, position=position)
        self._model.replaced(self.optimizer.step(self._model.state, mean))
        return {
            "max_update_norm": norm,
            "noise_std": std,
            "denominator": noisy.plan.denominator,
            "next_max_update_norm": noisy.max_update_norm,
            "unclipped_fraction": fraction,
        }

    def _new_sum(self) -> ClippedUpdates | WeighedUpdates:
        if self._noisy is None:
            return WeighedUpdates(self._model, max_weight=self._max_weight)
        plan = self._noisy.plan
        quantile = 0.5 if plan.adaptive_clipping is None else plan.adaptive_clipping.quantile
        return ClippedUpdates(
            self._model,
            max_update_norm=self._noisy.max_update_norm,
            max_weight=plan.max_weight,
            quantile=quantile,
        )

    def _opened(self, call: str) -> OpenRound:
        if self._open is None:
            raise StepError(f"{call}: no round is open. Call open_round(names) first.")
        return self._open

    # ── saving and resuming ─────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """Plain values and tensors: closed rounds only. An open one has released nothing, and is opened anew.

        No key is among them: a secure server goes on with a fresh one.
        """
        return {
            "schema": SCHEMA,
            "federation": self.federation,
            "round": self._closed,
            "state": self._model.copy(),
            "optimizer": self.optimizer.state_dict(),
            "private": None if self._noisy is None else self._noisy.state_dict(),
            "randomness": None if self._noisy is not None else self._randomness.state_dict(),
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, in a server that was made with the same arguments.

        Whatever the saved state, this server and the ledger know to be released stays counted. Rounds after the saved
        one are new releases; with an insecure seed, too, if the ledger has any that the saved state has not.

        Raises:
            StepError: a round is open.
            CheckpointError: it was saved by another federation, under another plan, budget or ledger, or is damaged.
                This server is left as it was.
        """
        if self._open is not None:
            raise StepError(f"Round {self.round} is open. Close or abandon it before loading a state.")
        saved = checked_state(state, federation=self.federation, private=self._noisy is not None)
        tensors = self._model.refuse_unlike(saved["state"])
        self.optimizer.refuse_unfit(saved["optimizer"], tensors)
        if self._noisy is None:
            self._randomness = RandomStream.from_state_dict(saved["randomness"])
        else:
            self._noisy.become(self._noisy.saved(saved["private"]))
        self.optimizer.load_state_dict(saved["optimizer"])
        self._model.state = tensors
        self._closed = saved["round"]

    def __repr__(self) -> str:
        plan = "no client-level privacy" if self.plan is None else str(self.plan)
        return f"FederatedServer({self.federation!r}, round {self.round}; {plan})"
