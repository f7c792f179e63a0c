"""What a network predicts, and the seam that every sampler and objective sees."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from torch import Tensor, nn

from expertdiff.describe import Described
from expertdiff.diffusion.partition import Partition
from expertdiff.diffusion.process import NoiseProcess, expand


class PredictionType(Described, ABC):
    """What the output of a network means."""

    @abstractmethod
    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        """The output of a perfect network."""

    @abstractmethod
    def x0_eps(
        self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        """The x0 and eps that an output stands for."""

    @abstractmethod
    def gain(self, snr: Tensor) -> Tensor:
        """|error of the output|^2 / |error of x0|^2 at this signal-to-noise ratio."""


class Eps(PredictionType):
    """The noise (DDPM)."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return eps

    def x0_eps(
        self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        return (x_t - sigma * output) / alpha, output

    def gain(self, snr: Tensor) -> Tensor:
        return snr


class X0(PredictionType):
    """The data."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return x0

    def x0_eps(
        self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        return output, (x_t - alpha * output) / sigma

    def gain(self, snr: Tensor) -> Tensor:
        return snr.new_ones(snr.shape)


class V(PredictionType):
    """v = alpha eps - sigma x0 of a variance-preserving process (arXiv 2202.00512, section 4)."""

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        return alpha * eps - sigma * x0

    def x0_eps(
        self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        return alpha * x_t - sigma * output, sigma * x_t + alpha * output

    def gain(self, snr: Tensor) -> Tensor:
        return snr + 1


class Logit(PredictionType):
    """The log-odds [B, 1] that x_t is a noised real item, not a noised generated one.

    Raises:
        ValueError: asked for x0 and eps, which it does not stand for.
    """

    def target(self, x0: Tensor, eps: Tensor, alpha: Tensor, sigma: Tensor) -> Tensor:
        raise ValueError(NO_DENOISER)

    def x0_eps(
        self, output: Tensor, x_t: Tensor, alpha: Tensor, sigma: Tensor
    ) -> tuple[Tensor, Tensor]:
        raise ValueError(NO_DENOISER)

    def gain(self, snr: Tensor) -> Tensor:
        return snr.new_ones(snr.shape)


NO_DENOISER = (
    "a discriminator denoises nothing: name the model that it guides, and the discriminator as "
    "its guidance"
)


@dataclass
class Prediction:
    """What a denoiser says about x_t; all tensors [B, ...] float32.

    Attributes:
        x0: the posterior mean of the data.
        eps: the noise that goes with it: x_t = alpha x0 + sigma eps.
        variance: ADM's learned v, about [-1, 1]; ``None`` where the variance is not learned.
    """

    x0: Tensor
    eps: Tensor
    variance: Tensor | None = None


class Denoiser(nn.Module, ABC):
    """``(x_t [B,...], t [B], y [B] | None) -> Prediction``; t may differ inside a batch.

    t may lie on the CPU while x_t is on a GPU: samplers do that, so that routing costs no sync.

    Attributes:
        process: the noise process.
        partition: whose network acts where; where it changes, a denoiser jumps.
    """

    process: NoiseProcess
    partition = Partition((0, 1))

    @property
    def ahead(self) -> "Denoiser":
        """What a sampler asks that looks ahead within a step; guidance may be left out there."""
        return self

    @property
    def flow(self) -> nn.Module | None:
        """What maps data to where the chain begins; ``None`` where it begins with the data."""
        return None

    def from_data(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        """Where the chain begins for data x0 [B, ...], and ln |det| of that map, [B]."""
        return (x0, x0.new_zeros(len(x0))) if self.flow is None else self.flow(x0)

    def to_data(self, z: Tensor) -> Tensor:
        """The data [B, ...] for which the chain begins at z [B, ...]."""
        return z if self.flow is None else self.flow.inverse(z)

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        """The prediction in float32, whatever the network's precision."""


class NetworkDenoiser(Denoiser):
    """One network, its noise process, and what its output means.

    Args:
        network: ``(x_t, t, y) -> [B, C, ...]``, or [B, 2C, ...] when it learns the variance too;
            it may have a ``flow`` in front.
        process: the noise process.
        prediction: the meaning of the output.

    Raises:
        ValueError: v of a process that does not preserve variance.
    """

    def __init__(
        self, network: nn.Module, process: NoiseProcess, prediction: PredictionType
    ) -> None:
        super().__init__()
        if isinstance(prediction, V) and not process.preserves_variance:
            raise ValueError(
                f"prediction V needs a process that preserves variance, not "
                f"{type(process).__name__}: choose Eps or X0"
            )
        self.network = network
        self.process = process
        self.prediction = prediction
        self.partition = getattr(network, "partition", self.partition)
        # A network that routes looks at t, which on the CPU costs no sync.
        self._routes = hasattr(network, "partition")

    @property
    def flow(self) -> nn.Module | None:
        return getattr(self.network, "flow", None)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Prediction:
        moved = t.to(x_t.device, non_blocking=True)
        output = self.output(x_t, t if self._routes else moved, y).float()
        variance = None
        if output.shape[1] == 2 * x_t.shape[1]:
            output, variance = output.chunk(2, dim=1)
        alpha, sigma = (expand(c, x_t) for c in self.process.alpha_sigma(moved))
        return Prediction(*self.prediction.x0_eps(output, x_t, alpha, sigma), variance)

    def output(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        """What the network says, in its own precision."""
        return self.network(x_t, self.process.condition(t), y)

    def clip_gradients(self, most: float) -> None:
        """Scales the gradient to a norm of at most `most`."""
        nn.utils.clip_grad_norm_(self.network.parameters(), most)
