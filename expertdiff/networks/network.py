"""The one promise of a network."""

from abc import ABC, abstractmethod

from torch import Tensor, nn

from expertdiff.describe import Described


class Network(Described, nn.Module, ABC):
    """A network of the noise: ``(x_t [B,...], t [B], y [B] | None) -> [B,...]``.

    The output is the prediction (eps, x0 or v: the denoiser knows which), or twice as many channels
    when the network also learns the variance (prediction first, then v in about [-1, 1]).

    Attributes:
        num_classes: labels are in [0, num_classes); ``None`` for an unconditional network.
        T: how many timesteps the chain must have; ``None`` for any process.
    """

    num_classes: int | None = None
    T: int | None = None

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The raw output at `x_t`; `t` is as `NoiseProcess.condition` gives it."""
