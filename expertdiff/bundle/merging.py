"""One network of several that began as one (Decouple-then-Merge, arXiv 2410.06664)."""

import math
from collections.abc import Sequence

from torch import Tensor

from expertdiff.bundle.expert import Expert, check_together
from expertdiff.diffusion.partition import Interval


class Merger:
    """Goes from one network towards others: theta_0 + sum_i w_i (theta_i - theta_0).

    Networks that began apart cannot be averaged: the mean of two is a network that does neither.

    Args:
        origin: what all of them were started from (``model.init_from``).
        experts: trained from there, of any intervals.

    Raises:
        ValueError: nothing to merge, an expert of another origin, one that does not fit, or an
            origin of a part of the chain.
    """

    def __init__(
        self, origin: Expert, experts: Sequence[Expert], allow_unfinished: bool = False
    ) -> None:
        if not experts:
            raise ValueError("no expert was given: name those that were trained from the origin")
        for expert in experts:
            if (began := expert.identity.get("init_from")) != origin.sha256:
                where = f"from another file ({began[:12]})" if began else "from random weights"
                raise ValueError(
                    f"{expert.path} was trained {where}, not from {origin.path} "
                    f"({origin.sha256[:12]}), and only what began as one network can be merged: "
                    "name what its model.init_from was, and experts that started there"
                )
        if not origin.identity:  # a file of another project is of the whole chain
            origin.identity = experts[0].identity | {"interval": [0, 1], "partition": [0, 1]}
        if origin.interval != Interval():
            raise ValueError(
                f"{origin.path} acts in {origin.interval}, and a merged network acts everywhere: "
                "merge what began as a network of the whole chain"
            )
        check_together([origin, *experts], allow_unfinished)
        self.origin, self.experts = origin, list(experts)

    def weights(self, shares: Sequence[float]) -> dict[str, Tensor]:
        """The merged network's, where each expert has this share; 0 of all is the origin.

        Raises:
            ValueError: not one share an expert, or one that is not finite.
        """
        if len(shares) != len(self.experts):
            raise ValueError(
                f"shares {list(shares)} are not one for each of the {len(self.experts)} experts"
            )
        if not all(map(math.isfinite, shares)):
            raise ValueError(f"shares {list(shares)} must be finite: give numbers about 0 to 1")
        merged = dict(self.origin.weights)
        for share, expert in zip(shares, self.experts):
            if share:
                for key, first in self.origin.weights.items():
                    merged[key] = merged[key] + share * (expert.weights[key] - first)
        return merged

    def merged(self, shares: Sequence[float]) -> Expert:
        """The merged network, to be written as a bundle's only expert."""
        step = self.origin.step + sum(expert.step for expert in self.experts)
        parts = [
            {"path": str(e.path), "sha256": e.sha256, "step": e.step, "share": float(share)}
            for e, share in zip(self.experts, shares)
        ]
        identity = self.origin.identity | {"job": "merged", "max_steps": step, "merged": parts}
        return Expert(self.origin.path, identity, step, self.origin.sha256, self.weights(shares))
