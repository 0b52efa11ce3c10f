"""The sections of the page of benchmarks: what each is about, its command and file, and how its figures read."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from benchmarks import page_accuracy, page_speed

__all__ = ["SECTIONS", "Section"]


@dataclass(frozen=True, kw_only=True)
class Section:
    """One benchmark on the page.

    Attributes:
        title: its heading.
        what: one paragraph: what is measured, and how to read it.
        command: that makes the file.
        file: in benchmarks/results/.
        text: tables and words from what the file holds.
        chart: the chart's file name in docs/charts/, if it has one.
        alt: what one sees there, in words.
    """

    title: str
    what: str
    command: str
    file: str
    text: Callable[[Mapping[str, Any]], str]
    chart: str | None = None
    alt: str = ""


SECTIONS = (
    Section(
        title="Engines: the time of a private step",
        what=(
            "A step with per-example clipping and secure noise, over the plain step of the same model in the same "
            "run: 1 would be free. The floor is a plain step plus one normal number for each parameter."
        ),
        command="python -m benchmarks.engines",
        file="engines.json",
        text=page_speed.engines,
        chart="engines.svg",
        alt="Bars by model and engine: time of a private step over the plain step, with marks at the targets",
    ),
    Section(
        title="Models: what runs, and by which engine",
        what=(
            "Tiny versions of models of transformers, timm and PEFT; each engine's per-example gradients beside "
            "plain autograd, one example at a time, in float64."
        ),
        command="python -m benchmarks.zoo",
        file="zoo.json",
        text=page_speed.zoo,
    ),
    Section(
        title="Noise",
        what=(
            "Milliseconds for a million secure normal numbers, beside torch's own, which are neither secure nor "
            "private."
        ),
        command="python -m benchmarks.noise --out benchmarks/results/noise.json",
        file="noise.json",
        text=page_speed.noise,
    ),
    Section(
        title="Accounting: tightness and time",
        what=(
            "43 compositions whose epsilon is known to a certified interval, asked of every library that is "
            "installed, and everyday questions with the processor time that they take from empty caches. "
            "Looseness is how far an upper bound is above the truth, relative; an answer below the truth is "
            "unsound, whatever its speed."
        ),
        command="python -m benchmarks.accounting",
        file="accounting.json",
        text=page_accuracy.accounting,
        chart="accounting.svg",
        alt="Bars by question and library: processor seconds on a logarithmic axis",
    ),
    Section(
        title="Accuracy: MNIST at epsilon below 3",
        what=(
            "The network and setting of Tramèr and Boneh (ICLR 2021), end to end, with Poisson batches, secure "
            "noise, and pixels in [-1, 1]: one run. Their table says 98.1 % at epsilon 3, delta 1e-5."
        ),
        command="python -m benchmarks.mnist_accuracy --data DIR",
        file="mnist_accuracy.json",
        text=page_accuracy.mnist,
        chart="mnist_accuracy.svg",
        alt="Test accuracy over epsilon as training goes on, with a mark at the published figure",
    ),
    Section(
        title="Federated learning: accuracy by scheme",
        what=(
            "Full MNIST over clients with uneven labels. Under each scheme another thing is protected: one record "
            "at its client, a whole client by the server, both, or each update before it leaves. `none` is what "
            "all of it costs."
        ),
        command="DPDL_DATA=DIR python -m benchmarks.federated",
        file="federated.json",
        text=page_accuracy.federated,
        chart="federated.svg",
        alt="Bars of test accuracy by scheme, two runs each",
    ),
    Section(
        title="Split learning: accuracy, epsilon and what a decoder recovers",
        what=(
            "One client's 6,000 images, a server that sees activations, and an attacker that learns to turn them "
            "back into images. The last column is the share of the images' variance that it recovers: one "
            "attack's success, which bounds nothing. Epsilon at delta 1e-5, of a record; without a bound no "
            "attacker is held off."
        ),
        command="python -m benchmarks.split_accuracy --data DIR",
        file="split_accuracy.json",
        text=page_accuracy.split,
        chart="split_accuracy.svg",
        alt="Bars by run: test accuracy, and the share of the images' variance that the decoder recovers",
    ),
    Section(
        title="Split learning: bytes and arithmetic of a client",
        what=(
            "Counted, not measured, beside the two tables of Vepakomma et al. (arXiv:1812.00564). Each scheme has "
            "one unknown, which is fitted to the figure for 100 clients; the figure for 500 is then a prediction."
        ),
        command="python -m benchmarks.split_cost --out benchmarks/results/split_cost.json",
        file="split_cost.json",
        text=page_speed.split_cost,
        chart="split_cost.svg",
        alt="Bars of teraflops and gigabytes of one client, calculated, with crosses at the published figures",
    ),
    Section(
        title="Split learning: the time of a private step",
        what=(
            "The same network whole, in two parts in one process, and in two processes over mutual TLS; wall time, 64 "
            "expected rows of 1,568 numbers over the cut."
        ),
        command="python -m benchmarks.split_step --out benchmarks/results/split_step.json",
        file="split_step.json",
        text=page_speed.split_step,
    ),
    Section(
        title="Split learning: what a channel adds",
        what=("Milliseconds beyond the same call within the process, for 401 kB each way over the loopback."),
        command="python -m benchmarks.split_channel --out benchmarks/results/split_channel.json",
        file="split_channel.json",
        text=page_speed.split_channel,
    ),
    Section(
        title="Audit: what attacks find",
        what=(
            "Lower bounds on epsilon by attack, for training as it should be and with planted faults. A correct "
            "run stays below its claim; a fault should not. An attack that fails proves nothing."
        ),
        command="python -m benchmarks.audit --data DIR",
        file="audit.json",
        text=page_accuracy.audit,
        chart="audit.svg",
        alt="Bars by fault: the epsilon that the audit finds, with marks at the claims",
    ),
)
