"""A client that trains with differential privacy, and keeps account of it over all rounds it ever takes part in.

    client = DPClient("ward 3", model, dataset, F.cross_entropy, optimizer=partial(SGD, lr=0.1), batch_size=32,
                      noise_multiplier=1.0, max_grad_norm=1.0, steps=20,
                      ledger=LedgerFile("ward3.ledger", budget=Budget(epsilon=3.0, delta=1e-5)))
    answer = client.answer(request)          # a FitReply, or a Refusal

    request ─▶ fits the model? ─▶ answered before? ─▶ fits the budget? ─▶ recorded, marked ─▶ trained ─▶ stored ─▶ reply
                 no: refused,       yes: the same       no: refused, data
                 nothing spent      bytes again         not touched

What ends in between leaves its mark: see `dpdl.federated.unanswered`.

Private: the dataset. Public: how many records it has, all settings, the request, and whatever is in a reply with a
mechanism (`FitReply.releases`). The ledger belongs to the data, not to a federation: clients over the same records,
in whatever federation, share one file.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any, final

from torch import Tensor, nn
from torch.utils.data import Dataset

from accountants import NeighboringRelation, arguments
from dpdl.claims import AdversaryReport, Claim
from dpdl.errors import ModelError, ParameterError, StepError
from dpdl.execution import Execution
from dpdl.federated.accountable import AccountableClient
from dpdl.federated.client_report import (
    ADVERSARIES,
    NOT_COVERED,
    claimed,
    claims_against_all,
    of_the_budget,
    run_name,
)
from dpdl.federated.client_settings import (
    EXAMPLES,
    MAX_STEPS,
    checked_flag,
    checked_metrics,
    checked_name,
    framework_randomness,
    inventory_of,
    own_model,
    own_steps,
    planned,
    refuse_no_function,
    round_stream,
    steps_of,
)
from dpdl.federated.global_weights import GlobalWeights, digest_of
from dpdl.federated.inventory import UNPROTECTED, Inventory
from dpdl.federated.local_run import LocalRun, MakeOptimizer
from dpdl.federated.local_steps import LossFunction, Train, pull_to_start, take_steps
from dpdl.federated.messages import FitReply, FitRequest, Refusal, Scalar
from dpdl.federated.refusals import refusal_of
from dpdl.federated.reply_store import ReplyStore
from dpdl.federated.round_account import RoundAccount
from dpdl.federated.unanswered import Mark
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.plan import PrivacyPlan
from dpdl.process_lock import ProcessLock
from dpdl.run_state import STEP, step_event
from dpdl.secure_random import RandomStream

__all__ = ["DPClient"]


@final
class DPClient(AccountableClient):
    """Local DP-SGD [1] on one owner's data, round after round, within one ledger.

    Args:
        name: what the server calls it.
        model: a module, of which the client trains a copy, or a function that makes one. Its weights are the server's.
        dataset: the private data; `len()` and `[]`. It is not touched before a round's steps are recorded.
        loss_fn: of outputs and targets, a mean over examples (or a sum: `Execution(loss_reduction="sum")`).
        optimizer: parameters to their optimizer, such as `functools.partial(torch.optim.SGD, lr=0.1)`; made anew for
            each round, because an optimizer's state is about weights that the next round replaces.
        noise_multiplier: sigma, noise standard deviation over max_grad_norm.
        max_grad_norm: C, to which each record's gradient is clipped.
        batch_size: expected number of records in a batch; or
        sample_rate: q, each record's probability to be in a batch.
        ledger: a `LedgerFile`, the path of one, or a `Ledger`, which ends with the process.
        steps: local steps a round, unless the request says.
        proximal: FedProx's mu (arXiv:1812.06127): mu * (w - w_global) is added to each gradient after its noise.
        train: your own loop, `train(model, optimizer, loader, steps)`, over the private three.
        execution: speed and memory.
        replies: a folder in which replies outlive the process, or a `ReplyStore`; by default the last one is in memory.
        insecure_seed: makes noise, batches and dropout a function of (seed, name, federation, round) that others
            can repeat (but for dropout in a client's very first batch, on which engines are tried). Research only. Two
            requests with one number and other weights are then refused: their noise would be the same.
        send_buffers: whether changes of buffers leave too, without protection.
        metrics: names of numbers to send, without protection: "loss" (mean over batches), "examples" (how many
            records), or what `train` returns.
        weight: in the server's mean; a public number, not computed from the data.
        max_steps: a request for more local steps is refused.
        max_failures: after so many rounds that were not answered it answers no more, until its owner says `go_on()`.
        may_stop_early: whether `train` may take fewer steps than it is asked for, for reasons that are not in the data.
            All of them are spent in any case. Otherwise such a round fails.

    Guarantee:
        All replies together, and whatever anybody computes from them, satisfy `epsilon(delta)` at delta for adding or
        removing one record, under the assumptions that `report(delta)` names, unless buffers or metrics are sent.
        A resent reply costs nothing. A round that was begun and not answered, for whatever reason, has spent all of its
        steps, and ends the claims until the owner says that it was not the data.

    Raises:
        ParameterError, LedgerError, LoaderError: arguments out of range. What is wrong with a model is said at the
            first round.

    References:
        [1] Abadi et al., Deep Learning with Differential Privacy, CCS 2016. arXiv:1607.00133
    """

    def __init__(
        self,
        name: str,
        model: nn.Module | Callable[[], nn.Module],
        dataset: Dataset[Any],
        loss_fn: LossFunction,
        *,
        optimizer: MakeOptimizer,
        noise_multiplier: float,
        max_grad_norm: float,
        batch_size: int | None = None,
        sample_rate: float | None = None,
        ledger: Ledger | LedgerFile | str | os.PathLike[str],
        steps: int | None = None,
        proximal: float = 0.0,
        train: Train | None = None,
        execution: Execution | None = None,
        replies: ReplyStore | str | os.PathLike[str] | None = None,
        insecure_seed: int | None = None,
        send_buffers: bool = False,
        metrics: Sequence[str] = (),
        weight: float = 1.0,
        max_steps: int = MAX_STEPS,
        max_failures: int = 1,
        may_stop_early: bool = False,
    ) -> None:
        self._name = checked_name(name)
        self._make_model = own_model(model)
        self._loader, self._plan = planned(dataset, batch_size, sample_rate, noise_multiplier, max_grad_norm)
        refuse_no_function("loss_fn", loss_fn, remedy="Give one of outputs and targets: F.cross_entropy.")
        refuse_no_function("optimizer", optimizer, remedy="Give functools.partial(torch.optim.SGD, lr=0.1).")
        if train is not None:
            refuse_no_function("train", train, remedy="Give train(model, optimizer, loader, steps), or leave it out.")
        if execution is not None and not isinstance(execution, Execution):
            raise ParameterError(f"execution must be an Execution, got {type(execution).__name__}. Leave it out.")
        self._loss_fn = loss_fn
        self._optimizer = optimizer
        self._steps, self._max_steps = own_steps(steps, max_steps)
        self._proximal = arguments.non_negative("proximal", proximal, remedy="Give FedProx's mu, or 0.")
        self._train = train
        self._execution = execution or Execution()
        if self._execution.insecure_seed is not None:
            raise ParameterError("execution has an insecure_seed, which would be every round's. Give it to the client.")
        if insecure_seed is not None:
            RandomStream.from_insecure_seed(insecure_seed)  # or refused
        self._seed = insecure_seed
        self._send_buffers = checked_flag("send_buffers", send_buffers)
        self._metrics = checked_metrics(metrics, own_loop=train is not None)
        self._weight = arguments.non_negative("weight", weight, remedy="Give a public number such as 1.0.")
        self._spent = RoundAccount(ledger, relation=NeighboringRelation(self._plan.relation))
        self._max_failures = arguments.positive_whole("max_failures", max_failures, remedy="Give 1 to stop at once.")
        self._may_stop_early = checked_flag("may_stop_early", may_stop_early)
        self._replies = replies if isinstance(replies, ReplyStore) else ReplyStore(replies)
        self._local: LocalRun | None = None
        self._weights: GlobalWeights | None = None
        self._one_at_a_time = ProcessLock()
        self._begun = False  # whether the round under way may have looked at data

    @property
    def name(self) -> str:
        """What the server calls it."""
        return self._name

    @property
    def _account(self) -> RoundAccount:
        return self._spent

    # ── rounds ──────────────────────────────────────────────────────────────────────────────────────

    def fit(
        self,
        state: Mapping[str, Tensor],
        *,
        steps: int | None = None,
        round: int = 1,
        federation: str = "federation",
    ) -> FitReply:
        """Train from these weights, or give the answer again that such a request has had.

        Args:
            state: the global model's, by name; frozen parameters and buffers may be left out.
            steps: local steps; by default the client's.
            round: its number, from 1.
            federation: whose.

        Raises:
            BudgetExceededError: the round does not fit into the ledger's budget; the data was not touched.
            ParameterError, PrivacyError: the request or the model will not do; nothing was spent.
            StepError: the owner has not looked at rounds that were not answered; nothing was spent.
            Exception: whatever training raised; all steps stay spent, and nothing leaves.
        """
        with self._one_at_a_time:
            return self._fit(FitRequest(round=round, state=state, steps=steps, federation=federation))

    def answer(self, request: FitRequest) -> FitReply | Refusal:
        """As `fit`; errors become refusals: "budget", "request", or "failed" once training had begun."""
        with self._one_at_a_time:
            try:
                return self._fit(request)
            except Exception as error:  # a user's model, data and loop may raise anything, and a server has to count it
                return refusal_of(error, request, client=self.name, begun=self._begun)

    def _fit(self, request: FitRequest) -> FitReply:
        self._begun = False
        steps = steps_of(request, self._steps, at_most=self._max_steps)
        local, weights = self._ready()
        weights.refuse_unfit(request.state)
        digest = digest_of(request.state, self.name, request.federation, request.round, steps, *self._facts())
        answered = self._replies.find(request, digest, client=self.name)
        if answered is not None:
            return answered
        self._account.marks.refuse_to_go_on(self._max_failures)

        randomness = round_stream(self._seed, self.name, request)
        run = run_name(request, digest)
        if not randomness.secure:
            self._account.refuse_same_noise(request, run, randomness.name)
        event, branch = step_event(self._plan), randomness.name
        self._account.claim(event, steps, label=STEP, run=run, branch=branch, repeatable=not randomness.secure)
        spend = partial(self._account.spend, event, steps, label=STEP, run=run, branch=branch)
        with self._account.round(run, spend=spend) as mark:
            self._begun = True
            reply = self._trained(request, steps, run, randomness, local, weights, mark)
            self._replies.put(reply, request, digest)
            mark.answered = True
        return reply

    def _trained(
        self,
        request: FitRequest,
        steps: int,
        run_name: str,
        randomness: RandomStream,
        local: LocalRun,
        weights: GlobalWeights,
        mark: Mark,
    ) -> FitReply:
        weights.load(request.state)
        private, inner, run = local.begin(
            steps=steps, account=self._account.within, run_name=run_name, randomness=randomness
        )
        if self._proximal:
            pull_to_start(inner, local.parameters().values(), strength=self._proximal)
        device = next(iter(local.parameters().values())).device
        with framework_randomness(randomness, device):
            if self._train is None:
                found: Mapping[str, Scalar] = take_steps(*private, steps, loss_fn=self._loss_fn, device=device)
            else:
                found = self._train(*private, steps) or {}
        if run.steps_taken < steps and not self._may_stop_early:
            raise StepError(
                f"train took {run.steps_taken} of {steps} steps. Where it stops may be told by the data, and shows in "
                "the update. Let it take them all; or, if it stops for reasons of its own, say may_stop_early=True."
            )
        while run.steps_taken < steps:
            run.next_step()
        metrics = self._told(found)
        try:
            update = weights.update(request.state)
        except ModelError:
            mark.answered = True  # that weights diverged is computed from noisy steps alone, as the update is
            raise
        return FitReply(
            client=self.name,
            round=request.round,
            update=update,
            base=request.state,
            tied=weights.tied,
            releases=self._inventory(steps, weights),
            weight=self._weight,
            metrics=metrics,
        )

    def _ready(self) -> tuple[LocalRun, GlobalWeights]:
        """The model, made and checked at the first request."""
        if self._local is None:
            self._local = LocalRun(self._make_model(), self._optimizer, self._loader, self._plan, self._execution)
        if self._weights is None:
            module, trained = self._local.module, self._local.trained
            self._weights = GlobalWeights(module, trained, with_buffers=self._send_buffers)
        return self._local, self._weights

    def _facts(self) -> tuple[object, ...]:
        """What besides the request makes a round what it is."""
        return self._plan.to_json(), self._proximal, self._send_buffers, self._metrics, self._weight

    def _told(self, found: Mapping[str, Scalar]) -> dict[str, Scalar]:
        known = {**found, EXAMPLES: self._plan.dataset_size or 0}
        for name in self._metrics:
            if name not in known:
                raise ParameterError(f"The metric {name!r} was asked for, and train returned {sorted(found)}.")
        return {name: known[name] for name in self._metrics}

    def _inventory(self, steps: int, weights: GlobalWeights) -> Inventory:
        plan = self._plan
        mechanism = UNPROTECTED
        if plan.noise_multiplier > 0:
            mechanism = (
                f"DP-SGD: {steps} steps at sample rate {plan.sample_rate:.6g}, Gaussian noise of "
                f"{plan.noise_multiplier:.6g} times the clipping norm {plan.max_grad_norm:g}"
            )
        return inventory_of(weights, mechanism=mechanism, metrics=self._metrics, weight=self._weight)

    # ── what was spent ──────────────────────────────────────────────────────────────────────────────

    @property
    def plan(self) -> PrivacyPlan:
        """What each step is: noise, clipping, sampling."""
        return self._plan

    @property
    def metrics(self) -> tuple[str, ...]:
        """What it sends besides the update, by name."""
        return self._metrics

    @property
    def unprotected(self) -> tuple[str, ...]:
        """Metrics that it sends as they are, by name; how many records there are is treated as public."""
        return tuple(name for name in self._metrics if name != EXAMPLES)

    def report(self, delta: float) -> AdversaryReport:
        """What is promised to each record of this client's data, against whom.

        Args:
            delta: in (0, 1), at which epsilon is said.
        """
        spent = self.spending(delta)
        claims = claims_against_all(
            unit="record",
            because=f"DP-SGD at the client, before anything leaves; {spent.releases} releases in {self.ledger.name}",
            epsilon=claimed(self.ledger, delta),
            delta=delta,
            relation=self.ledger.relation.phrase.replace("example", "record"),
            assumes=(of_the_budget(self.ledger.budget), *self._assumptions()),
            unanswered=self.unanswered,
        )
        if self.unprotected:
            why = f"it is sent {', '.join(self.unprotected)} without noise"
            claims["server"] = Claim(against="server", unit="record", because=why)
        if self._send_buffers:
            for adversary in ADVERSARIES:
                why = "buffers are sent without noise, and become part of the global model"
                claims[adversary] = Claim(against=adversary, unit="record", because=why)
        return AdversaryReport(
            title=f"Client '{self.name}'",
            adversaries=ADVERSARIES,
            claims=tuple(claims[adversary] for adversary in ADVERSARIES),
            not_covered=NOT_COVERED,
            notes=self._notes(),
        )

    def _assumptions(self) -> tuple[str, ...]:
        own = ("the client's own training loop reaches the weights through the private optimizer alone",)
        return (
            "one record is one example; a person with several is protected less",
            "all that is computed from this data is in the ledger",
            *(own if self._train is not None else ()),
            *(("that loop does not stop early because of what is in the data",) if self._may_stop_early else ()),
        )

    def _notes(self) -> tuple[str, ...]:
        notes = () if self._local is None else tuple(self._local.notes)
        if self._seed is None:
            return notes
        return (
            "noise and sampling came from insecure_seed: whoever knows the seed can remove the noise, so the claims "
            "hold only against those who do not",
            *notes,
        )

    def __repr__(self) -> str:
        return f"DPClient({self.name!r}, {self.ledger!r})"
