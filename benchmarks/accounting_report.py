"""Answers scored against certified intervals, and the tables that `benchmarks.accounting` prints."""

from __future__ import annotations

import math
import statistics
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

OURS = "accountants PRV"
AS_TIGHT = 1e-3  # a peer whose answer is at most this much above ours, relative, counts as equally tight
TOLERANCE = 1e-4  # relative looseness that counts as a miss of the default engine
ROUNDING = 1e-9  # of 1 + epsilon, allowed before a bound counts as unsound

NOT_ASKED = {"status": "-", "upper": None}


@dataclass(frozen=True, kw_only=True)
class Row:
    """A composition and its tight epsilon, known to lie in [low, high]."""

    id: str
    mechanisms: list[dict[str, Any]]
    relation: str
    delta: float
    low: float
    high: float


def score(row: Row, engine: str, answer: Mapping[str, Any]) -> dict[str, Any]:
    """An answer with its errors, relative to the nearer end of the true interval; negative errors are unsound.

    upper_error is how far the upper bound is above the truth, lower_error how far the lower bound is below it; 0
    inside of the true interval, None without a bound.
    """
    result = {"row": row.id, "engine": engine, "true_low": row.low, "true_high": row.high, **answer}
    result["upper_error"] = _error(row, answer["upper"])
    lower = _error(row, answer["lower"])
    result["lower_error"] = None if lower is None else -lower
    slack = ROUNDING * (1 + row.high)
    upper_is_low = answer["upper"] is not None and not answer["upper"] >= row.low - slack
    lower_is_high = answer["lower"] is not None and not answer["lower"] <= row.high + slack
    result["unsound"] = upper_is_low or lower_is_high
    return result


def _error(row: Row, value: float | None) -> float | None:
    if value is None:
        return None
    if value > row.high:
        return value / row.high - 1
    return value / row.low - 1 if value < row.low else 0.0


def summary(rows: Iterable[Mapping[str, Any]]) -> dict[str, dict[str, Any]]:
    """By engine: counts of every outcome, looseness of sound bounds, and seconds."""
    engines: dict[str, list[Mapping[str, Any]]] = {}
    for row in rows:
        engines.setdefault(row["engine"], []).append(row)
    return {engine: _summary(mine) for engine, mine in engines.items()}


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    answered = [row for row in rows if row["status"] == "ok"]
    errors = [row["upper_error"] for row in answered if not row["unsound"]]
    lower = [row["lower_error"] for row in answered if row["lower_error"] is not None and not row["unsound"]]
    return {
        "rows": len(rows),
        **{status: sum(row["status"] == status for row in rows) for status in ("unsupported", "failed", "timeout")},
        "unsound": sum(row["unsound"] for row in answered),
        "with_warnings": sum(bool(row["warnings"]) for row in rows),
        "median_looseness": statistics.median(errors) if errors else None,
        "worst_looseness": max(errors, default=None),
        "worst_lower_looseness": max(lower, default=None),
        "median_cpu_s": statistics.median(row["cpu_s"] for row in answered) if answered else None,
        "worst_cpu_s": max((row["cpu_s"] for row in answered), default=None),
    }


def is_miss(row: Mapping[str, Any]) -> bool:
    """Unsound, failed or out of time; of the default engine, also loose, refused, or with a warning."""
    if row["unsound"] or row["status"] in ("failed", "timeout"):
        return True
    if row["engine"] != OURS:
        return False
    loose = max(row["upper_error"] or 0.0, row["lower_error"] or 0.0) > TOLERANCE
    return loose or row["status"] != "ok" or bool(row["warnings"])


def misses_table(rows: Sequence[Mapping[str, Any]]) -> str:
    """Every miss, one a line."""
    lines = [
        (
            row["row"],
            row["engine"],
            "UNSOUND" if row["unsound"] else row["status"] if row["status"] != "ok" else "loose or warned",
            _interval(row["lower"], row["upper"]),
            _interval(row["true_low"], row["true_high"]),
            "; ".join([row["text"], *row["warnings"]]).strip("; ")[:70],
        )
        for row in rows
        if is_miss(row)
    ]
    title = f"Misses ({len(lines)} of {len(rows)} answers; of {OURS} also what is looser than {TOLERANCE:g})"
    return _table(title, ("row", "engine", "miss", "answer", "truth", "text"), lines)


def cases_table(cases: Mapping[str, Mapping[str, Any]], imports: Mapping[str, float]) -> str:
    """Median CPU seconds and the answers, engines across; last, the fastest equally tight peer over ours."""
    engines = list(next(iter(cases.values())))
    lines = []
    for name, answers in cases.items():
        mine = [answers.get(engine, NOT_ASKED) for engine in engines]
        lines.append((name, *map(_seconds, mine), _advantage(answers)))
        lines.append(("", *(_number(answer["upper"]) for answer in mine), ""))
    text = _table("CPU seconds from empty caches, and the answer below", ("case", *engines, "as tight"), lines)
    return text + "\n\nimport, CPU seconds: " + ", ".join(f"{name} {s:.2f}" for name, s in imports.items())


def summary_table(engines: Mapping[str, Mapping[str, Any]]) -> str:
    """One line an engine."""
    columns = list(next(iter(engines.values())))
    lines = [(engine, *(_number(values[column]) for column in columns)) for engine, values in engines.items()]
    return _table("By engine, over the rows", ("engine", *(c.replace("_", " ") for c in columns)), lines)


def _advantage(answers: Mapping[str, Mapping[str, Any]]) -> str:
    ours = answers[OURS]
    if ours["status"] != "ok":
        return ours["status"]
    times = [
        answer["cpu_s"]
        for engine, answer in answers.items()
        if not engine.startswith("accountants")
        and answer["status"] == "ok"
        and answer["upper"] <= ours["upper"] * (1 + AS_TIGHT)
    ]
    return f"{min(times) / ours['cpu_s']:.1f}x" if times else "none"


def _seconds(answer: Mapping[str, Any]) -> str:
    if answer["status"] == "ok":
        return f"{answer['cpu_s']:.4f}" if answer["cpu_s"] < 1 else f"{answer['cpu_s']:.1f}"
    return answer["text"] if answer["status"] == "timeout" else answer["status"]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.4g}" if isinstance(value, float) and not math.isinf(value) else str(value)


def _interval(low: float | None, high: float | None) -> str:
    if high is None:
        return "-"
    return f"{high:.8g}" if low is None else f"[{low:.8g}, {high:.8g}]"


def _table(title: str, head: Sequence[str], lines: Sequence[Sequence[str]]) -> str:
    widths = [max(len(line[i]) for line in (head, *lines)) for i in range(len(head))]
    rows = ["  ".join(cell.ljust(width) for cell, width in zip(line, widths, strict=True)) for line in (head, *lines)]
    return "\n".join([title, *(row.rstrip() for row in rows)])
