"""A run to look at: tables and plots."""

from dpdl.report.plot import plot_history
from dpdl.report.table import result_table

__all__ = ["plot_history", "result_table"]
