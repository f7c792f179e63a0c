"""One network for the whole chain: ADM, P2 weighting, and every baseline."""

from expertdiff.diffusion.partition import Interval
from expertdiff.methods.base import Method


class Diffusion(Method):
    """A single network that denoises everywhere; see `Method` for its arguments."""

    @property
    def interval(self) -> Interval:
        return Interval(0.0, 1.0)

    @property
    def job(self) -> str:
        return "baseline"


class Shared(Diffusion):
    """What the experts of a study have in common: they start from its weights."""

    @property
    def job(self) -> str:
        return "shared"
