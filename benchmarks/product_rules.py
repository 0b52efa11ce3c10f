"""Sums of outer products: the Gram form against materialised gradients, and which one the cost model picks.

    python -m benchmarks.product_rules                # writes benchmarks/results/product_rules.json

Times are process CPU time of norms and weighted sum with one thread, in turns, medians; the plain weight gradient of
the batch is beside them. The constants of dpdl/per_sample/tape/rules/products.py are from this table.
"""

from __future__ import annotations

import argparse
import json
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table

from benchmarks.environment import RESULTS, environment
from dpdl.per_sample.tape.rules import products
from dpdl.per_sample.tape.rules.products import Arrangement, OuterProducts

REPEATS = 7
# n examples, t positions, i inputs, o outputs: blocks of a ViT and a GPT, its output layer, recurrent and narrow ones.
SHAPES = (
    (32, 64, 192, 768),
    (32, 64, 768, 192),
    (32, 64, 192, 192),
    (32, 64, 192, 576),
    (32, 197, 192, 768),
    (16, 128, 256, 1024),
    (16, 128, 1024, 256),
    (16, 128, 256, 256),
    (16, 128, 256, 768),
    (16, 128, 256, 8192),
    (64, 64, 64, 512),
    (64, 64, 128, 512),
    (64, 16, 128, 128),
    (256, 16, 64, 64),
    (8, 512, 256, 256),
    (8, 256, 64, 64),
    (4, 1024, 64, 256),
    (64, 8, 512, 512),
    (256, 2, 512, 512),
)


def steps_of(n: int, t: int, i: int, o: int) -> dict[str, Callable[[], object]]:
    generator = torch.Generator().manual_seed(0)
    a, g = (torch.randn(n, 1, t, width, generator=generator) for width in (i, o))
    weights = torch.rand(n, generator=generator)
    arrangement = Arrangement(shape=(o, i), order=(0, 1))

    def gram() -> None:
        one = OuterProducts(a, g, arrangement, keeps_operands=True)
        one.norms_squared()
        one.weighted_sum(weights)

    def materialised() -> None:
        one = OuterProducts(a, g, arrangement)
        one.give_up_operands()
        one.norms_squared()
        one.weighted_sum(weights)

    return {"gram": gram, "materialised": materialised, "plain": lambda: g.reshape(n * t, o).t() @ a.reshape(n * t, i)}


def medians(steps: dict[str, Callable[[], object]]) -> dict[str, float]:
    times: dict[str, list[float]] = {name: [] for name in steps}
    for _ in range(REPEATS):
        for name, step in steps.items():
            began = time.process_time()
            step()
            times[name].append(1e3 * (time.process_time() - began))
    return {name: statistics.median(values) for name, values in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=RESULTS / "product_rules.json")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    table = Table("n, t, i, o", "gram ms", "materialised ms", "plain ms", "picked", "over the best")
    rows = []
    for shape in SHAPES:
        found = medians(steps_of(*shape))
        n, t, i, o = shape
        picked = "gram" if products.gram_is_cheaper((n, 1, t, i, o)) else "materialised"
        over = found[picked] / min(found["gram"], found["materialised"])
        rows.append({"shape": shape, "milliseconds": found, "picked": picked, "over_the_best": over})
        times = (f"{found[name]:.2f}" for name in ("gram", "materialised", "plain"))
        table.add_row(", ".join(map(str, shape)), *times, picked, f"{over:.2f}")
    Console().print(table)
    arguments.output.write_text(json.dumps({"environment": environment(), "rows": rows}, indent=2) + "\n")


if __name__ == "__main__":
    main()
