"""What a sweep found: rows, their means over seeds, and what looking at them costs; as table, CSV, JSON and plot."""

from __future__ import annotations

import csv
import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from dpdl.privacy_report import rounded_up, shown_delta
from dpdl.tradeoff.journal import SCHEMA
from dpdl.tradeoff.plot import plot_trade_off
from dpdl.tradeoff.row import COLUMNS, Row
from dpdl.tradeoff.selection import Selection
from dpdl.tradeoff.summary import Summary, summaries

__all__ = ["SweepResult"]


@dataclass(frozen=True, kw_only=True, eq=False)
class SweepResult:
    """The rows of a sweep; of one with private selection, the chosen row alone.

    Attributes:
        rows: in the order in which they were asked for.
        asked: the sweep's settings, as plain values.
        delta: at which every epsilon is.
        epsilon_of_all: upper bound on publishing all private rows, or on picking one by looking at all; with private
            selection, that of the selection.
        remarks: what a reader must know; it stands in every output.
        selection: the claim of the chosen row, if one was chosen privately.
    """

    rows: tuple[Row, ...]
    asked: Mapping[str, Any]
    delta: float
    epsilon_of_all: float
    remarks: tuple[str, ...]
    selection: Selection | None = None

    @property
    def failed(self) -> tuple[Row, ...]:
        """Rows that ended with an error."""
        return tuple(row for row in self.rows if row.failed)

    @property
    def summaries(self) -> tuple[Summary, ...]:
        """Mean and standard deviation over the seeds of each setting; failed rows are not in them."""
        return summaries(self.rows)

    def table(self) -> Table:
        """One line a setting: epsilon rounded up, the score as mean +- standard deviation over seeds."""
        chosen = self.selection is not None
        title = "The run that was chosen privately" if chosen else "Privacy and accuracy"
        table = Table(title=title, caption="\n".join(_sentence(remark) for remark in self.remarks))
        table.caption_justify = "left"
        varied = _varied(self.summaries)
        for column in ("epsilon", *varied, "noise", "score", "runs"):
            table.add_column(column, justify="right")
        for group in self.summaries:
            spread = "" if group.sd is None else f" ± {group.sd:.4f}"
            epsilon = group.epsilon if self.selection is None else self.selection.epsilon
            table.add_row(
                f"<= {rounded_up(epsilon)}" if group.private else "no guarantee",
                *(_shown(getattr(group, name)) for name in varied),
                f"{group.noise_multiplier:.4g}",
                f"{group.mean:.4f}{spread}",
                str(group.runs),
            )
        for row in self.failed:
            table.add_row("failed", *("" for _ in varied), "", row.key, "")
        return table

    def to_dict(self) -> dict[str, Any]:
        """Everything as plain values; an infinity is the string "inf"."""
        return {
            "schema": SCHEMA,
            "remarks": [_sentence(remark) for remark in self.remarks],
            "delta": self.delta,
            "epsilon_of_all": "inf" if self.epsilon_of_all == math.inf else self.epsilon_of_all,
            "asked": dict(self.asked),
            "selection": None if self.selection is None else self.selection.to_dict(),
            "summaries": [
                {name: "inf" if value == math.inf else value for name, value in asdict(group).items()}
                for group in self.summaries
            ],
            "rows": [row.to_dict() for row in self.rows],
        }

    def to_json(self, path: str | Path | None = None) -> str:
        """The whole as JSON (schema "dpdl.sweep/1"); written to `path` if one is given."""
        text = json.dumps(self.to_dict(), indent=2, allow_nan=False)
        if path is not None:
            Path(path).write_text(text + "\n")
        return text

    def to_csv(self, path: str | Path) -> None:
        """Write a file at `path`: the remarks as lines that begin with "#", and a line for each row.

        A metric m is the column metric_m.
        """
        metrics = sorted({name for row in self.rows for name in row.metrics})
        with Path(path).open("w", newline="") as file:
            file.writelines(f"# {_sentence(remark)}\n" for remark in self.remarks)
            writer = csv.writer(file, lineterminator="\n")
            writer.writerow((*COLUMNS, *(f"metric_{name}" for name in metrics)))
            for row in self.rows:
                values = row.to_dict()
                writer.writerow([*(values[name] for name in COLUMNS), *(row.metrics.get(name) for name in metrics)])

    def plot(self, path: str | Path, *, title: str = "What privacy costs", score: str = "score") -> None:
        """Write a figure: score over epsilon, error bars over seeds, the non-private line.

        Args:
            path: where to; its suffix chooses the format (.png, .pdf, .svg).
            title: above it.
            score: what the score is, at the axis.

        Raises:
            DataError: matplotlib is not installed.
            ParameterError: no private row is there to show, the one that is was chosen privately, or the file cannot
                be written.
        """
        remarks = tuple(_sentence(remark) for remark in self.remarks)
        at = shown_delta(self.delta)
        rows = () if self.selection is not None else self.summaries
        plot_trade_off(rows, path, title=title, score=score, delta=at, remarks=remarks)


def _sentence(remark: str) -> str:
    return f"{remark[0].upper()}{remark[1:]}."


def _shown(value: float | None) -> str:
    return "" if value is None else "none" if value == math.inf else f"{value:g}"


def _varied(groups: tuple[Summary, ...]) -> tuple[str, ...]:
    """Settings worth a column: all that differ, and the clipping norm."""
    names = ("max_grad_norm", "batch_size", "lr")
    return tuple(n for n in names if n == "max_grad_norm" or len({getattr(group, n) for group in groups}) > 1)


def written(result: SweepResult, folder: Path) -> list[str]:
    """Write rows.csv and sweep.json, or selected.json, into a folder; their names."""
    if result.selection is not None:
        result.to_json(folder / SELECTED)
        return [SELECTED]
    result.to_csv(folder / CSV)
    result.to_json(folder / JSON)
    return [CSV, JSON]


CSV, JSON, SELECTED = "rows.csv", "sweep.json", "selected.json"
