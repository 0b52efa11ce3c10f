"""Loading a state while the loader is in the middle of a pass."""

from __future__ import annotations

import pytest

from dpdl.errors import StepError
from tests.small_run import small_run, train_on


def test_a_pass_under_way_ends_when_a_state_is_loaded() -> None:
    """Its draws were made for the run before, and may be among those that the saved run has released."""
    first, second = small_run(batch_size=4), small_run(batch_size=4)
    train_on(first, next(iter(first.loader)))
    under_way = iter(second.loader)
    train_on(second, next(under_way))
    second.optimizer.load_state_dict(first.optimizer.state_dict())
    with pytest.raises(StepError, match="one iterator at a time"):
        next(under_way)
