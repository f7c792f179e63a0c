"""One HTML page a study: what was compared, what came out, what it cost, how it was measured."""

from expertdiff.report.figures import chain_figure
from expertdiff.report.page import write_report

__all__ = ["chain_figure", "write_report"]
