"""Flower's messages outside of a run: it asks which task this is, and there is none."""

from __future__ import annotations

from collections.abc import Iterator
from importlib.util import find_spec

import pytest

# No tests, and import Flower; the tests skip themselves.
collect_ignore = [] if find_spec("flwr") else ["grid.py", "both_sides.py"]


@pytest.fixture(autouse=True)
def _task() -> Iterator[None]:
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id, TaskIdentity.node_id, TaskIdentity.task_id = 1, 1, 1
    yield
    TaskIdentity._run_id = TaskIdentity._node_id = TaskIdentity._task_id = None
