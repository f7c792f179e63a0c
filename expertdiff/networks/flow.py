"""A flow in front of a denoising network: the chain begins at z = h(x) instead of at the data."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from expertdiff.describe import Described
from expertdiff.networks.network import Network
from expertdiff.networks.unet import zero

FLOW = "flow."
"""What the weights of a flow begin with, in the state dict of a `Flowed`."""


class CouplingFlow(Described, nn.Module):
    """Affine couplings z = h(x) of points (RealNVP, arXiv 1605.08803, equations 4 to 8).

    Each layer keeps one half of the coordinates, and maps the other by x exp(s) + m, s and m being
    functions of the first; halves take turns. s is bounded such that the layers together scale no
    coordinate by more than e: a network that has not learnt yet would let INDM blow the data up. A
    fresh flow is the identity bit for bit. It computes in float32, whatever the precision of the
    network. Leading dimensions are free, as in `MLPDenoiser`.

    Args:
        depth: layers; 0 is the identity, which learns nothing.
        width: of the two hidden layers of each.
        dim: of the points.

    Raises:
        ValueError: fewer than 2 dimensions or 0 layers, or items that are no such points.
    """

    def __init__(self, depth: int = 8, width: int = 64, dim: int = 2) -> None:
        super().__init__()
        if depth < 0 or dim < 2:
            raise ValueError(f"depth {depth} must not be negative, and dim {dim} at least 2")
        self.dim, self.sizes = dim, (dim // 2, dim - dim // 2)
        self.most = 1 / max(1, (depth + 1) // 2)  # of s, in each of the layers that move a half
        self.layers = nn.ModuleList(
            nn.Sequential(
                nn.Linear(self.sizes[i % 2], width),
                nn.SiLU(),
                nn.Linear(width, width),
                nn.SiLU(),
                zero(nn.Linear(width, 2 * self.sizes[1 - i % 2])),
            )
            for i in range(depth)
        )

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        """z [..., D] and ln |det dz/dx| [...], of x [..., D]."""
        parts = self._halves(x)
        log_det = parts[0].new_zeros(x.shape[:-1])
        with torch.autocast(x.device.type, enabled=False):
            for i, layer in enumerate(self.layers):
                s, m = self._scale_and_shift(layer, parts[i % 2])
                parts[1 - i % 2] = parts[1 - i % 2] * s.exp() + m
                log_det = log_det + s.sum(-1)
        return torch.cat(parts, dim=-1), log_det

    def inverse(self, z: Tensor) -> Tensor:
        """The x [..., D] of z [..., D]."""
        parts = self._halves(z)
        with torch.autocast(z.device.type, enabled=False):
            for i, layer in reversed([*enumerate(self.layers)]):
                s, m = self._scale_and_shift(layer, parts[i % 2])
                parts[1 - i % 2] = (parts[1 - i % 2] - m) * (-s).exp()
        return torch.cat(parts, dim=-1)

    def _halves(self, x: Tensor) -> list[Tensor]:
        if x.ndim > 3 or x.shape[-1] != self.dim:
            raise ValueError(
                f"a flow of points of {self.dim} dimensions cannot take items of shape "
                f"{tuple(x.shape[1:])}: give it points of so many, and images no flow"
            )
        return list(x.float().split(self.sizes, dim=-1))

    def _scale_and_shift(self, layer: nn.Module, kept: Tensor) -> tuple[Tensor, Tensor]:
        s, m = layer(kept).chunk(2, dim=-1)
        return self.most * s.tanh(), m


class Flowed(Network):
    """A network that denoises what a flow makes of the data.

    Its own input is x_t = alpha z + sigma eps, with z = h(x0): only where the chain begins and ends
    are data mapped. `INDM` trains both; every other method keeps the flow as it is, so that experts
    that start from one INDM run (``init_from``) share its flow and can be stitched.

    Args:
        network: the denoising network.
        flow: h.

    Raises:
        ValueError: a network of several experts.
    """

    def __init__(self, network: Network, flow: CouplingFlow) -> None:
        super().__init__()
        if hasattr(network, "partition"):
            raise ValueError(
                f"{type(network).__name__} routes by t, which no flow is made for: put the flow in "
                "front of a plain network"
            )
        self.network, self.flow = network, flow.requires_grad_(False)
        self.T, self.num_classes = network.T, network.num_classes
        self.null_class = network.null_class

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.network(x_t, t, y)


def of_flow(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Those weights of a network that belong to the flow in front of it, if there is one."""
    return {key: value for key, value in weights.items() if key.startswith(FLOW)}
