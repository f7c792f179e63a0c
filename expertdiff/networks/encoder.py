"""A small encoder of images, which ends in one number or a few."""

from torch import Tensor, nn
from torch.nn import functional

from expertdiff.networks.dit import TimestepEmbedder
from expertdiff.networks.network import Network
from expertdiff.networks.unet import GroupNorm, ResBlock, conv3x3, zero


class ImageLogit(Network):
    """A logit [B, 1] of images [B, C, H, W], for `Discrimination`, or a critic: ADM's way down.

    Without attention. A fresh logit is exactly 0.

    Args:
        image_size: side of the (square) images in pixels.
        in_channels: C of the images.
        model_channels: the width that `channel_mult` multiplies.
        num_res_blocks: residual blocks a level.
        channel_mult: width of each level; each but the first halves the resolution.
        dropout: probability, inside the residual blocks.
        outputs: more than one make features [B, outputs], which do not start at 0.

    Raises:
        ValueError: `image_size` cannot be halved often enough.
    """

    def __init__(
        self,
        image_size: int,
        in_channels: int = 3,
        model_channels: int = 32,
        num_res_blocks: int = 1,
        channel_mult: tuple[int, ...] = (1, 2, 2),
        dropout: float = 0.0,
        outputs: int = 1,
    ) -> None:
        super().__init__()
        halvings = len(channel_mult) - 1
        if image_size % 2**halvings:
            raise ValueError(
                f"image_size {image_size} cannot be halved {halvings} times: "
                f"use a multiple of {2**halvings} or a shorter channel_mult"
            )
        emb_channels = 4 * model_channels
        self.time_embed = TimestepEmbedder(emb_channels)
        width = channel_mult[0] * model_channels
        self.first = conv3x3(in_channels, width)
        self.blocks = nn.ModuleList()
        for level, mult in enumerate(channel_mult):
            if level:
                self.blocks.append(
                    ResBlock(width, width, emb_channels, dropout, True, nn.AvgPool2d(2))
                )
            for _ in range(num_res_blocks):
                out = mult * model_channels
                self.blocks.append(ResBlock(width, out, emb_channels, dropout, True))
                width = out
        self.norm = GroupNorm(width)
        out = nn.Linear(width, outputs)
        self.out = zero(out) if outputs == 1 else out

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        emb, h = self.time_embed(t), self.first(x_t)
        for block in self.blocks:
            h = block(h, emb)
        return self.out(functional.silu(self.norm(h)).mean((2, 3)))
