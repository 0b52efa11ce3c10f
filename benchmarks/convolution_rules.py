"""Per-sample gradients of convolutions: what each way costs, and whether the rule picks a fast one.

    python -m benchmarks.convolution_rules                # a table; a star marks the way that the rule picks
    python -m benchmarks.convolution_rules --output       # and writes results/convolution_rules.json
    python -m benchmarks.convolution_rules --fit          # and fits the rule's constants to these times
    python -m benchmarks.convolution_rules --blocks       # time over the size of a block of examples
    python -m benchmarks.convolution_rules --rounding     # error of norms from inner products, in units of the bound

Times are of norms and weighted sum together, over PyTorch's own weight gradient of the whole batch. They are process
times on one thread, the median of rounds in which the candidates take turns; a way eight times slower than the best
leaves after the first.
"""

from __future__ import annotations

import argparse
import json
import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import least_squares, nnls
from torch import Tensor

from benchmarks.environment import RESULTS, environment
from dpdl.per_sample.tape import convolution_gradients, convolution_gram
from dpdl.per_sample.tape.convolution import MATERIALIZING, RATES, WAYS, ConvolutionContribution, Geometry, Layer
from dpdl.per_sample.tape.convolution_gradients import batched_gradient

ROUNDS = 5
HOPELESS = 8.0  # a way this much slower than the best is timed once
MEMORY = 5e8  # numbers: inner products of the pixels of large images would not fit


@dataclass(frozen=True, kw_only=True)
class Case:
    """A layer and a batch size; the spatial arguments hold for every axis."""

    name: str
    batch: int
    channels: int
    out: int
    sizes: tuple[int, ...]
    kernel: int
    stride: int = 1
    padding: int = 0
    dilation: int = 1
    groups: int = 1

    @property
    def geometry(self) -> Geometry:
        """How the kernel moves."""

        def each(value: int) -> tuple[int, ...]:
            return (value,) * len(self.sizes)

        return Geometry(
            kernel_size=each(self.kernel),
            stride=each(self.stride),
            padding=each(self.padding),
            dilation=each(self.dilation),
            groups=self.groups,
        )

    @property
    def shape(self) -> tuple[int, ...]:
        """Of the weight."""
        return (self.out, self.channels // self.groups, *self.geometry.kernel_size)

    @property
    def outputs(self) -> tuple[int, ...]:
        """Spatial sizes of the output."""
        covered = self.dilation * (self.kernel - 1) + 1
        return tuple((size + 2 * self.padding - covered) // self.stride + 1 for size in self.sizes)

    @property
    def layer(self) -> Layer:
        """What the rule looks at."""
        return Layer(images=1, sizes=self.sizes, outputs=self.outputs, shape=self.shape, geometry=self.geometry)

    def operands(self) -> tuple[Tensor, Tensor]:
        """A batch of inputs and cotangents."""
        generator = torch.Generator().manual_seed(0)
        x = torch.randn(self.batch, 1, self.channels, *self.sizes, generator=generator)
        return x, torch.randn(self.batch, 1, self.out, *self.outputs, generator=generator)


def case(
    name: str,
    batch: int,
    channels: int,
    out: int,
    sizes: tuple[int, ...],
    kernel: int,
    stride: int = 1,
    padding: int = 0,
    dilation: int = 1,
    groups: int = 1,
) -> Case:
    return Case(
        name=name,
        batch=batch,
        channels=channels,
        out=out,
        sizes=sizes,
        kernel=kernel,
        stride=stride,
        padding=padding,
        dilation=dilation,
        groups=groups,
    )


CASES = (
    case("MNIST 1→16 8×8/2", 256, 1, 16, (28, 28), 8, 2, 3),
    case("MNIST 16→32 4×4/2", 256, 16, 32, (13, 13), 4, 2),
    case("MNIST 16→32 4×4/2", 512, 16, 32, (13, 13), 4, 2),
    case("3→32 3×3 32²", 64, 3, 32, (32, 32), 3, 1, 1),
    case("32→32 3×3 32²", 64, 32, 32, (32, 32), 3, 1, 1),
    case("64→64 3×3 16²", 64, 64, 64, (16, 16), 3, 1, 1),
    case("128→128 3×3 8²", 64, 128, 128, (8, 8), 3, 1, 1),
    case("64→64 3×3 32²", 16, 64, 64, (32, 32), 3, 1, 1),
    case("128→128 3×3 16²", 16, 128, 128, (16, 16), 3, 1, 1),
    case("256→256 3×3 8²", 16, 256, 256, (8, 8), 3, 1, 1),
    case("64→128 1×1/2 32²", 16, 64, 128, (32, 32), 1, 2),
    case("16→64 3×3 32²", 16, 16, 64, (32, 32), 3, 1, 1),
    case("64→128 3×3/2 32²", 16, 64, 128, (32, 32), 3, 2, 1),
    case("128→256 3×3/2 16²", 16, 128, 256, (16, 16), 3, 2, 1),
    case("32→32 3×3 8²", 512, 32, 32, (8, 8), 3, 1, 1),
    case("64→64 3×3 8²", 128, 64, 64, (8, 8), 3, 1, 1),
    case("512→512 3×3 4²", 32, 512, 512, (4, 4), 3, 1, 1),
    case("6→16 5×5 14²", 256, 6, 16, (14, 14), 5),
    case("64→64 3×3 16² dilation 2", 32, 64, 64, (16, 16), 3, 1, 2, 2),
    case("patch 3→192 4×4/4 32²", 32, 3, 192, (32, 32), 4, 4),
    case("patch 3→192 16×16/16 224²", 16, 3, 192, (224, 224), 16, 16),
    case("stem 3→64 7×7/2 64²", 32, 3, 64, (64, 64), 7, 2, 3),
    case("depthwise 64 3×3 16²", 64, 64, 64, (16, 16), 3, 1, 1, 1, 64),
    case("depthwise 128 7×7 14²", 32, 128, 128, (14, 14), 7, 1, 3, 1, 128),
    case("depthwise 256 5×5 7²", 32, 256, 256, (7, 7), 5, 1, 2, 1, 256),
    case("grouped 64 in 8, 3×3 16²", 64, 64, 64, (16, 16), 3, 1, 1, 1, 8),
    case("grouped 128 in 2, 3×3 8²", 32, 128, 128, (8, 8), 3, 1, 1, 1, 2),
    case("64→256 1×1 16²", 32, 64, 256, (16, 16), 1),
    case("512→128 1×1 7²", 32, 512, 128, (7, 7), 1),
    case("32→16 1×1 16²", 256, 32, 16, (16, 16), 1),
    case("audio 1→64 80/4 4000", 32, 1, 64, (4000,), 80, 4, 38),
    case("audio 64→64 3 250 dilation 4", 32, 64, 64, (250,), 3, 1, 4, 4),
    case("audio 128→128 3 64", 128, 128, 128, (64,), 3, 1, 1),
    case("audio 32→64 8/4 500", 64, 32, 64, (500,), 8, 4, 2),
    case("1→16 3³ 16³", 16, 1, 16, (16, 16, 16), 3, 1, 1),
    case("16→32 3³/2 16³", 16, 16, 32, (16, 16, 16), 3, 2, 1),
    case("32→32 3³ 8³", 16, 32, 32, (8, 8, 8), 3, 1, 1),
    case("64→64 3³ 4³", 32, 64, 64, (4, 4, 4), 3, 1, 1),
)


def median_seconds(candidates: dict[str, Callable[[], object]], rounds: int) -> dict[str, float]:
    """Process time of each; the candidates take turns, after an unmeasured round."""
    for candidate in candidates.values():
        candidate()
    seconds: dict[str, list[float]] = {name: [] for name in candidates}
    for _ in range(rounds):
        best = min((min(times) for times in seconds.values() if times), default=math.inf)
        for name, candidate in candidates.items():
            if seconds[name] and min(seconds[name]) > HOPELESS * best:
                continue
            begin = time.process_time()
            candidate()
            seconds[name].append(time.process_time() - begin)
    return {name: statistics.median(times) for name, times in seconds.items()}


def measure(layer: Case, rounds: int) -> dict[str, Any]:
    """Milliseconds of the batched gradient and of each way, with what the rule says of them."""
    x, g = layer.operands()
    weights = torch.rand(layer.batch)

    def contribution(way: str | None) -> ConvolutionContribution:
        return ConvolutionContribution(x, g, layer.shape, layer.geometry, way=way)

    def both(way: str) -> None:
        one = contribution(way)
        one.norms_squared()
        one.weighted_sum(weights)

    candidates: dict[str, Callable[[], object]] = {
        way: lambda way=way: both(way)  # type: ignore[misc]
        for way in WAYS
        if way != "gram" or math.prod(layer.sizes) ** 2 * layer.groups * layer.batch <= MEMORY
    }
    parts: dict[str, Callable[[], object]] = {
        "batched": lambda: batched_gradient(x, g, layer.shape, layer.geometry),
        "sum": lambda: contribution("gram").weighted_sum(weights),
    }
    if "gram" in candidates:
        parts["gram norms"] = lambda: contribution("gram").norms_squared()
    milliseconds = {name: 1e3 * value for name, value in median_seconds({**parts, **candidates}, rounds).items()}
    kept = contribution("windows").keeps_gradients
    return {
        "layer": layer.name,
        "batch": layer.batch,
        "milliseconds": milliseconds,
        "predicted": {way: 1e-6 * layer.batch * layer.layer.nanoseconds(way, kept) for way in candidates},
        "picked": contribution(None).way,
        "kept": kept,
    }


def loss(row: dict[str, Any]) -> float:
    """Time of the way that was picked over that of the best."""
    times = of_ways(row)
    return times[row["picked"]] / min(times.values())


def of_ways(row: dict[str, Any]) -> dict[str, float]:
    """Milliseconds of each way that was measured."""
    return {name: float(value) for name, value in row["milliseconds"].items() if name in WAYS}


def show(rows: list[dict[str, Any]], console: Console) -> None:
    table = Table("layer", "batch", "batched ms", *WAYS, "kept", "picked / best", title="time over batched gradient")
    for row in rows:
        times = row["milliseconds"]
        cells = [
            f"{times[way] / times['batched']:.2f}{'*' if way == row['picked'] else ''}" if way in times else "–"
            for way in WAYS
        ]
        kept = "yes" if row["kept"] else "no"
        table.add_row(row["layer"], str(row["batch"]), f"{times['batched']:.2f}", *cells, kept, f"{loss(row):.2f}")
    console.print(table)
    losses = sorted(loss(row) for row in rows)
    console.print(f"picked over best: greatest {losses[-1]:.2f}, median {statistics.median(losses):.2f}")


def fit(rows: list[dict[str, Any]]) -> dict[str, list[float]]:
    """Nanoseconds a count that bring predictions closest to times, as ratios; the slower a way, the less it counts."""
    found = {}
    for way in RATES:
        counts, times, importance = [], [], []
        for layer, row in zip(CASES, rows, strict=True):
            milliseconds = row["milliseconds"]
            if way not in milliseconds:
                continue
            whole, best = milliseconds[way], min(of_ways(row).values())
            kept = row["kept"] and way in MATERIALIZING
            if way == "gram":
                norms = milliseconds["gram norms"]
            else:
                norms = whole if kept or way == "sum" else max(whole - milliseconds["sum"], 0.1 * whole)
            counts.append(np.array(layer.layer.counts(way, kept)) * layer.batch * 1e-6)
            times.append(norms)
            importance.append(1.0 if way == "sum" else min(1.0, best / whole))
        matrix, target, weight = np.array(counts), np.log(times), np.array(importance)

        def misfit(
            rates: np.ndarray, matrix: np.ndarray = matrix, target: np.ndarray = target, weight: np.ndarray = weight
        ) -> np.ndarray:
            misses: np.ndarray = weight * (np.log(matrix @ rates + 1e-9) - target)
            return misses

        start = nnls(matrix / np.array(times)[:, None], np.ones(len(times)))[0] + 1e-4
        solution = least_squares(misfit, start, bounds=(0, np.inf), x_scale=np.maximum(start, 1e-2), max_nfev=5000)
        found[way] = [float(f"{rate:.2g}") for rate in solution.x]
    return found


def show_blocks(console: Console, rounds: int) -> None:
    sizes = [2**power for power in (14, 16, 17, 18, 19, 20, 22, 40)]
    before = dict(convolution_gradients.CPU_BLOCK)
    for way in WAYS:
        table = Table("layer", *(f"2^{size.bit_length() - 1}" for size in sizes), title=f"{way}: ms of norms")
        for layer in CASES:
            if way == "gram" and math.prod(layer.sizes) ** 2 * layer.groups * layer.batch > MEMORY / 4:
                continue
            x, g = layer.operands()

            def norms(size: int, way: str = way, layer: Case = layer, x: Tensor = x, g: Tensor = g) -> None:
                convolution_gradients.CPU_BLOCK[way] = size
                ConvolutionContribution(x, g, layer.shape, layer.geometry, way=way).norms_squared()

            times = median_seconds({str(size): lambda size=size: norms(size) for size in sizes}, rounds)  # type: ignore[misc]
            table.add_row(f"{layer.name} ({layer.batch})", *(f"{1e3 * times[str(size)]:.2f}" for size in sizes))
        console.print(table)
    convolution_gradients.CPU_BLOCK.update(before)


def show_rounding(console: Console) -> None:
    """The greatest error of a norm from inner products, in the unit of which ROUNDINGS are allowed for."""
    table = Table("image", "positions", "error", title="error over eps (sum |p| |g|)²")
    geometry = Geometry(kernel_size=(3, 3), stride=(1, 1), padding=(1, 1), dilation=(1, 1), groups=1)
    for side in (4, 8, 16, 32):
        for kind in ("normal", "bright", "alternating", "smooth", "one number"):
            worst = 0.0
            for channels in (1, 16, 256):
                x, g = torch.randn(4, 1, channels, side, side), torch.randn(4, 1, channels, side, side)
                waves = torch.linspace(-3, 3, side * side).view(side, side)
                if kind == "bright":
                    x, g = 10 + 0.1 * x, g - g.mean((3, 4), keepdim=True)
                if kind == "alternating":
                    x, g = 1 + 1e-3 * x, g[..., :1, :1] * (-1.0) ** torch.arange(side * side).view(side, side)
                if kind == "smooth":
                    x, g = waves.cos() + 0 * x, waves.sin() + 0 * g
                if kind == "one number":
                    x, g = x[..., :1, :1].expand_as(x), g[..., :1, :1].expand_as(g)
                exact, _ = convolution_gram.gram_norms(x.double(), g.double(), geometry)
                found, error = convolution_gram.gram_norms(x, g, geometry)
                unit = error.double() / convolution_gram.ROUNDINGS
                worst = max(worst, ((found.double() - exact).abs() / unit).max().item())
            table.add_row(kind, str(side * side), f"{worst:.3f}")
    console.print(table)


def main() -> None:
    """Measure, print, and write only where --output says."""
    parser = argparse.ArgumentParser(description="Ways to per-sample gradients of convolutions.")
    parser.add_argument("--rounds", type=int, default=ROUNDS, help=f"measured rounds (default {ROUNDS})")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", default="", help="layers with this in their name")
    parser.add_argument("--fit", action="store_true", help="fit the rule's constants to the times")
    parser.add_argument("--blocks", action="store_true", help="try sizes of blocks instead")
    parser.add_argument("--rounding", action="store_true", help="measure rounding instead")
    parser.add_argument("--output", type=Path, nargs="?", const=RESULTS / "convolution_rules.json", help="write JSON")
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    console = Console(width=None if Console().is_terminal else 140)
    if options.blocks:
        return show_blocks(console, options.rounds)
    if options.rounding:
        return show_rounding(console)
    rows = [measure(layer, options.rounds) for layer in CASES if options.only in layer.name]
    show(rows, console)
    if options.fit:
        console.print_json(data=fit(rows))
    if options.output is not None:
        record = {"environment": environment(), "rounds": options.rounds, "layers": rows}
        options.output.write_text(json.dumps(record, indent=2, ensure_ascii=False) + "\n")


if __name__ == "__main__":
    main()
