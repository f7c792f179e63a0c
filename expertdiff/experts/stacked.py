"""Equal networks side by side, each on its own data: several seeds trained as one program."""

import copy
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expertdiff.diffusion.denoiser import NetworkDenoiser, PredictionType
from expertdiff.diffusion.process import NoiseProcess
from expertdiff.networks.network import Network


class StackedLinear(nn.Module):
    """S linear layers as one batched product: [S, B, in] -> [S, B, out].

    Args:
        layers: all of one shape, with bias.
    """

    def __init__(self, layers: Sequence[nn.Linear]) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.stack([layer.weight.data for layer in layers]))
        self.bias = nn.Parameter(torch.stack([layer.bias.data for layer in layers]))
        self.requires_grad_(layers[0].weight.requires_grad)

    def forward(self, x: Tensor) -> Tensor:
        return torch.baddbmm(self.bias.unsqueeze(1), x, self.weight.transpose(1, 2))


def stack(networks: Sequence[Network]) -> Network:
    """One network on [S, B, ...] of S equal ones; its state dict has theirs, stacked.

    Raises:
        ValueError: the networks learn anything outside linear layers with a bias.
    """
    first = networks[0]
    stacked = copy.deepcopy(first)
    linear = {
        name
        for name, module in first.named_modules()
        if isinstance(module, nn.Linear) and module.bias is not None
    }
    for name, _ in first.named_parameters():
        if name.rpartition(".")[0] not in linear:
            raise ValueError(
                f"{type(first).__name__} cannot be trained stacked, because {name} is of no linear "
                "layer with a bias: train one seed a job"
            )
    for name in linear:
        layers = [network.get_submodule(name) for network in networks]
        parent, _, child = name.rpartition(".")
        setattr(stacked.get_submodule(parent), child, StackedLinear(layers))
    return stacked


class StackedDenoiser(NetworkDenoiser):
    """S networks as one denoiser of [S B, ...]: the first B rows go to the first network.

    Args:
        networks: equal but for their weights.
        process: the noise process.
        prediction: the meaning of the output.
    """

    def __init__(
        self, networks: Sequence[Network], process: NoiseProcess, prediction: PredictionType
    ) -> None:
        super().__init__(stack(networks), process, prediction)
        self.size = len(networks)

    def output(self, x_t: Tensor, t: Tensor, y: Tensor | None) -> Tensor:
        x_t, t = (v.unflatten(0, (self.size, -1)) for v in (x_t, self.process.condition(t)))
        return self.network(x_t, t, y).flatten(0, 1)

    def from_data(self, x0: Tensor) -> tuple[Tensor, Tensor]:
        if self.flow is None:
            return super().from_data(x0)
        z, log_det = self.flow(x0.unflatten(0, (self.size, -1)))
        return z.flatten(0, 1), log_det.flatten(0, 1)

    def to_data(self, z: Tensor) -> Tensor:
        if self.flow is None:
            return z
        return self.flow.inverse(z.unflatten(0, (self.size, -1))).flatten(0, 1)

    @torch.no_grad()
    def clip_gradients(self, most: float) -> None:
        """Scales the gradient of each network to a norm of at most `most`, as if it were alone."""
        gradients = [p.grad.flatten(1) for p in self.parameters() if p.grad is not None]
        squares = [torch.linalg.vector_norm(g, dim=1).square() for g in gradients]
        norm = torch.stack(squares).sum(0).sqrt()
        scale = (most / (norm + 1e-6)).clamp(max=1)  # torch's own clip_grad_norm_
        for gradient in gradients:
            gradient.mul_(scale.unsqueeze(1))
