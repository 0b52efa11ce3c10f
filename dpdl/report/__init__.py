"""A run to look at: its report as text, as a page and as JSON with a schema; tables and plots."""

from dpdl.report.page import report_page
from dpdl.report.plot import plot_history
from dpdl.report.schema import SCHEMA_FILE, report_schema
from dpdl.report.table import result_table
from dpdl.report.text import report_text

__all__ = ["SCHEMA_FILE", "plot_history", "report_page", "report_schema", "report_text", "result_table"]
