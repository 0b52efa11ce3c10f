"""The private loader: one pass after another over Poisson-sampled batches, as the plan says."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

from torch.utils.data import DataLoader

from dpdl.errors import PlanExhaustedError, StepError
from dpdl.plan import PrivacyPlan
from dpdl.run_state import RunState
from dpdl.sampling import PhysicalBatches, PoissonSampler
from dpdl.turns import Turns

__all__ = ["PrivateLoader"]


class PrivateLoader:
    """Iterates like the loader it was made from, over batches that each example joins by its own coin.

    A pass has `len(loader)` logical batches, as many as an epoch of the original loader; their sizes vary
    and may be 0. With `max_physical_batch_size` a logical batch comes in several parts. The last pass ends
    with the plan's last step; a pass after that is refused. After loading a saved state, the next pass
    goes on where the saved one was.

    Args:
        loader: the original, for its dataset, collate function and workers.
        plan: sample rate and number of steps.
        steps_per_pass: logical batches in a pass.
        max_physical_batch_size: the most examples in a part; None for no limit.
        turns: told of each part before it is handed out.
        run: knows which step is next.
        share: which of a step's examples this process takes.
        begin_batch: given each batch and its size before it is handed out; returns what is handed out.

    Guarantee:
        Batches are independent of each other and of the data but for the examples in them: the sampling that the plan's
        guarantee counts on. Who is in a batch is private.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        *,
        plan: PrivacyPlan,
        steps_per_pass: int,
        max_physical_batch_size: int | None,
        turns: Turns,
        run: RunState,
        share: slice,
        begin_batch: Callable[[Any, int], Any],
    ) -> None:
        self._loader = loader
        self._plan = plan
        self._steps_per_pass = steps_per_pass
        self._max_physical_batch_size = max_physical_batch_size
        self._turns = turns
        self._run = run
        self._share = share
        self._begin_batch = begin_batch
        self._resuming = False
        self._passes = 0

    @property
    def dataset(self) -> Any:
        """The dataset that batches are drawn from."""
        return self._loader.dataset

    @property
    def max_physical_batch_size(self) -> int | None:
        """The most examples in one part of a batch; None for no limit."""
        return self._max_physical_batch_size

    def __len__(self) -> int:
        """Logical batches in a full pass: `optimizer.step()` updates this often."""
        return self._steps_per_pass

    def resume_pass(self) -> None:
        """Let the next pass go on at the run's place in its pass, and end the one under way, drawn for another."""
        self._resuming = True
        self._passes += 1

    def __iter__(self) -> Iterator[Any]:
        """Begin a pass; a logical batch that was left half done is dropped, unreleased.

        Raises:
            PlanExhaustedError: the plan has no step left.
            StepError (while iterating): a batch was not followed by `optimizer.step()`, or by one that failed.
        """
        left = self._plan.steps - self._run.steps_taken
        if left <= 0:
            raise PlanExhaustedError(
                f"The plan's {self._plan.steps} steps are taken; another pass would spend privacy that nobody "
                "planned. Make a plan with more steps before training."
            )
        self._turns.abandon()
        self._passes += 1
        if not self._resuming or self._run.steps_in_pass >= self._steps_per_pass:
            self._run.steps_in_pass = 0
        self._resuming = False
        first = self._run.position
        count = min(left, self._steps_per_pass - self._run.steps_in_pass)
        return self._batches(range(first, first + count), self._passes)

    def _batches(self, steps: range, this_pass: int) -> Iterator[Any]:
        sampler = PoissonSampler(len(self.dataset), self._plan.sample_rate, self._run.sampling)
        source = PhysicalBatches(
            self._loader, sampler, max_physical_batch_size=self._max_physical_batch_size, share=self._share
        ).of_steps(steps)
        step = steps.start
        for batch, size, last in source:
            if self._passes != this_pass:
                raise StepError(
                    "Another pass over the private loader has begun; this iterator's draws belong to it now. Use one "
                    "iterator at a time."
                )
            if self._run.position != step:  # a draw belongs to one step: none is used by two, none released as another
                raise StepError(
                    "The step before this batch failed after its gradients were taken, so nothing was released for "
                    "its batch. Begin another pass over the private loader: it begins with that batch."
                )
            self._turns.open(size=size, last=last)
            yield self._begin_batch(batch, size)
            self._turns.refuse_unclosed()
            step += last
