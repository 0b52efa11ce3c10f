"""Other tests seed torch, which facade runs notice and warn of: here runs begin as in a fresh process."""

from __future__ import annotations

import pytest

from dpdl.compat.opacus import randomness


@pytest.fixture(autouse=True)
def _unseeded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(randomness, "_torch_was_seeded", lambda: False)
