"""Experts mixed from bases that are trained together (Remix-DiT, arXiv 2412.05628)."""

from abc import ABC, abstractmethod
from typing import Any

from torch import Tensor

from expertdiff.data.base import Batch, permutation
from expertdiff.describe import Described, describe, differences
from expertdiff.diffusion.denoiser import Prediction
from expertdiff.diffusion.partition import Interval
from expertdiff.experts.remixed import TABLE, Remixed, Softmax
from expertdiff.methods.single import Diffusion


class Gamma(Described, ABC):
    """How strongly the coefficients are held to their prior, along the run.

    Adam follows even a weak pull at its full learning rate while nothing else moves the
    coefficients, as long as the bases are alike: a small `first` is not the same as 0.

    Args:
        first: gamma_0.

    Raises:
        ValueError: it is negative.
    """

    def __init__(self, first: float = 1e-4) -> None:
        if first < 0:
            raise ValueError(f"gamma {first} must not be negative: give 0 for no pull")
        self.first = first

    @abstractmethod
    def __call__(self, step: int, steps: int, epoch: int) -> float:
        """gamma at `step` of `steps`, when an epoch has `epoch` steps."""


class Paper(Gamma):
    """gamma_0 (1 - step / steps): down to 0 (eq. 6)."""

    def __call__(self, step: int, steps: int, epoch: int) -> float:
        return self.first * (1 - step / steps)


class Official(Gamma):
    """gamma_0 (2 - epoch / epochs): from 2 gamma_0 down to gamma_0, as the released program."""

    def __call__(self, step: int, steps: int, epoch: int) -> float:
        epochs = -(-steps // epoch)
        return self.first * (2 - step // epoch / epochs)


class Remix(Diffusion):
    """N experts mixed from K bases; each micro-batch of each rank trains one of them.

    Which one is a function of (seed, micro-batch): the ranks take the first of one random order,
    so that they train different ones. To the loss comes gamma times the distance of all
    coefficients from their prior.

    Args:
        gamma: of that distance.
        coefficient_lr: learning rate of the coefficients; the scheduler acts on both.
        refit: train the coefficients alone, without the prior.
        kwargs: see `Method`; the network is a `Remixed`.

    Raises:
        ValueError: a network that is not mixed, timesteps that learn, a refit of nothing, or first
            weights of another mixer.
    """

    def __init__(
        self,
        gamma: Gamma | None = None,
        coefficient_lr: float = 1e-2,
        refit: bool = False,
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        self.gamma, self.coefficient_lr, self.refit = gamma or Paper(), coefficient_lr, refit
        if not isinstance(self.network, Remixed):
            raise ValueError(f"{type(self.network).__name__} has no bases to mix: use RemixDiT")
        if self.timesteps.bound:
            raise ValueError(
                f"{type(self.timesteps).__name__} draws from the whole chain, and a batch of "
                "Remix has a part of it: use Uniform timesteps"
            )
        self._same_mixer()
        if refit:
            self._freeze()

    def _same_mixer(self) -> None:
        identity = self.init_from.identity if self.init_from else {}
        arguments = identity.get("network", {}).get("init_args", {})
        if "mixer" not in arguments:  # of a plain network
            return
        ours = describe(self.network.coefficients.mixer)
        theirs = arguments["mixer"] or describe(Softmax())
        if changed := differences(ours, theirs, "mixer"):
            raise ValueError(
                f"the coefficients of {self.init_from.path} are of another mixer "
                f"({'; '.join(changed)}): use that one"
            )

    def _freeze(self) -> None:
        coefficients = self.network.coefficients
        mixed = self.init_from is not None and TABLE in self.init_from.weights
        if not (mixed and coefficients.mixer.learns):
            raise ValueError(
                "refit trains the coefficients of trained bases: name these by init_from, and use "
                f"a mixer that learns, not {type(coefficients.mixer).__name__}"
            )
        self.network.requires_grad_(False)
        coefficients.requires_grad_(True)

    @property
    def job(self) -> str:
        return "remix"

    def parameter_groups(self) -> list[dict[str, Any]]:
        table = self.network.coefficients.weight
        learned = [p for p in self.network.parameters() if p.requires_grad and p is not table]
        groups = [{"params": learned}] if learned else []
        if table.requires_grad:
            groups.append({"params": [table], "lr": self.coefficient_lr})
        return groups

    def training_step(self, batch: Batch, batch_idx: int) -> dict[str, Tensor]:
        try:
            return super().training_step(batch, batch_idx)
        finally:
            self.network.active = None

    def drawn(self, seed: int, key: tuple[int | str, ...]) -> list[Interval]:
        _, rank, micro_batch = key
        # The network need not look at t, which would wait for the GPU.
        self.network.active = self.expert(seed, rank, micro_batch)
        return [self.network.partition.interval(self.network.active)]

    def expert(self, seed: int, rank: int, micro_batch: int) -> int:
        """Which expert a rank trains in a micro-batch of the run."""
        n = len(self.network.partition)
        return int(permutation(n, seed, "expert", self.job, micro_batch)[rank % n])

    def regularised(self, batch: Batch, prediction: Prediction, t: Tensor) -> Tensor | float:
        if self.refit:
            return 0.0
        data, trainer = self.trainer.datamodule, self.trainer
        items = data.batch_size * trainer.world_size * trainer.accumulate_grad_batches
        epoch = max(1, len(data.split("train")[0]) // items)
        gamma = self.gamma(trainer.global_step, trainer.max_steps, epoch)
        return gamma * self.network.coefficients.distance()

    def run_identity(self) -> dict[str, Any]:
        # gamma goes by the length of the run, so that another one would not go on alike.
        return super().run_identity() | {"gamma_steps": self.trainer.max_steps}

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "gamma": describe(self.gamma),
            "coefficient_lr": self.coefficient_lr,
            "refit": self.refit,
        }
