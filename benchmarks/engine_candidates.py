"""What is compared, by name: the plain step, its floors, dpdl's engines, and the peers."""

from __future__ import annotations

import time
from typing import cast, get_args

import torch

from benchmarks import engine_steps
from benchmarks.engine_models import Case
from benchmarks.engine_peers import CHUNKS, OPACUS_MODES, by_hand, opacus_step
from benchmarks.engine_steps import Step
from dpdl.execution import EngineName

__all__ = ["BY_HAND", "ENGINES", "FLOOR", "NOISE", "PEERS", "PLAIN", "build_step"]

PLAIN, FLOOR, NOISE = "plain", "floor", "noise"
ENGINES = ("tape", "auto", "vmap", "loop")
BY_HAND = "torch.func"
SEED = 0
PEERS = (*(f"opacus {mode}" for mode in OPACUS_MODES), BY_HAND)


def build_step(name: str, case: Case, size: int) -> Step:
    """The step of this name for a case and a batch size; "vmap/16" is vmap in chunks of 16.

    Raises:
        KeyError: there is no such candidate.
        Exception: whatever an engine or a peer raises for a model that it refuses.
    """
    torch.manual_seed(SEED)  # every candidate trains the same weights
    if name == PLAIN:
        return engine_steps.plain(case, size)
    if name == FLOOR:
        return engine_steps.floor(case, size)
    if name == NOISE:
        return engine_steps.noise_alone(case, size)
    if name == BY_HAND:
        return _fastest_by_hand(case, size)
    family, _, mode = name.partition(" ")
    if family == "opacus" and mode in OPACUS_MODES:
        return opacus_step(case, size, mode=mode)
    engine, _, chunk = name.partition("/")
    if engine in get_args(EngineName):
        return engine_steps.private(
            case, size, engine=cast(EngineName, engine), chunk_size=int(chunk) if chunk else None
        )
    raise KeyError(name)


def _fastest_by_hand(case: Case, size: int) -> Step:
    """The chunk size that is fastest on its second step."""
    trials: dict[float, tuple[int, Step]] = {}
    for chunk in sorted({min(chunk, size) for chunk in CHUNKS}):
        step = by_hand(case, size, chunk=chunk)
        step.run()
        began = time.process_time()
        step.run()
        trials[time.process_time() - began] = chunk, step
    chunk, best = trials[min(trials)]
    return Step(run=best.run, module=best.module, batch=best.batch, engine=lambda: f"chunks of {chunk}")
