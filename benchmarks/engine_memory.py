"""Peak memory of one step over the weights and the batch, in a process of its own, measured in two ways.

    python -m benchmarks.engine_memory mnist vmap     # prints one line of JSON, in bytes

`tensors`: torch's own CPU allocations as its profiler logs them, every one with its size, temporaries inside of
operations too. Exact, but blind to what numpy (dpdl's noise) and the libraries below torch allocate.

`process`: what the step adds to the process's resident memory at its height, from the kernel's high-water
mark (`VmHWM`, put back by writing 5 to /proc/self/clear_refs). It sees everything, within a few hundred
kilobytes: the kernel counts pages, in batches. It needs Linux and glibc, told by `ALLOCATOR` and `malloc_trim` to
give freed memory back; otherwise memory that earlier steps freed would hide what this one takes.

In both, gradients and caches that outlive a step are counted as part of it.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable, Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.profiler import ProfilerActivity, profile, record_function

from benchmarks.engine_candidates import build_step
from benchmarks.engine_models import case_named
from benchmarks.engine_steps import Step
from benchmarks.engine_timing import first_line

__all__ = ["ALLOCATOR", "Peak", "measure_in_subprocess", "process_peak", "tensor_peak"]

ALLOCATOR = {
    "MALLOC_MMAP_THRESHOLD_": "131072",  # bytes; above it each allocation is a mapping of its own, always
    "MALLOC_TRIM_THRESHOLD_": "0",
    "MALLOC_TOP_PAD_": "0",
    "MALLOC_ARENA_MAX": "1",
}
MARK = "measured step"
WARM_UP = 4  # steps, as many as dpdl checks the loss on at first
MEASURED = 3  # steps; the highest counts
ROOT = Path(__file__).parents[1]


@dataclass(frozen=True, kw_only=True)
class Peak:
    """Bytes over the weights and the batch at the height of a step.

    Attributes:
        process: resident memory of the process.
        tensors: torch's allocations.
        first: resident memory in the very first step, with its checks and libraries' own start-up.
        error: why there is nothing to report; empty if there is.
    """

    process: int = 0
    tensors: int = 0
    first: int = 0
    error: str = ""


def process_peak(run: Callable[[], None]) -> int:
    """Bytes by which resident memory rises above its present level while `run` runs."""
    gc.collect()
    ctypes.CDLL("libc.so.6").malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before = _resident("VmRSS")
    run()
    return _resident("VmHWM") - before


def tensor_peak(run: Callable[[], None]) -> int:
    """Bytes of torch's CPU allocations alive at the height of the second of two runs.

    What the first run leaves behind (gradients) is alive in the second, so it counts.
    """

    with profile(activities=[ProfilerActivity.CPU], profile_memory=True) as profiled:
        run()
        with record_function(MARK):
            run()
    results: Any = profiled.profiler
    events = results.kineto_results.events()
    begin, end = next((e.start_ns(), e.end_ns()) for e in events if e.name() == MARK)
    changes = sorted(((e.start_ns(), e.nbytes()) for e in events if e.name() == "[memory]"), key=lambda each: each[0])
    level = height = 0
    for moment, change in changes:
        level += change
        if begin <= moment <= end:
            height = max(height, level)
    return height


def measure_step(build: Callable[[], Step]) -> Peak:
    """Build a step, warm it up, and measure it in both ways."""
    step = build()
    first = process_peak(step.run)
    for _ in range(WARM_UP - 1):
        step.run()
    process = 0
    for _ in range(MEASURED):
        kept = _kept(step)  # alive already before the step, so not seen as a rise
        process = max(process, kept + process_peak(step.run))
    gradients = _bytes(p.grad for p in step.module.parameters() if p.grad is not None)
    caches = _kept(step) - gradients  # gradients are made anew in the first of the two profiled steps
    return Peak(process=process, tensors=caches + tensor_peak(step.run), first=first)


def _kept(step: Step) -> int:
    """Bytes of tensors that outlive a step, besides the weights and the batch."""
    gc.collect()
    weights = [*step.module.parameters(), *step.module.buffers(), *step.batch]
    gradients = [p.grad for p in step.module.parameters() if p.grad is not None]
    alive = [each for each in gc.get_objects() if issubclass(type(each), Tensor)]
    return _bytes([*alive, *gradients, *weights]) - _bytes(weights)


def _bytes(tensors: Iterable[Tensor | None]) -> int:
    storages = {}
    for tensor in tensors:
        if tensor is not None and tensor.layout is torch.strided and tensor.device.type == "cpu":
            storage = tensor.untyped_storage()
            storages[storage.data_ptr()] = storage.nbytes()
    return sum(storages.values())


def _resident(key: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        name, _, value = line.partition(":")
        if name == key:
            return int(value.split()[0]) * 1024  # the kernel's kB
    raise OSError(f"/proc/self/status has no {key}: process memory can be measured on Linux only.")


def measure_in_subprocess(case: str, name: str, *, size: int) -> Peak:
    """`measure_step` in a fresh process, one thread."""
    command = [sys.executable, "-m", "benchmarks.engine_memory", case, name, "--size", str(size)]
    done = subprocess.run(command, env={**os.environ, **ALLOCATOR}, cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        lines = done.stderr.strip().splitlines() or [f"exit status {done.returncode}"]
        return Peak(error=lines[-1])
    return Peak(**json.loads(done.stdout.splitlines()[-1]))


def main() -> None:
    parser = argparse.ArgumentParser(description="Peak memory of one step, as JSON.")
    parser.add_argument("case")
    parser.add_argument("candidate")
    parser.add_argument("--size", type=int, help="examples; default: the case's")
    options = parser.parse_args()
    torch.set_num_threads(1)
    case = case_named(options.case)
    size = options.size or case.batch_size
    try:
        peak = measure_step(lambda: build_step(options.candidate, case, size))
    except Exception as error:  # a candidate that refuses the model is a result
        peak = Peak(error=first_line(error))
    print(json.dumps(asdict(peak)))


if __name__ == "__main__":
    main()
