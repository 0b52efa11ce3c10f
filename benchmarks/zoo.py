"""Which engine takes which real architecture, and how exactly: transformers, timm and PEFT, tiny and untrained.

    python -m benchmarks.zoo                                  # writes benchmarks/results/zoo.json
    python -m benchmarks.zoo --markdown docs/zoo.md           # and the table for the documentation
    python -m benchmarks.zoo --only swin --only mixtral       # these models, nothing is written

Every engine is compared with plain autograd, one example at a time, in float64; then in float32, on norms and clipped
sums. Models are of random weights, built from configurations: nothing is downloaded. Needs transformers, timm and peft;
a library that is missing is left out.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from rich.progress import track

from benchmarks.environment import PACKAGES, RESULTS, environment
from tests.zoo import (
    adapters,
    audio_and_series,
    decoders,
    encoder_decoders,
    encoders,
    mixtures,
    multimodal,
    pytorch_image_models,
    state_space,
    vision,
)
from tests.zoo.model import ZooModel, parameter_count
from tests.zoo.outcome import Outcome, outcome_of, truth_of

TABLES = {
    "transformers": (encoders, decoders, mixtures, state_space, encoder_decoders, vision, multimodal, audio_and_series),
    "timm": (pytorch_image_models,),
    "peft": (adapters,),
}
ENGINES = ("tape", "vmap", "loop")


@dataclass(frozen=True, kw_only=True)
class Row:
    """One model.

    Attributes:
        parameters: numbers to train.
        batch_effect: relative difference between an example's output in the batch and alone.
        float64, float32: outcome by engine; float32 for the first engine that is exact in float64.
    """

    library: str
    model: str
    family: str
    mode: str
    notes: str
    parameters: int
    batch_effect: float
    float64: dict[str, Outcome]
    float32: dict[str, Outcome]

    @property
    def taken_by(self) -> str | None:
        """The first engine, in the order of speed, that is exact."""
        return next((engine for engine in ENGINES if self.float64[engine].verdict == "exact"), None)

    @property
    def largest_error(self) -> float:
        """Of the engine that takes the model, in float64."""
        return (self.float64[self.taken_by].error or 0.0) if self.taken_by else float("nan")


def measured(library: str, model: ZooModel) -> Row:
    truth = truth_of(model)
    float64 = {engine: outcome_of(model, truth, engine=engine) for engine in ENGINES}
    exact = next((engine for engine in ENGINES if float64[engine].verdict == "exact"), None)
    float32: dict[str, Outcome] = {}
    if exact is not None:
        rounded = truth_of(model, torch.float32)
        float32[exact] = outcome_of(model, rounded, engine=exact, dtype=torch.float32)
    return Row(
        library=library,
        model=model.name,
        family=model.family,
        mode=model.mode,
        notes=model.notes,
        parameters=parameter_count(model.module()),
        batch_effect=truth.batch_effect,
        float64=float64,
        float32=float32,
    )


def markdown(rows: Sequence[Row]) -> str:
    """The table for the documentation."""
    lines = [
        "# Architectures",
        "",
        "Made by `python -m benchmarks.zoo --markdown docs/zoo.md`: tiny models of random weights, every engine",
        "against plain autograd one example at a time. *Exact*: the largest error of any example's gradient for any",
        "parameter, over the norm of that example's whole gradient, is at most 1e-10 in float64, and norms and",
        "clipped sums are right to 1e-4 in float32.",
        "",
    ]
    for library in dict.fromkeys(row.library for row in rows):
        ours = [row for row in rows if row.library == library]
        taken = Counter(row.taken_by or "no engine" for row in ours)
        counts = ", ".join(f"{engine} {taken[engine]}" for engine in (*ENGINES, "no engine") if taken[engine])
        lines += [
            f"## {library}: {len(ours)} models ({counts})",
            "",
            "| model | kind | parameters | exact by | error, float64 | error, float32 | why not the tape; notes |",
            "| --- | --- | --- | --- | --- | --- | --- |",
        ]
        lines += [_line(row) for row in ours]
        lines.append("")
    return "\n".join(lines)


def _line(row: Row) -> str:
    engine = row.taken_by
    reason = "" if engine == "tape" else _short(row.float64["tape"].reason)
    remarks = "; ".join(part for part in (reason, row.notes, "eval mode" if row.mode == "eval" else "") if part)
    single = row.float32[engine].error if engine else None
    errors = f"{row.largest_error:.0e} | {'' if single is None else f'{single:.0e}'}" if engine else "|"
    return f"| {row.model} | {row.family} | {row.parameters:,} | {engine or 'refused'} | {errors} | {remarks} |"


def _short(reason: str) -> str:
    """One line of a table."""
    short = reason.replace("|", "/").split(" Use Execution(")[0]
    return short if len(short) <= 200 else short[:197] + "..."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--only", action="append", metavar="MODEL", help="measure this model only; writes nothing")
    parser.add_argument("--out", type=Path, default=RESULTS / "zoo.json")
    parser.add_argument("--markdown", type=Path, help="also write the table here")
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    models = [
        (library, model)
        for library, tables in TABLES.items()
        if importlib.util.find_spec(library) is not None
        for table in tables
        for model in table.MODELS
        if not arguments.only or model.name in arguments.only
    ]
    console = Console()
    rows: list[Row] = []
    for library, model in track(models, console=console, disable=not console.is_terminal):
        row = measured(library, model)
        rows.append(row)
        if row.taken_by != "tape" or arguments.only:
            console.print(f"{library} {model.name}: {row.taken_by or 'no engine'}", *_reasons(row), sep="\n  ")
    if arguments.only:
        return
    record: dict[str, Any] = {"environment": environment((*PACKAGES, "transformers", "timm", "peft"))}
    record["rows"] = [{**asdict(row), "exact_by": row.taken_by} for row in rows]
    arguments.out.parent.mkdir(exist_ok=True)
    arguments.out.write_text(json.dumps(record, indent=1) + "\n")
    if arguments.markdown:
        arguments.markdown.write_text(markdown(rows))


def _reasons(row: Row) -> list[str]:
    outcomes = [*row.float64.items(), *((f"{engine}, float32", o) for engine, o in row.float32.items())]
    return [
        f"{name}: {o.verdict} {'' if o.error is None else f'{o.error:.0e} '}{_short(o.reason)}" for name, o in outcomes
    ]


if __name__ == "__main__":
    main()
