"""The site that asks, and the job: `python -m tests.split.channel.nvflare_job WORKSPACE`; it writes seen.json."""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch

from dpdl.errors import BudgetExceededError, ChannelError
from dpdl.split.nvflare import CollabChannel
from dpdl.split.retrying import RetryingChannel

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'dpdl[nvflare]'")
from nvflare.collab import CollabRecipe, collab
from nvflare.recipe import SimEnv

from tests.split.channel import nvflare_site

SEEN = "dpdl_seen"


@collab.main
def drive() -> dict[str, Any]:
    channel = CollabChannel(collab.clients[0])
    z = torch.randn(64, 1568)
    first = channel.request("step", {"session": "a", "step": 1}, {"z": z}, timeout=60.0)
    again = RetryingChannel(channel).request("step", {"session": "a", "step": 1}, {"z": z}, timeout=60.0)
    seen: dict[str, Any] = {
        "exact": torch.equal(first.tensors["twice"], 2 * z),
        "same": torch.equal(first.tensors["noise"], again.tensors["noise"]),
        "bytes": channel.bytes_sent,
    }
    for kind, error in (("spent", BudgetExceededError), ("bug", ChannelError)):
        try:
            channel.request(kind, {"session": "a", "step": 1}, {}, timeout=60.0)
        except error as refusal:
            seen[kind] = f"{refusal} {refusal.__cause__}"
    times = []
    for step in range(2, 22):
        begun = time.perf_counter()
        last = channel.request("step", {"session": "a", "step": step}, {"z": z}, timeout=60.0)
        times.append(time.perf_counter() - begun)
    seen["calls"] = last.header["calls"]
    seen["milliseconds"] = 1000 * sorted(times)[len(times) // 2]
    Path(collab.get_app_prop(SEEN)).write_text(json.dumps(seen))
    return seen


if __name__ == "__main__":
    from tests.split.channel import nvflare_job

    workspace = Path(sys.argv[1])
    recipe = CollabRecipe(job_name="dpdl", server=nvflare_job, client=nvflare_site)
    recipe.set_server_prop(SEEN, str(workspace / "seen.json"))
    recipe.execute(SimEnv(num_clients=1, workspace_root=str(workspace)))
