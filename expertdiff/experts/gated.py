"""A soft gate: several networks act at every point, blended by learned weights (DualDiff)."""

from abc import ABC, abstractmethod
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from expertdiff.describe import Described
from expertdiff.networks.mlp import Embedding, body
from expertdiff.networks.network import Network


class Gate(Described, ABC):
    """Turns the logits of a gating network into the weights of its experts.

    Args:
        temperature: divides the logits; small is hard, large is even.

    Raises:
        ValueError: the temperature is not positive.
    """

    def __init__(self, temperature: float = 1.0) -> None:
        if temperature <= 0:
            raise ValueError(f"gate temperature {temperature} must be positive")
        self.temperature = temperature

    def logits(self, experts: int) -> int:
        """How many logits `experts` need."""
        return experts

    @abstractmethod
    def __call__(self, logits: Tensor) -> Tensor:
        """Weights [..., N], in [0, 1] and summing to 1."""


class Sigmoid(Gate):
    """(g, 1 - g) of one logit: DualDiff's, for two experts."""

    def logits(self, experts: int) -> int:
        if experts != 2:
            raise ValueError(f"a Sigmoid gate blends 2 experts, not {experts}: use a Softmax gate")
        return 1

    def __call__(self, logits: Tensor) -> Tensor:
        g = (logits / self.temperature).sigmoid()
        return torch.cat([g, 1 - g], dim=-1)


class Softmax(Gate):
    """The softmax of one logit an expert."""

    def __call__(self, logits: Tensor) -> Tensor:
        return (logits / self.temperature).softmax(-1)


class Top1(Softmax):
    """The likeliest expert alone; gradients are those of the softmax (straight through)."""

    def __call__(self, logits: Tensor) -> Tensor:
        soft = super().__call__(logits)
        hard = nn.functional.one_hot(soft.argmax(-1), soft.shape[-1]).to(soft.dtype)
        return hard + soft - soft.detach()


class GatedExperts(Network):
    """eps = sum_n g_n(x_t, t) e_n(x_t, t): N residual networks and a gating network on the plane.

    All of them always run, and are trained together. Leading dimensions are free, as in
    `MLPDenoiser`.

    Args:
        experts: how many, at least 2.
        width: of an expert's residual layers.
        depth: of an expert.
        head: width of a hidden layer in an expert's head; ``None`` has none.
        gating: widths of the gating network's hidden layers.
        gate: how its logits become weights; by default `Sigmoid` for two experts, else `Softmax`.
        scale: of x1 and x2 in the embedding.
        T: timesteps of the chain.

    Raises:
        ValueError: fewer than two experts, or a gate that cannot blend so many.
    """

    def __init__(
        self,
        experts: int = 2,
        width: int = 256,
        depth: int = 3,
        head: int | None = None,
        gating: Sequence[int] = (256,),
        gate: Gate | None = None,
        scale: float = 25.0,
        T: int = 100,
    ) -> None:
        super().__init__()
        if experts < 2:
            raise ValueError(
                f"{experts} expert has nothing to blend: give 2 or more, or use MLPDenoiser"
            )
        self.gate = gate or (Sigmoid() if experts == 2 else Softmax())
        self.T, self.embedding = T, Embedding(scale, T)
        sizes = [Embedding.size, *gating, self.gate.logits(experts)]
        layers: list[nn.Module] = []
        for inputs, outputs in zip(sizes, sizes[1:]):
            layers += [nn.Linear(inputs, outputs), nn.ReLU()]
        # Gate, then experts: the order in which upstream registers, and so initialises, them.
        self.gating_network = nn.Sequential(*layers[:-1])
        self.experts = nn.ModuleList(body(width, depth, head) for _ in range(experts))

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        return self.blended(x_t, t)[0]

    def blended(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor]:
        """The prediction [..., 2] and the gate's weights [..., N] behind it."""
        z = self.embedding(x_t, t)
        weights = self._weights(z)
        outputs = torch.stack([expert(z) for expert in self.experts], dim=-1)
        return (outputs * weights.unsqueeze(-2)).sum(-1), weights

    def weights(self, x_t: Tensor, t: Tensor) -> Tensor:
        """The gate's weights [..., N] alone."""
        return self._weights(self.embedding(x_t, t))

    def _weights(self, z: Tensor) -> Tensor:
        return self.gate(self.gating_network(z))
