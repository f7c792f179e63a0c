"""Guidance by a trained discriminator (Kim et al. 2023, arXiv 2211.17091)."""

import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from expertdiff.bundle import Bundle
from expertdiff.describe import describe, differences
from expertdiff.diffusion.denoiser import Denoiser, Logit
from expertdiff.diffusion.guidance import Discriminated, Guidance
from expertdiff.experts.routed import RoutedExperts, by_owner
from expertdiff.files import sha256_of


class Discriminator(Guidance):
    """Towards what a classifier takes for real: eps - weight sigma grad_x logit(x_t, t).

    A call costs the model's, and one forward and backward pass of the classifier. Heun's second
    call of a step is not guided, so that a weight counts half there.

    Args:
        path: the bundle of one discriminator or one an interval, as `Discrimination` trains them.
        weight: 1 corrects a model by what the classifier has seen; 0 is the model as it is, bit
            for bit, and a negative one goes away from the data. Published: 2, of Heun's sampler.
        sha256: of its manifest; another one is refused. By default whichever is there, and then
            written down with this guidance.

    Raises:
        ValueError: a weight that is not finite, no bundle of discriminators, or another one.
    """

    def __init__(self, path: Path, weight: float = 1.0, sha256: str | None = None) -> None:
        if not math.isfinite(weight):
            raise ValueError(f"guidance weight {weight} must be finite: 0 does not guide")
        self.path, self.weight, self.bundle = path, weight, Bundle.load(path)
        if self._shared["prediction"] != describe(Logit()):
            raise ValueError(
                f"{path} is no discriminator: train one with `expertdiff fit --model "
                "Discrimination`, and stitch it"
            )
        found = sha256_of(Path(path) / "manifest.json")
        if sha256 not in (None, found):
            raise ValueError(
                f"{path} is another discriminator ({found[:12]}) than the one asked for "
                f"({sha256[:12]}): put that one there, or leave sha256 out"
            )
        self._arguments["sha256"] = found

    @property
    def _shared(self) -> dict[str, Any]:
        return self.bundle.manifest["shared"]

    def check(self, data: Mapping[str, Any]) -> None:
        ours = self._shared["data"]
        for key in ("shape", "scale"):
            if data[key] != ours[key]:
                raise ValueError(
                    f"the discriminator {self.path} knows data of {key} {ours[key]}, the model "
                    f"draws {data[key]}: train one on the model's own samples"
                )

    def __call__(self, denoiser: Denoiser) -> Denoiser:
        """The guided denoiser; `denoiser` itself at weight 0.

        Raises:
            ValueError: it has another noise process, or a flow in front.
        """
        if denoiser.flow is not None:
            raise ValueError(
                f"the discriminator {self.path} knows noised data, but the model noises what a "
                "flow makes of them: guide a model without a flow"
            )
        theirs = describe(denoiser.process)
        if changed := differences(theirs, self._shared["process"], "process"):
            raise ValueError(
                f"the discriminator {self.path} was trained on other noise than the model "
                f"({'; '.join(changed)}): train one with the model's process"
            )
        if self.weight == 0:
            return denoiser
        return Discriminated(denoiser, RoutedLogit(self.bundle.denoiser), self.weight)


class RoutedLogit(nn.Module):
    """The logit [B] of each x_t [B, ...], by the discriminator that owns its t [B].

    Args:
        discriminators: of a bundle, whose networks make logits.
    """

    def __init__(self, discriminators: Denoiser) -> None:
        super().__init__()
        routed = isinstance(discriminators, RoutedExperts)
        self.parts = discriminators.experts if routed else nn.ModuleList([discriminators])
        self.process, self.partition = discriminators.process, discriminators.partition

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        owner = self.partition.index(self.process.progress(t))

        def logit(i: int, x_t: Tensor, t: Tensor) -> Tensor:
            return self.parts[i].output(x_t, t, None).squeeze(1)

        # The owner is asked of t where it lies: a GPU's answer would have to be waited for.
        return by_owner(owner, logit, x_t, t.to(x_t.device, non_blocking=True))
