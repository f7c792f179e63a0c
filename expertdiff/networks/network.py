"""The one promise of a network."""

from abc import ABC, abstractmethod
from collections.abc import Mapping

from torch import Tensor, nn

from expertdiff.describe import Described


class Network(Described, nn.Module, ABC):
    """A network of the noise: ``(x_t [B,...], t [B], y [B] | None) -> [B,...]``.

    The output is the prediction (eps, x0 or v: the denoiser knows which), or twice as many channels
    when the network also learns the variance (prediction first, then v in about [-1, 1]).

    Attributes:
        num_classes: labels are in [0, num_classes); ``None`` for an unconditional network.
        null_class: the label that means "of no class"; ``None`` where there is none.
        T: how many timesteps the chain must have; ``None`` for any process.
        compiled: whether its parts are compiled; what computes weights for it then is, too.
    """

    num_classes: int | None = None
    null_class: int | None = None
    T: int | None = None
    compiled: bool = False

    @abstractmethod
    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """The raw output at `x_t`; `t` is as `NoiseProcess.condition` gives it."""

    def load(self, weights: Mapping[str, Tensor]) -> None:
        """Takes a state dict of its own kind; raises as `check`."""
        self.check(weights)
        self.load_state_dict(weights)

    def check(self, weights: Mapping[str, Tensor]) -> None:
        """Looks whether this is a state dict of its own kind.

        Raises:
            ValueError: a tensor is of another shape, missing or left over; the first one is named,
                with its shapes.
        """
        shapes = {key: tuple(value.shape) for key, value in self.state_dict().items()}
        found = {key: tuple(value.shape) for key, value in weights.items()}
        for key in shapes:
            if key in found and found[key] != shapes[key]:
                raise ValueError(f"{key} is {found[key]} instead of {shapes[key]}")
        for key in sorted(shapes.keys() - found.keys()):
            raise ValueError(f"{key} {shapes[key]} is missing")
        for key in sorted(found.keys() - shapes.keys()):
            raise ValueError(f"{key} {found[key]} is left over")

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Begins to train where these weights stand; raises as `load`."""
        self.load(weights)


class EncoderDecoder(Network):
    """A network in two halves, of which `MultiStage` has the second several times.

    Attributes:
        decoder_width: how wide the second half is.
    """

    decoder_width: int

    @abstractmethod
    def encode(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        """What the first half tells the second, each [B, ...]."""

    @abstractmethod
    def decode(self, *code: Tensor) -> Tensor:
        """The raw output."""

    @abstractmethod
    def halves(self) -> tuple[list[str], list[str]]:
        """The names of the modules that `encode` uses, and of those that `decode` uses."""

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.decode(*self.encode(x_t, t, y))
