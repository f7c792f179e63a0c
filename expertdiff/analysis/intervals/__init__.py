"""Where to cut a chain into intervals: published rules, and a comparison of them.

Importing them here lets the command line find each by its bare class name.
"""

from expertdiff.analysis.intervals.attention import AttentionConcentration
from expertdiff.analysis.intervals.base import IntervalMethod, Selection
from expertdiff.analysis.intervals.gradients import GradientSimilarity
from expertdiff.analysis.intervals.optimal import OptimalDenoiser
from expertdiff.analysis.intervals.schedule import LogSNR, UniformLength
from expertdiff.analysis.intervals.selection import every, select

__all__ = [
    "AttentionConcentration",
    "GradientSimilarity",
    "IntervalMethod",
    "LogSNR",
    "OptimalDenoiser",
    "Selection",
    "UniformLength",
    "every",
    "select",
]
