"""A critic that is trained against the network in the same steps: ACSM, and SADM-style."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.func import functional_call
from torch.nn import functional

from expertdiff.data.base import Batch
from expertdiff.data.images import Images
from expertdiff.describe import describe
from expertdiff.diffusion.denoiser import Prediction
from expertdiff.diffusion.timesteps import OneForAll
from expertdiff.experts.stacked import StackedDenoiser, stack
from expertdiff.methods.base import initialised
from expertdiff.methods.single import Diffusion
from expertdiff.networks.network import Network

Critic = Callable[[Tensor], Tensor]
"""What a critic says, [S, B, outputs] float32, of items [S B, ...] of S seeds side by side."""

EPSILON = 1e-8
"""Added to squared distances, so that their root has a gradient at 0."""


class Adversarial(Diffusion, ABC):
    """One network, and a critic that is trained against it.

    The loss of the network takes the critic's weights as constants, that of the critic takes the
    predicted data as constants. So one backward pass of their sum gives either its own gradient,
    and two parameter groups of Adam, which treats each parameter alone, are two optimizers. The
    critic is in checkpoints, but not in bundles, not in the average, and not in the norm by which
    gradients are clipped. A learning-rate scheduler acts on both.

    Args:
        critic: judges data alone: it is told t = 0, whatever the noise was.
        strength: of what is added to the network's loss (lambda); with 0 the critic rests, and
            this is `Diffusion` bit for bit.
        critic_lr: learning rate of the critic, which has no weight decay; with 0 it keeps its
            first weights.
        critic_betas: of the critic in Adam.
        kwargs: see `Method`; `optimizer` is an Adam.

    Raises:
        ValueError: a negative strength or learning rate, a flow in front of the network, an
            optimizer without betas, or several seeds with a critic that cannot be stacked. Later: a
            critic that cannot take the data.
    """

    def __init__(
        self,
        critic: Network,
        strength: float,
        critic_lr: float = 1e-4,
        critic_betas: tuple[float, float] = (0.0, 0.9),
        **kwargs: Any,
    ) -> None:
        super().__init__(**kwargs)
        if strength < 0 or critic_lr < 0:
            raise ValueError(f"strength {strength} and critic_lr {critic_lr} must not be negative")
        if self.denoiser.flow:
            raise ValueError(
                "what the critic sees and the network learns must be about the data, not about "
                "what a flow makes of them: train a network without a flow"
            )
        optimizer = self._optimizer_of_nothing()
        if "betas" not in optimizer.defaults:
            raise ValueError(
                f"{type(optimizer).__name__} has no betas for the critic: use Adam or AdamW"
            )
        self.strength, self.critic_lr, self.critic_betas = strength, critic_lr, tuple(critic_betas)
        critics = [initialised(critic, seed, "critic") for seed in self.seeds]
        self._stacked = isinstance(self.denoiser, StackedDenoiser)
        self.critic = stack(critics) if self._stacked else critics[0]
        self.critic.requires_grad_(strength > 0 and critic_lr > 0)

    @abstractmethod
    def network_loss(self, critic: Critic, x0: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        """What is held against x0_hat [S B, ...], predicted for x0 at t [S B]; [S]."""

    @abstractmethod
    def critic_loss(self, critic: Critic, x0: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        """What the critic is trained by; [S]."""

    @property
    def learns(self) -> bool:
        """Whether the critic is trained."""
        return any(weight.requires_grad for weight in self.critic.parameters())

    def setup(self, stage: str) -> None:
        super().setup(stage)
        self._outputs()

    @torch.no_grad()
    def _outputs(self) -> int:
        """How many numbers the critic ends in; raises a ValueError unless it takes this data."""
        shape, device = self.trainer.datamodule.shape, next(self.network.parameters()).device
        try:
            return self.judged({}, torch.zeros(len(self.seeds), *shape, device=device)).shape[-1]
        except RuntimeError as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"the critic cannot take data of shape {shape}: {reason}") from error

    def judged(self, weights: dict[str, Tensor], x: Tensor) -> Tensor:
        """What the critic says of x [S B, ...], with these in place of its own weights."""
        seeds = len(self.seeds)
        t = torch.zeros(len(x), dtype=torch.int64, device=x.device)
        inputs = tuple(v.unflatten(0, (seeds, -1)) for v in (x, t)) if self._stacked else (x, t)
        output = functional_call(self.critic, weights, inputs)
        return output.float().reshape(seeds, len(x) // seeds, -1)

    def regularised(self, batch: Batch, prediction: Prediction, t: Tensor) -> Tensor | float:
        if not self.strength:
            return 0.0
        x0, x0_hat = batch.x0, prediction.x0
        if isinstance(self.trainer.datamodule, Images):
            x0_hat = x0_hat.clamp(-1, 1)
        constant = {name: weight.detach() for name, weight in self.critic.named_parameters()}
        added = self.strength * self.network_loss(partial(self.judged, constant), x0, x0_hat, t)
        if self.learns:
            added = added + self.critic_loss(partial(self.judged, {}), x0, x0_hat.detach(), t)
        return added

    def parameter_groups(self) -> list[dict[str, Any]]:
        groups = [{"params": list(self.network.parameters())}]
        if self.learns:
            own = {"lr": self.critic_lr, "betas": self.critic_betas, "weight_decay": 0.0}
            groups.append({"params": list(self.critic.parameters()), **own})
        return groups

    def identity(self) -> dict[str, Any]:
        return super().identity() | {
            "critic": describe(self.critic),
            "strength": self.strength,
            "critic_lr": self.critic_lr,
            "critic_betas": list(self.critic_betas),
        }


class ConsistentAdversarial(Adversarial):
    """Adversarial score matching with consistent predictions (ACSM, arXiv 2009.05475).

    A critic D tells data x0 from predicted data xhat by least squares:

        network: its loss + strength mean (D(xhat) - 1)^2
        critic:  mean (D(x0) - 1)^2 + mean (D(xhat) + 1)^2

    xhat of images is clamped to [-1, 1]. The paper has half the sum of squared errors where this
    has their mean, over d values an item: its strength of 1 is 2 / d here, 1 for points of the
    plane and 0.03125 for 8 x 8 grey images. Its betas of the critic are (-0.5, 0.9); torch's Adam
    takes no negative ones, so it is 0. Its network has betas (0, 0.9) and is sampled by `CAS`.
    """

    def network_loss(self, critic: Critic, x0: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        return (critic(x0_hat) - 1).square().mean((1, 2))

    def critic_loss(self, critic: Critic, x0: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        real, made = critic(x0), critic(x0_hat)
        return ((real - 1).square() + (made + 1).square()).mean((1, 2))


class StructureGuided(Adversarial):
    """How items of a batch lie to each other, kept (SADM-style, arXiv 2402.17563), RECONSTRUCTED.

    The paper's code is not public; its objective was read second-hand, and its encoder, weight,
    metric and optimizer are not known: hyper-parameters are ours and untuned. An encoder psi seeks
    the features, of length 1, by which a batch of data x0 and that of predicted data xhat differ
    most, and the network predicts so that they do not:

        R(x)_ij = |psi(x_i) - psi(x_j)|,  L_S = w |R(x0) - R(xhat)|_F^2 / B^2
        min over the network, max over psi: its loss + strength L_S

    w is the weight that the loss gives to an error of x0 at this t, of which a batch has one: use
    the timesteps `OneForAll`. Each rank compares its own items.

    Args:
        critic: psi: ends in several numbers, as `MLPLogit` and `ImageLogit` with `outputs`.
        strength: of the structure in the network's loss; 0 is `Diffusion` bit for bit.
        critic_lr: learning rate of psi; 0 leaves it as it was initialised: the control.
        critic_betas: of psi in Adam.
        kwargs: see `Adversarial`.

    Raises:
        ValueError: other timesteps than `OneForAll`. Later: a critic that ends in one number.
    """

    def __init__(
        self,
        critic: Network,
        strength: float = 0.1,
        critic_lr: float = 1e-4,
        critic_betas: tuple[float, float] = (0.9, 0.999),
        **kwargs: Any,
    ) -> None:
        super().__init__(critic, strength, critic_lr, critic_betas, **kwargs)
        if not isinstance(self.timesteps, OneForAll):
            raise ValueError(
                f"{type(self.timesteps).__name__} draws several t for items that are compared with "
                "each other: use OneForAll timesteps"
            )

    def _outputs(self) -> int:
        if (outputs := super()._outputs()) == 1:
            raise ValueError(
                f"{type(self.critic).__name__} ends in one number, and scaled to length 1 that "
                "tells nothing: give model.critic more outputs"
            )
        return outputs

    def network_loss(self, critic: Critic, x0: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        kind = self.denoiser.prediction
        weight = self.weighting(self.process, t, kind) * kind.gain(self.process.snr(t))
        weight = weight.unflatten(0, (len(self.seeds), -1))[:, 0].float()
        change = relations(critic(x0)) - relations(critic(x0_hat))
        return weight * change.square().mean((1, 2))

    def critic_loss(self, critic: Critic, x0: Tensor, x0_hat: Tensor, t: Tensor) -> Tensor:
        return -self.network_loss(critic, x0, x0_hat, t)


def relations(features: Tensor) -> Tensor:
    """The distances [S, B, B] of features [S, B, n], after each was scaled to length 1."""
    unit = functional.normalize(features, dim=-1)
    # The quick way by inner products would leave a square root of rounding errors on the diagonal.
    distance = torch.cdist(unit, unit, compute_mode="donot_use_mm_for_euclid_dist")
    return (distance.square() + EPSILON).sqrt()
