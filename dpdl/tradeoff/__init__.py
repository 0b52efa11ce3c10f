"""What privacy costs on your data: training at several budgets, the rows, the plot, and the price of choosing."""

from dpdl.tradeoff.point import Outcome, Point, Train
from dpdl.tradeoff.result import SweepResult
from dpdl.tradeoff.row import Row
from dpdl.tradeoff.selection import Selection, epsilon_of_selection
from dpdl.tradeoff.summary import Summary
from dpdl.tradeoff.sweep import sweep

__all__ = ["Outcome", "Point", "Row", "Selection", "Summary", "SweepResult", "Train", "epsilon_of_selection", "sweep"]
