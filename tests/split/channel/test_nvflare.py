"""The adaptor to NVFlare's Collab API, in its simulated environment: two processes that NVFlare has started."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from dpdl.errors import ParameterError
from dpdl.split.nvflare import CollabChannel, published

installed = importlib.util.find_spec("nvflare") is not None


@pytest.mark.skipif(not installed, reason="nvflare is not installed: pip install 'dpdl[nvflare]'")
def test_a_site_is_asked_through_collab(tmp_path: Path) -> None:
    command = [sys.executable, "-m", "tests.split.channel.nvflare_job", str(tmp_path)]
    ended = subprocess.run(
        command, capture_output=True, text=True, timeout=300, cwd=Path(__file__).parents[3], check=False
    )
    assert (tmp_path / "seen.json").exists(), ended.stdout[-3000:] + ended.stderr[-3000:]
    seen = json.loads((tmp_path / "seen.json").read_text())
    print(seen)
    assert seen["exact"]
    assert seen["same"]
    assert seen["calls"] == 20 + 3  # steps 1 to 21 once each, and the two refusals
    assert "no more" in seen["spent"]
    assert "patient" not in seen["bug"]
    assert seen["bytes"] > 2 * 401_408


@pytest.mark.skipif(installed, reason="nvflare is installed")
def test_without_nvflare_the_extra_is_named() -> None:
    with pytest.raises(ParameterError, match=r"dpdl\[nvflare\]"):
        published(lambda packet: packet)
    with pytest.raises(ParameterError, match=r"dpdl\[nvflare\]"):
        CollabChannel(None)
