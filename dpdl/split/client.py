"""The party that drives: it draws the batches, begins the steps, and keeps the ledger of its records.

    client = SplitClient(graph, "client", plan=plan, data={"x": x, "y": y}, optimizer=optimizer,
                         channels={"server": channel})
    client.run()
    client.predict({"x": images})
    print(client.report(delta=1e-5))

Before the first step everybody is greeted, and made-up rows walk through the network twice with one of them changed:
whatever a party may not do is refused before a private row has left. One step is one Poisson-sampled batch, one event
in the ledger, recorded before anything is computed, and on the way of a chain one round trip.
"""

from __future__ import annotations

import secrets
from collections.abc import Mapping
from typing import Any, final

import numpy as np
import torch
from torch import Tensor

from dpdl.claims import AdversaryReport
from dpdl.errors import ParameterError, PlanExhaustedError, StepError
from dpdl.execution import Execution
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.plan import PrivacyPlan
from dpdl.sampling import PoissonSampler
from dpdl.split.begin import PROBE_ROWS, begin_walk
from dpdl.split.channel import Channel, Value
from dpdl.split.claims_of_run import report_of_run
from dpdl.split.clip import Clip, JointClip
from dpdl.split.clipped_parts import joint_weights
from dpdl.split.columns import Columns
from dpdl.split.flow import Address
from dpdl.split.graph import SplitGraph
from dpdl.split.outlet import Outlet
from dpdl.split.party import Party
from dpdl.split.predicting import columns_to_predict, refuse_unknown_rows
from dpdl.split.probe_evidence import ATTEMPTS, Seen, compared_probe, cuts_to_show, refuse_no_evidence
from dpdl.split.server import DEFAULT_TIMEOUT, finish_others, peers_of, say_hello
from dpdl.split.walk import Walk

__all__ = ["SplitClient"]


@final
class SplitClient:
    """The driving party of a split network.

    Args:
        graph: all of it, with this party's modules and losses.
        party: which party this is.
        plan: what all parties are held to.
        optimizer: of its parts' parameters; None if none trains.
        data: its own columns, by name, or None if it only drives.
        channels: to the parties that it asks.
        name: what it is called where there are several clients; by default as the party.
        clip: as all parties agree; by default the plan's norm in equal parts.
        release: the door through which rows leave; by default as they are.
        ledger: where what is spent on its records adds up. Steps that other processes have taken under this name and
            plan count as this plan's, too: another run of its own needs another name.
        execution: speed and memory.
        timeout: seconds to wait for an answer.

    Guarantee:
        The claims of `report`: steps are in the ledger before anything is computed. What crosses a cut is protected by
        `release` alone.

    Raises:
        ParameterError, ModelError, WrapError: something does not fit; nothing was changed.
    """

    def __init__(
        self,
        graph: SplitGraph,
        party: str = "client",
        *,
        plan: PrivacyPlan,
        optimizer: torch.optim.Optimizer | None = None,
        data: Columns | Mapping[str, Tensor] | None = None,
        channels: Mapping[str, Channel],
        name: str | None = None,
        clip: Clip | None = None,
        release: Outlet | None = None,
        ledger: Ledger | LedgerFile | None = None,
        execution: Execution | None = None,
        timeout: float = DEFAULT_TIMEOUT,
    ) -> None:
        columns = data if isinstance(data, Columns) or data is None else Columns(data)
        self.party = Party(
            graph,
            party,
            driver=party,
            optimizer=optimizer,
            columns=columns,
            outlet=release,
            ledger=ledger,
            execution=execution,
        )
        self._peers = peers_of(self.party, channels, timeout)
        self.name = name or party
        self._client = self.party.admit(self.name, plan, clip)
        self.plan, self._run = plan, self._client.run
        size = len(columns) if columns is not None else plan.dataset_size
        if size is None or plan.dataset_size not in (None, size):
            raise ParameterError(
                f"The plan is for {plan.dataset_size} records, and the data of '{party}' has {size}. Make the plan "
                "with dataset_size, from this data."
            )
        self._size = size
        self._ready = self._greeted = False
        self._token = _token()
        self._probes = 0
        self._asked = {"probe": 0, "infer": 0}
        self._unfinished: tuple[Walk, Tensor] | None = None  # a joint step whose weights the others lack

    # ── training ────────────────────────────────────────────────────────────────────────────────────

    @property
    def session(self) -> str:
        """Tells this process's requests from all others'."""
        return f"{self.name} {self._token}"

    @property
    def ledger(self) -> Ledger:
        """What has been spent on this client's records."""
        return self._run.ledger

    @property
    def steps_taken(self) -> int:
        """Steps recorded so far."""
        return self._run.steps_taken

    def run(self, steps: int | None = None) -> None:
        """Take some steps of the plan, or all that are left.

        Raises:
            PlanExhaustedError: that many are not left. BudgetExceededError: the budget ends. As `step`.
            ParameterError: steps is not a whole number.
        """
        left = self.plan.steps - self.steps_taken
        wanted = left if steps is None else steps
        if type(wanted) is not int:
            raise ParameterError(f"steps must be a whole number or None, got {steps!r}.")
        if not 0 <= wanted <= left:
            raise PlanExhaustedError(
                f"{wanted} steps were asked for, and the plan has {left} left of {self.plan.steps}."
            )
        for _ in range(wanted):
            self.step()
        self.finish()

    def step(self) -> None:
        """One Poisson-sampled batch through all parts and back; every party updates.

        Raises:
            PlanExhaustedError, BudgetExceededError: it is not within the plan and all budgets.
            ExampleMixingError, LossError, ManifestError: before the first step, the network cannot be trained so.
            ChannelError: a party does not answer. The step is spent, and the next one is another.
            StepError: parties wait for each other, which is a fault of what carries packets. The step is spent.
        """
        self._run.refuse_overspending()
        self.get_ready()
        number = self._run.position
        sampler = PoissonSampler(self._size, self.plan.sample_rate, self._run.sampling)
        drawn = torch.from_numpy(sampler.draw(number).astype(np.int64))
        address = Address(kind="train", session=self.session, number=number)
        weights = self._weights_to_tell()
        walk = begin_walk(self.party, self._client, address, self._peers, row_numbers=drawn, weights=weights)
        self._go(walk)
        if isinstance(self._client.clip, JointClip):
            norms = walk.all_norms()  # None of an empty batch, which is a step like any other
            told = joint_weights(
                torch.zeros(0) if norms is None else norms, max_grad_norm=self._client.clip.max_grad_norm
            )
            walk.take_weights(told)
            self._unfinished = walk, told

    def _weights_to_tell(self) -> Tensor | None:
        unfinished, self._unfinished = self._unfinished, None
        return None if unfinished is None else unfinished[1]

    def finish(self) -> None:
        """With joint clipping, let the other parties take the last step; `run` and `predict` do so themselves."""
        if (weights := self._weights_to_tell()) is not None:
            header: dict[str, Value] = {"session": self.session, "step": self._run.position, "client": self.name}
            finish_others(self.party, self._peers, header, weights)

    def get_ready(self) -> None:
        """Greet everybody and let made-up rows walk; once. `step` does so itself.

        Raises:
            ManifestError: parties have not agreed on the same run.
            ExampleMixingError, LossError, ModelError: a part or a loss is of a kind that cannot be trained so.
            StepError: as `step`.
        """
        if not self._ready:
            self.probe()
            self._ready = True

    def probe(self) -> None:
        """Let made-up rows walk through the network twice, one of them changed; no step, nothing spent.

        Before the first step this happens by itself; each time with other rows. It finds mistakes, not malice: a probe
        says that it is one, and a party that means to mix rows answers it well.

        Raises:
            ExampleMixingError: the change of one row reached others, here or behind a cut.
            ModelError: gradients that come back are zero or not finite in all of a few attempts, which shows nothing.
            StepError: as `step`.
        """
        self._greet()
        missing, seen = cuts_to_show(self.party.graph, self.party.name), False
        for _ in range(ATTEMPTS):
            last, shown = self._probe_pair()
            missing, seen = missing - shown, seen or bool(shown)
            if not missing:
                break
        else:
            refuse_no_evidence(self.party.name, last, missing)
        self._probes += 2 * seen

    def _probe_pair(self) -> tuple[Seen, frozenset[str]]:
        before, shown = None, frozenset[str]()
        for exchanged in (-1, PROBE_ROWS - 1):
            address = Address(kind="probe", session=self.session, number=self._next("probe"))
            walk = begin_walk(self.party, self._client, address, self._peers, exchanged=exchanged)
            self._go(walk)
            before, shown = compared_probe(walk, before)
        assert before is not None
        return before, shown

    def _greet(self) -> None:
        if not self._greeted:
            say_hello(self.party, self._peers, self._client, self.session)
            self._greeted = True

    def begin_anew(self) -> None:
        """Go on in a new session, after a party was restarted. A step that was under way is over, and stays spent."""
        self._token = _token()
        self._ready = self._greeted = False
        self._unfinished = None

    def _next(self, kind: str) -> int:
        self._asked[kind] += 1
        return self._asked[kind] - 1

    def _go(self, walk: Walk) -> dict[str, Tensor]:
        """Visit until everybody is done."""
        answer: dict[str, Tensor] = {}
        for _ in range(2 * len(walk.party.graph.parties) + len(walk.party.graph.parts)):
            answer.update(walk.visit({}, sender=""))
            if walk.done:
                return answer
        waiting = [party for party, done in walk.done_there.items() if not done]
        raise StepError(f"The step does not come to an end: {waiting or [self.party.name]} wait for what nobody sends.")

    # ── inference and claims ────────────────────────────────────────────────────────────────────────

    def predict(
        self, columns: Mapping[str, Tensor] | Tensor | None = None, *, rows: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What the heads' parts say, in eval mode: only forward, and each row that crosses a cut is a release.

        Args:
            columns: this party's data, by column, [n, ...]; a tensor, if it has one column that feeds a part.
            rows: in place of columns, shape [n], int64: numbers of rows that all parties have.

        Returns:
            Head to its part's output, [n, ...].

        Raises:
            ParameterError: neither or both are given, columns are missing, or rows are not shaped as this party's data.
            DataError: there are no rows of such numbers. In both cases nothing was sent.
            StepError: as `step`.
        """
        if (columns is None) == (rows is None):
            raise ParameterError("Give either columns or rows to predict.")
        given = None
        if columns is not None:
            given = columns_to_predict(self.party, columns)
        else:
            refuse_unknown_rows(rows, size=self._size)
        self.finish()
        self._greet()
        address = Address(kind="infer", session=self.session, number=self._next("infer"))
        walk = begin_walk(
            self.party,
            self._client,
            address,
            self._peers,
            row_numbers=rows,
            given=given,
        )
        answer = self._go(walk)
        return {name.removeprefix("p/"): tensor for name, tensor in answer.items()}

    def epsilon(self, delta: float) -> float:
        """An upper bound on the epsilon spent so far at `delta`, against who gets the trained network.

        Where there is a ledger of the data, all that it has counts, whatever run or process it was of.
        """
        return self._client.epsilon(delta)

    def state_dict(self) -> dict[str, Any]:
        """This party's weights, optimizer and spending, as `Party.state_dict`; a joint step is finished first."""
        self.finish()
        return self.party.state_dict()

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Go on from what `state_dict` returned, in a new session; as `Party.load_state_dict`."""
        self.party.load_state_dict(state)
        self.begin_anew()

    def report(self, delta: float, *, weights_relayed: bool = False) -> AdversaryReport:
        """What may be claimed about this client's records, adversary by adversary.

        Args:
            delta: of each claim.
            weights_relayed: whether other clients get this client's weights during the run.
        """
        return report_of_run(
            self.party, self._client, delta=delta, probes=self._probes, weights_relayed=weights_relayed
        )


def _token() -> str:
    """What no other session has."""
    return secrets.token_hex(8)
