"""From a round's clipped sum to its mean update: recorded, noised, divided, in that order.

    rounds = NoisyRounds(plan, ledger=ledger, federation="federation", randomness=RandomStream.from_os())
    rounds.refuse_overspending()                              # before clients are asked
    position = rounds.record()                                # before noise is drawn
    mean = rounds.mean_update(clipped, position=position)

The noise belongs to the clipping norm that clipped; an adaptive norm moves afterwards.

Under an insecure seed two servers that go on from one state would add the same noise to different sums, and whoever has
both results subtracts it. So there the key is of the sum as well, and rounds that the ledger has and a saved state has
not are spent: whoever resumes draws later ones, their clients included, with another key, and counts them anew.

**Correlated noise** (DP-FTRL, matrix factorisation) has its place in `mean_update`: it is given the same `ClippedSum`,
round by round, and adds noise that depends on that of earlier rounds. Its event, `accountants.MatrixFactorization`, is
that of the whole run, recorded once, at the first round; and clients must be kept apart by its minimum separation,
which is a matter of a `ClientSampling` of its own. What comes before and after does not change.

References:
    McMahan, Ramage, Talwar, Zhang, Learning Differentially Private Recurrent Language Models, 2018. arXiv:1710.06963
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from dpdl.errors import CheckpointError, LedgerError, PlanExhaustedError
from dpdl.federated.client_level_plan import ClientLevelPlan
from dpdl.federated.global_weights import digest_of
from dpdl.ledger import Ledger
from dpdl.ledger_file import LedgerFile
from dpdl.noise import gaussian_mechanism
from dpdl.run_state import STEP, RunState, new_run_id
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum

__all__ = ["NoisyRounds"]


class NoisyRounds:
    """A federation's noisy releases: what was spent, under which key, and the clipping norm as it is now.

    A round is drawn under a key, at a position: how many rounds that key has drawn. The position addresses who is
    chosen and the noise, so that no noise is used twice, whatever fails in between (`dpdl.run_state.RunState`).

    Args:
        plan: what rounds are held to.
        ledger: of the clients' data, if this federation is not all that is released from it.
        federation: the run's name in that ledger.
        randomness: the root of its streams.

    Attributes:
        max_update_norm: the clipping norm of the next round.
    """

    def __init__(
        self, plan: ClientLevelPlan, *, ledger: Ledger | LedgerFile | None, federation: str, randomness: RandomStream
    ) -> None:
        self.plan = plan
        self.max_update_norm = plan.max_update_norm
        own = Ledger(relation=plan.neighbours, within=ledger, run=new_run_id(federation))
        self.run = RunState(plan, randomness=randomness, ledger=own)
        self._ours = ""  # the branch whose rounds this process has begun to draw

    @property
    def ledger(self) -> Ledger:
        """The federation's own, which lies within that of the data."""
        return self.run.ledger

    @property
    def rounds_spent(self) -> int:
        """Rounds that were recorded, those that a crash has lost included."""
        return self.run.steps_taken

    def refuse_overspending(self) -> None:
        """Raise unless one more round is within the plan and all budgets.

        Raises:
            PlanExhaustedError: the plan's rounds are all taken.
            BudgetExceededError: the round would overspend.
            LedgerError: the ledger's file was damaged, or another run in it has the same insecure seed.
        """
        if self.rounds_spent >= self.plan.rounds:
            raise PlanExhaustedError(
                f"The plan's {self.plan.rounds} rounds are taken. Make a plan with more rounds before the first one."
            )
        self._refuse_anothers_round()
        self.run.refuse_overspending()
        self._ours = self.run.branch

    def record(self) -> int:
        """Record one more round; returns its position, which addresses its noise.

        Raises:
            BudgetExceededError, LedgerError: as `refuse_overspending`; nothing was recorded.
        """
        if isinstance(self.ledger.within, Ledger):  # in which nothing was claimed
            self._ours = ""
            self._refuse_anothers_round()
        return self.run.next_step()

    def mean_update(self, clipped: ClippedSum, *, position: int) -> dict[str, Tensor]:
        """The noisy sum over the fixed denominator, in float64. The clipped sum is used up.

        Args:
            clipped: of the round's replies.
            position: what `record` returned.
        """
        noisy = gaussian_mechanism(
            clipped,
            noise_multiplier=self.plan.update_noise_multiplier,
            stream=self._key_of(clipped),
            step=position,
            reuse=True,
        )
        return {name: total / self.plan.denominator for name, total in noisy.tensors.items()}

    def adapt(self, centred_bits: float, *, position: int) -> float | None:
        """Move the clipping norm; returns the noisy unclipped fraction, None if the norm is fixed.

        Args:
            centred_bits: sum over replies of ([norm <= clipping norm] - quantile).
            position: what `record` returned.
        """
        adaptive, noise = self.plan.adaptive_clipping, self.plan.bit_noise
        if adaptive is None or noise is None:
            return None
        sensitivity = adaptive.bit_sensitivity
        bits = ClippedSum(
            tensors={"bits": torch.tensor(centred_bits, dtype=torch.float64)},
            sensitivity=sensitivity,
            examples=0,
            clipped=0,
            non_finite=0,
        )
        noisy = gaussian_mechanism(
            bits, noise_multiplier=noise / sensitivity, stream=self._key_of(bits).child("bits"), step=position
        )
        total = noisy.tensors["bits"].item()
        cohort = self.plan.expected_cohort
        self.max_update_norm = adaptive.next_norm(self.max_update_norm, noisy_bits=total, cohort=cohort)
        return adaptive.quantile + total / cohort

    def _key_of(self, clipped: ClippedSum) -> RandomStream:
        noise = self.run.noise
        return noise if noise.secure else noise.child(f"of {digest_of(clipped.tensors)}")

    def _refuse_anothers_round(self) -> None:
        """Raise if, under a seed, somebody else who has this run's saved state has drawn its next round."""
        run, account = self.run, self.ledger.within
        if run.secure or account is None or self._ours == run.branch:
            return
        for each in account.of_run(self.ledger.run):
            if (each.label, each.branch) == (STEP, run.branch) and each.first <= run.position < each.end:
                raise LedgerError(
                    f"Another server has gone on from the same saved state, with the same insecure_seed: round "
                    f"{run.position} of this key is in {account.name}. Load the saved state again: rounds then have a "
                    "key of their own."
                )

    # ── saving and resuming ─────────────────────────────────────────────────────────────────────────

    def state_dict(self) -> dict[str, Any]:
        """Plain values; no key is among them."""
        return {"plan": self.plan.to_json(), "max_update_norm": self.max_update_norm, "run": self.run.state_dict()}

    def saved(self, state: object) -> tuple[RunState, float, dict[str, Any]]:
        """The run, the clipping norm, and the run's plain values of a saved state, if one may go on from it.

        Raises:
            CheckpointError: it was saved under another plan, budget or ledger, or is damaged.
        """
        if not isinstance(state, dict) or set(state) != {"plan", "max_update_norm", "run"}:
            raise CheckpointError(
                "The saved server has no plan of client-level privacy, and this one has: loading it would forget what "
                "was spent. Load the state of a server with the same plan."
            )
        if state["plan"] != self.plan.to_json():
            raise CheckpointError(
                f"The server was saved under another plan. Saved: {state['plan']} Now: {self.plan.to_json()} Resume "
                "with the saved plan."
            )
        norm = state["max_update_norm"]
        if type(norm) is not float or not norm > 0:
            raise CheckpointError(f"The saved server is damaged: max_update_norm {norm!r}.")
        other = RunState.from_state_dict(state["run"], plan=self.plan)
        self.run.refuse_resuming(other)
        return other, norm, state["run"]

    def become(self, saved: tuple[RunState, float, dict[str, Any]]) -> None:
        """Go on from what `saved` returned. Nothing that was released is forgotten; a secure run takes a fresh key, and
        so does a seeded one if the ledger has rounds that the saved state has not.
        """
        other, norm, values = saved
        elsewhere = self.run.elsewhere(other)
        later = tuple(replace(each, run="") for each in elsewhere if each.label == STEP)
        if not other.secure and other.ledger.lacks(later):
            told = repr([(each.branch, each.first, each.count) for each in later])
            key = RandomStream.from_state_dict(values["randomness"]).child(f"after {told}")
            other = RunState.from_state_dict({**values, "randomness": key.state_dict()}, plan=self.plan)
        self.run.become(other, elsewhere=elsewhere)
        self.max_update_norm = norm
