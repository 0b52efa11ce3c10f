"""The site that answers, in NVFlare's simulated environment: doubles, and refuses what it is told to."""

from __future__ import annotations

import pytest
import torch

from dpdl.errors import BudgetExceededError
from dpdl.split.channel import Packet
from dpdl.split.nvflare import published

pytest.importorskip("nvflare", reason="nvflare is not installed: pip install 'dpdl[nvflare]'")

calls: list[object] = []


def handle(packet: Packet) -> Packet:
    calls.append(packet.header["step"])
    if packet.kind == "bug":
        raise ZeroDivisionError("patient 17")
    if packet.kind == "spent":
        raise BudgetExceededError("no more")
    noise = {"noise": torch.randn(3), "twice": 2 * packet.tensors["z"]}
    return Packet(kind=packet.kind, header={"calls": len(calls)}, tensors=noise)


answer = published(handle)
