"""The small residual network of the plane (DualDiff's expert)."""

import math

import torch
from torch import Tensor, nn

from expertdiff.networks.network import EncoderDecoder, Network
from expertdiff.networks.unet import zero


class Embedding(nn.Module):
    """sin and cos of x1, x2 and t at 64 frequencies each, from 1 down to 1e-4; no parameters.

    Args:
        scale: of x1 and x2; at 25 the shortest wave is 0.25 long, at 100 it is 0.06.
        T: timesteps of the chain; t is stretched to [0, 100).
    """

    size = 3 * 128

    def __init__(self, scale: float, T: int) -> None:
        super().__init__()
        self.scale, self.t_scale = scale, 100 / T
        frequencies = torch.exp(-math.log(1e4) * torch.arange(64, dtype=torch.float64) / 63)
        self.register_buffer("frequencies", frequencies.float(), persistent=False)

    def forward(self, x_t: Tensor, t: Tensor) -> Tensor:
        """[..., 384] of x_t [..., 2] and t [...]."""
        v = torch.cat([self.scale * x_t, (self.t_scale * t).unsqueeze(-1)], dim=-1)
        angle = v.unsqueeze(-1) * self.frequencies
        return torch.cat([angle.sin(), angle.cos()], dim=-1).flatten(-2)


class Residual(nn.Module):
    """z + Linear(ReLU(z))."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.ff = nn.Linear(width, width)

    def forward(self, z: Tensor) -> Tensor:
        return z + self.ff(z.relu())


def body(
    width: int,
    depth: int,
    head: int | None,
    decoder_width: int | None = None,
    outputs: int = 2,
) -> nn.Sequential:
    """From the embedding to the prediction [..., 2]: `depth` residual layers, a head of one or two.

    Args:
        width: of the residual layers.
        depth: how many.
        head: width of a hidden layer in the head; ``None`` has none.
        decoder_width: of the residual layers from the middle on, instead of `width`.
        outputs: instead of 2.
    """
    wide = width if decoder_width is None else decoder_width
    if wide < 1:
        raise ValueError(f"decoder_width {wide} has no channels: give 1 or more")
    ends = [wide, outputs] if head is None else [wide, head, outputs]
    layers: list[nn.Module] = [nn.Linear(Embedding.size, width)]
    layers += [Residual(width) for _ in range(depth // 2)]
    layers += [nn.Linear(width, wide)] if wide != width else []
    layers += [Residual(wide) for _ in range(depth - depth // 2)]
    for inputs, outputs in zip(ends, ends[1:]):
        layers += [nn.ReLU(), nn.Linear(inputs, outputs)]
    return nn.Sequential(*layers)


class MLPDenoiser(EncoderDecoder):
    """A residual network on points of the plane (The AI Scientist's 2-D diffusion template).

    Leading dimensions are free: points may be [B, 2], or [S, B, 2] for S networks side by side.

    Args:
        width: of the residual layers.
        depth: how many; the first half of them (rounded down) belongs to the encoder.
        head: width of a hidden layer in the head; ``None`` has none.
        scale: of x1 and x2 in the embedding.
        T: timesteps of the chain.
        decoder_width: of the decoder's residual layers, instead of `width`.

    Raises:
        ValueError: a decoder without channels.
    """

    def __init__(
        self,
        width: int = 256,
        depth: int = 3,
        head: int | None = None,
        scale: float = 25.0,
        T: int = 100,
        decoder_width: int | None = None,
    ) -> None:
        super().__init__()
        self.T, self.embedding = T, Embedding(scale, T)
        self.decoder_width = width if decoder_width is None else decoder_width
        self.network, self._shared = body(width, depth, head, decoder_width), 1 + depth // 2

    def encode(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> tuple[Tensor, ...]:
        return (self.network[: self._shared](self.embedding(x_t, t)),)

    def decode(self, *code: Tensor) -> Tensor:
        return self.network[self._shared :](*code)

    def halves(self) -> tuple[list[str], list[str]]:
        names = [f"network.{i}" for i in range(len(self.network))]
        return ["embedding", *names[: self._shared]], names[self._shared :]


class MLPLogit(Network):
    """A logit [B, 1] of points of the plane [B, 2], for `Discrimination`, or a critic.

    A fresh logit is exactly 0. Leading dimensions are free, as those of `MLPDenoiser`.

    Args:
        width: of the residual layers.
        depth: how many.
        scale: of x1 and x2 in the embedding; the larger, the rougher is the gradient of the logit.
        T: timesteps of the chain.
        outputs: more than one make features [B, outputs], which do not start at 0.
    """

    def __init__(
        self, width: int = 128, depth: int = 2, scale: float = 1.0, T: int = 100, outputs: int = 1
    ) -> None:
        super().__init__()
        self.T, self.embedding = T, Embedding(scale, T)
        self.network = body(width, depth, None, outputs=outputs)
        if outputs == 1:
            zero(self.network[-1])

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.network(self.embedding(x_t, t))
