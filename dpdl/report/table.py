"""The closing table of a training run."""

from __future__ import annotations

from rich.table import Table

from dpdl.privacy_report import rounded_down, rounded_up, shown_delta
from dpdl.training import TrainingResult

__all__ = ["result_table"]


def result_table(result: TrainingResult) -> Table:
    """What `result` has reached and what that cost, one quantity a row. Bounds are rounded to the safe side."""
    report, plan = result.report, result.plan
    table = Table(title="Private training" if result.completed else "Private training, stopped early")
    table.add_column("quantity", style="bold")
    table.add_column("value")
    if result.history:
        accuracy = result.history[-1].test_accuracy
        table.add_row("test accuracy", f"{accuracy:.2%} of {result.test_images:,} images")
    table.add_row("epsilon", f"<= {rounded_up(report.epsilon, 4)} (at least {rounded_down(report.epsilon_lower, 4)})")
    table.add_row("delta", shown_delta(report.delta))
    table.add_row("noise multiplier", f"{plan.noise_multiplier:.6g}")
    table.add_row("clipping norm", f"{plan.max_grad_norm:g}")
    table.add_row("sampling", report.sampling)
    table.add_row("relation", report.relation)
    table.add_row("unit", report.unit)
    table.add_row("steps", f"{report.steps:,} of {report.planned_steps:,}")
    table.add_row("accountant", report.accountant)
    table.add_row("engine", result.engine or "none yet")
    table.add_row("time", f"{result.seconds:.0f} s")
    for note in report.notes:
        table.add_row("note", note)
    return table
