"""A step that fails on its way leaves draws and steps together, and one that cannot release spends nothing."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from dpdl.errors import ModelError, StepError
from dpdl.optim.private_optimizer import PrivateOptimizer
from dpdl.sampling import PoissonSampler
from tests.small_run import refused, small_run, train_on


def test_a_draw_is_never_used_by_two_steps(monkeypatch: pytest.MonkeyPatch) -> None:
    draws: list[int] = []
    draw = PoissonSampler.draw
    fill = PrivateOptimizer._with_unused
    tries = 0

    def seen(self: PoissonSampler, step: int) -> Any:
        draws.append(step)
        return draw(self, step)

    def out_of_memory(self: PrivateOptimizer, clipped: Any) -> Any:
        nonlocal tries
        tries += 1
        if tries in (2, 4):
            raise torch.OutOfMemoryError("out of memory")
        return fill(self, clipped)

    private = small_run(noise_multiplier=1.0, batch_size=4, steps=9)
    monkeypatch.setattr(PoissonSampler, "draw", seen)
    monkeypatch.setattr(PrivateOptimizer, "_with_unused", out_of_memory)
    used: list[int] = []
    refusals: list[str] = []
    while private.optimizer.steps_taken < 9:
        try:
            for batch in private.loader:
                before = private.optimizer.steps_taken
                try:
                    train_on(private, batch)
                except torch.OutOfMemoryError:
                    continue
                used.extend([draws[-1]] * (private.optimizer.steps_taken - before))
        except StepError as error:
            refusals.append(str(error))
    assert used == list(range(9))
    assert len(refusals) == 2
    assert all("Begin another pass" in text for text in refusals)


@pytest.mark.parametrize("when", ["before backward", "before step"])
def test_a_step_with_nothing_to_train_is_refused_before_it_is_spent(when: str) -> None:
    private = small_run(noise_multiplier=1.0)
    x, y = next(iter(private.loader))
    loss = torch.nn.functional.cross_entropy(private.model(x), y)
    if when == "before step":
        loss.backward()
    for p in private.model.parameters():
        p.requires_grad_(False)
    if when == "before backward":
        loss.backward()
    with refused(private, ModelError, "frozen", "requires_grad_"):
        private.optimizer.step()
    assert private.optimizer.steps_taken == 0
