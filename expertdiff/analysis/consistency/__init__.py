"""Whether two models turn the same noise into the same samples, and which interval decides it."""

from expertdiff.analysis.consistency.verb import consistency

__all__ = ["consistency"]
