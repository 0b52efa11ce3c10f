"""What secure noise costs: milliseconds per million standard normals, noisy coordinates, and random words.

    python -m benchmarks.noise                      # prints a table
    python -m benchmarks.noise --out noise.json     # and writes it, with versions and hardware

The candidates take turns, so that a busy machine slows them alike; each figure is the median of the
rounds. One thread, then all: noise itself keeps to one, whatever torch is told. Wall time, so run it on a quiet
machine. The ciphers are timed bare, for the choice in `dpdl.secure_random`.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from cryptography.hazmat.primitives.ciphers import Cipher, CipherContext, algorithms, modes

from benchmarks.environment import environment
from dpdl.noise import gaussian_mechanism, standard_normals
from dpdl.sampling.poisson import PoissonSampler
from dpdl.secure_random import RandomStream
from dpdl.types import ClippedSum

MILLION = 1_000_000
ROUNDS = 7
SAMPLE_RATE = 0.01  # of the Poisson row

Candidates = dict[str, Callable[[], object]]


def candidates(count: int) -> Candidates:
    """What is compared, each producing `count` values (words, for the ciphers)."""
    stream = RandomStream.from_os()
    sampler = PoissonSampler(count, SAMPLE_RATE, stream)
    zeros = bytes(8 * count)
    tensors = {"weight": torch.randn(count)}
    clipped = ClippedSum(tensors=tensors, sensitivity=1.0, examples=1, clipped=0, non_finite=0)
    return {
        "standard_normals (float64, secure)": lambda: standard_normals(stream, count, step=0),
        "gaussian_mechanism (float32 sum)": lambda: gaussian_mechanism(
            clipped, noise_multiplier=1.0, stream=stream, step=0
        ),
        "sum + torch.randn float32": lambda: tensors["weight"] + torch.randn(count),
        "torch.randn float32": lambda: torch.randn(count),
        "torch.randn float64": lambda: torch.randn(count, dtype=torch.float64),
        "RandomStream.words": lambda: stream.words(count, message=0),
        "AES-256-CTR, bare": lambda: _keystream(
            Cipher(algorithms.AES(bytes(32)), modes.CTR(bytes(16))).encryptor(), zeros
        ),
        "ChaCha20, bare": lambda: _keystream(
            Cipher(algorithms.ChaCha20(bytes(32), bytes(16)), mode=None).encryptor(), zeros
        ),
        f"PoissonSampler.draw, rate {SAMPLE_RATE}": lambda: sampler.draw(0),
    }


def _keystream(encryptor: CipherContext, zeros: bytes) -> np.ndarray:
    return np.frombuffer(encryptor.update(zeros), dtype=np.uint64)


def measure(functions: Candidates, rounds: int) -> dict[str, float]:
    """Median seconds of each function, the functions taking turns; one unmeasured round first."""
    seconds: dict[str, list[float]] = {name: [] for name in functions}
    for measured in [False] + [True] * rounds:
        for name, function in functions.items():
            begin = time.perf_counter()
            function()
            if measured:
                seconds[name].append(time.perf_counter() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def run(count: int, rounds: int) -> dict[str, dict[str, float]]:
    """Milliseconds per million: by number of threads, then by candidate."""
    before = torch.get_num_threads()
    table = {}
    for threads in sorted({1, os.cpu_count() or 1}):
        torch.set_num_threads(threads)
        seconds = measure(candidates(count), rounds)
        table[str(threads)] = {name: 1e3 * s * MILLION / count for name, s in seconds.items()}
    torch.set_num_threads(before)
    return table


def main() -> None:
    """Measure, print, and write only where --out says."""
    parser = argparse.ArgumentParser(description="Cost of secure noise, milliseconds per million.")
    parser.add_argument("--count", type=int, default=MILLION, help="values per call (default 1,000,000)")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"measured rounds (default {ROUNDS})")
    parser.add_argument("--out", type=Path, help="write the figures here, as JSON")
    options = parser.parse_args()

    table = run(options.count, options.rounds)
    for threads, row in table.items():
        print(f"\n{threads} thread(s), ms per million, median of {options.rounds}")
        for name, milliseconds in row.items():
            print(f"  {name:<38}{milliseconds:8.2f}")

    if options.out is not None:
        record = {
            "count": options.count,
            "rounds": options.rounds,
            "milliseconds_per_million_by_threads": table,
        }
        versions = environment(("dpdl", "torch", "numpy", "cryptography"))
        options.out.write_text(json.dumps({**versions, **record}, indent=2) + "\n")


if __name__ == "__main__":
    main()
