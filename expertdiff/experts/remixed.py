"""Experts mixed from a few bases: theta_n = sum_k alpha_nk beta_k (Remix-DiT, arXiv 2412.05628)."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from typing import Literal

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.nn.functional import log_softmax

from expertdiff.describe import Described, build, describe
from expertdiff.diffusion.partition import Partition
from expertdiff.experts.mixed import Mixed
from expertdiff.experts.routed import by_owner, owner_of
from expertdiff.memory import Memory
from expertdiff.networks.dit import DiT
from expertdiff.networks.network import Network

TABLE = "coefficients.weight"


class Mixer(Described, ABC):
    """Turns a table of numbers [..., N, K] into coefficients: N experts of K bases (section 5.4).

    Attributes:
        learns: whether the table is trained.
    """

    learns = True

    @abstractmethod
    def first(self, logits: Tensor, prior: Tensor) -> Tensor:
        """The table to start with, of random logits and one-hot rows."""

    @abstractmethod
    def __call__(self, table: Tensor) -> Tensor:
        """Coefficients of (rows of) the table."""

    @abstractmethod
    def distance(self, table: Tensor, prior: Tensor) -> Tensor | float:
        """How far the coefficients are from the prior: what training adds to the loss (eq. 6)."""


class Softmax(Mixer):
    """The softmax of each row; its distance is the mean cross-entropy of the rows."""

    def first(self, logits: Tensor, prior: Tensor) -> Tensor:
        return logits

    def __call__(self, table: Tensor) -> Tensor:
        return table.softmax(-1)

    def distance(self, table: Tensor, prior: Tensor) -> Tensor:
        return -(prior * log_softmax(table, dim=-1)).sum(-1).mean()


class Raw(Mixer):
    """The table itself, unconstrained; its distance is the mean square.

    Starts with rows that sum to 1: others would rescale the weights that training starts from.
    """

    def first(self, logits: Tensor, prior: Tensor) -> Tensor:
        return logits.softmax(-1)

    def __call__(self, table: Tensor) -> Tensor:
        return table

    def distance(self, table: Tensor, prior: Tensor) -> Tensor:
        return (table - prior).square().mean()


class OneHot(Mixer):
    """Each expert is the basis of its prior, for ever."""

    learns = False

    def first(self, logits: Tensor, prior: Tensor) -> Tensor:
        return prior

    def __call__(self, table: Tensor) -> Tensor:
        return table

    def distance(self, table: Tensor, prior: Tensor) -> float:
        return 0.0


class Coefficients(nn.Module):
    """The learned table: `weight` [N, K], or [blocks, N, K].

    Expert n begins near its prior, basis floor(n K / N): logits z + 3 std(z) prior, z normal.

    Args:
        experts: N.
        bases: K.
        blocks: how many tables; ``None`` for one, without that axis.
        mixer: from table to coefficients.
    """

    prior: Tensor

    def __init__(self, experts: int, bases: int, blocks: int | None, mixer: Mixer) -> None:
        super().__init__()
        self.mixer = mixer
        prior = torch.eye(bases)[torch.arange(experts) * bases // experts]
        z = torch.randn(*([] if blocks is None else [blocks]), experts, bases)
        # A single number has no spread, and one logit needs none.
        spread = z.flatten(-2).std(-1)[..., None, None] if experts > 1 else 0
        table = mixer.first(z + 3 * spread * prior, prior.expand_as(z))
        self.weight = nn.Parameter(table.clone(), requires_grad=mixer.learns)
        self.register_buffer("prior", prior, persistent=False)

    def forward(self) -> Tensor:
        """All coefficients, in the shape of the table."""
        return self.mixer(self.weight)

    def of(self, expert: int) -> Tensor:
        """Those of one expert: a row [K] a table, [1 or blocks, K]."""
        return self.mixer(self.weight[..., expert, :]).reshape(-1, self.weight.shape[-1])

    def distance(self) -> Tensor | float:
        """How far they are from the prior."""
        return self.mixer.distance(self.weight, self.prior)


class Remixed(Network):
    """A network with N sets of weights, one an interval of the chain, mixed from K trained sets.

    Its state dict is that of the plain network with a leading axis K on what is mixed, and
    `coefficients.weight`. Each basis has first weights of its own, drawn as those of the plain
    network. The chain is cut into N equal intervals; items of a batch that belong to different
    experts go through different weights.

    Args:
        network: the plain network.
        mixed: which of its parameters are mixed: those of modules whose names end with one of
            these; all others are shared.
        bases: K.
        experts: N, from K to T; K need not divide it, nor it T.
        mixer: how the learned table becomes coefficients; by default `Softmax`.
        scope: one table for the whole network, or one for each block: for each group of mixed
            modules whose names are alike before the ending.
        T: timesteps of the chain.

    Attributes:
        partition: who acts where.
        active: the expert of the whole batch, where it is known without a look at t; else ``None``.
        cast: endings of the names of parameters that the plain network uses under autocast alone:
            these are cast once, when they are mixed, and not at each use.

    Raises:
        ValueError: numbers that do not fit, or an ending that no module has.
    """

    cast: tuple[str, ...] = ()

    def __init__(
        self,
        network: Network,
        mixed: Sequence[str],
        bases: int = 4,
        experts: int = 20,
        mixer: Mixer | None = None,
        scope: Literal["global", "local"] = "global",
        T: int = 1000,
    ) -> None:
        super().__init__()
        _check(network, bases, experts, T)
        self.T, self.num_classes, self.null_class = T, network.num_classes, network.null_class
        self.partition = Partition([n / experts for n in range(experts + 1)])
        self.active: int | None = None
        self._kept: tuple[object, dict[str, Tensor]] | None = None
        self._memory = Memory()

        plain = build(describe(network), Network)
        block_of = _mixed_parameters(plain, mixed)
        drawn = {name: [plain.get_parameter(name)] for name in block_of}
        for _ in range(bases - 1):
            another = build(describe(network), Network)
            for name in drawn:
                drawn[name].append(another.get_parameter(name))
        self._places: dict[str, tuple[nn.Module, str]] = {}
        for name in block_of:
            first, *_ = parameters = drawn.pop(name)
            stack = nn.Parameter(torch.stack(parameters).detach(), first.requires_grad)
            path, _, leaf = name.rpartition(".")
            self._places[name] = (plain.get_submodule(path), leaf)
            self._places[name][0].register_parameter(leaf, stack)
        self._adopt(plain)
        blocks: dict[str, list[str]] = {}
        for name, block in block_of.items():
            blocks.setdefault(block, []).append(name)
        local = scope == "local"
        self._blocks = [(i if local else 0, names) for i, names in enumerate(blocks.values())]
        tables = len(blocks) if local else None
        self.coefficients = Coefficients(experts, bases, tables, mixer or Softmax())

    def _adopt(self, plain: Network) -> None:
        """Makes the parts of the plain network, its names and all, our own."""
        for name, parameter in plain.named_parameters(recurse=False):
            self.register_parameter(name, parameter)
        for name, buffer in plain.named_buffers(recurse=False):
            self.register_buffer(name, buffer, persistent=name in plain.state_dict())
        for name, module in plain.named_children():
            self.add_module(name, module)
        # In a tuple, or it would be a module of ours, and its name a part of all keys.
        self._plain = (plain,)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """What the owner of each t says; t [B] may lie on the CPU while x_t is on a GPU.

        Raises:
            ValueError: t is of continuous time.
        """
        at = t.to(x_t.device, non_blocking=True)
        if self.active is not None:
            return self._run(self.active, x_t, at, y)
        owner = owner_of(t, self.partition, self.T)
        return by_owner(owner, self._run, *(v for v in (x_t, at, y) if v is not None))

    def _run(self, expert: int, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """What one expert says: the plain network with its weights."""
        own = (*self.named_parameters(recurse=False), *self.named_buffers(recurse=False))
        weights = {**self._weights(expert), **dict(own)}
        return functional_call(self._plain[0], weights, (x_t, t, y), tie_weights=False)

    def _weights(self, expert: int) -> dict[str, Tensor]:
        """`mix`; but a sampler, which goes down the chain, mixes where the expert changes only."""
        if self.training or torch.is_grad_enabled():
            self._kept = None  # a step may follow, and fused optimizers leave no version behind
            return self.mix(expert)
        tensors = (self.coefficients.weight, *self.stacks().values())
        # The place, too: an average is validated by exchanging the data of the parameters.
        now = (expert, self._dtype(), [(p._version, p.data_ptr()) for p in tensors])
        if self._kept is None or self._kept[0] != now:
            self._kept = None  # never two at a time
            self._kept = (now, self.mix(expert))
        return self._kept[1]

    def mix(self, expert: int) -> dict[str, Tensor]:
        """The mixed parameters of an expert by their plain names.

        Sums are in float32; those named by `cast` are then in autocast's type, if it is on. They
        lie in the memory of earlier ones that are gone.
        """
        return self._mixed(expert, self._memory, self._plain[0].compiled)

    def _mixed(self, expert: int, memory: Memory, compiled: bool) -> dict[str, Tensor]:
        dtype, stacks, weights = self._dtype(), self.stacks(), {}
        with torch.autocast(self.coefficients.weight.device.type, enabled=False):
            alpha = self.coefficients.of(expert)
            for table, names in self._blocks:
                own = [stacks[name] for name in names]
                types = [dtype if n.endswith(self.cast) else x.dtype for n, x in zip(names, own)]
                weights |= zip(names, Mixed.apply(alpha[table], memory, types, compiled, *own))
        return weights

    def _dtype(self) -> torch.dtype:
        """What the plain network computes its products in."""
        weight = self.coefficients.weight
        if torch.is_autocast_enabled(weight.device.type):
            return torch.get_autocast_dtype(weight.device.type)
        return weight.dtype

    def stacks(self) -> dict[str, Tensor]:
        """The mixed parameters of all bases, [K, ...], by their plain names."""
        return {name: getattr(module, leaf) for name, (module, leaf) in self._places.items()}

    def train(self, mode: bool = True) -> "Remixed":
        self._kept, self._plain[0].training = None, mode
        return super().train(mode)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "Remixed":
        # As rows, which have no layout: stacked kernels of convolutions have five axes, for which
        # there is no channels_last. What lies around this network moves it this way, too.
        return super()._apply(lambda x: fn(x.flatten()).view(x.shape), recurse)

    @torch.no_grad()
    def expert(self, i: int) -> dict[str, Tensor]:
        """The state dict of a plain network that is expert `i`."""
        with torch.autocast(self.coefficients.weight.device.type, enabled=False):
            # In memory that nobody else keeps, and without a compiler, which may be elsewhere.
            weights = self.state_dict() | self._mixed(i, Memory(), compiled=False)
        del weights[TABLE]
        return weights

    def export_experts(self) -> list[dict[str, Tensor]]:
        """The state dicts of N plain networks; what is shared they have in common."""
        return [self.expert(i) for i in range(len(self.partition))]

    def start_from(self, weights: Mapping[str, Tensor]) -> None:
        """Every basis starts where a plain network stands, or all where such a network stands.

        Raises:
            ValueError: as `load`, and coefficients of other numbers of experts or bases.
        """
        ours = self.coefficients.weight.detach()
        given = weights.get(TABLE, ours)
        if given.shape != ours.shape:
            raise ValueError(
                f"{TABLE} is {tuple(given.shape)} instead of {tuple(ours.shape)}: set experts, "
                "bases and scope to those of these weights"
            )
        if TABLE not in weights:
            stacks, bases = self.stacks(), ours.shape[-1]
            repeated = {k: v.expand(bases, *v.shape) for k, v in weights.items() if k in stacks}
            weights = {**weights, **repeated, TABLE: ours}
        self.load(weights)


class RemixDiT(Remixed):
    """A `Remixed` DiT; by default the attention and the MLP of its blocks are mixed.

    Total parameters are those of the DiT, (K - 1) depth (12 D^2 + 9 D), and N K.
    """

    cast = ("qkv.weight", "proj.weight", "fc1.weight", "fc2.weight")

    def __init__(
        self,
        network: DiT,
        mixed: Sequence[str] = ("attn.qkv", "attn.proj", "mlp.fc1", "mlp.fc2"),
        bases: int = 4,
        experts: int = 20,
        mixer: Mixer | None = None,
        scope: Literal["global", "local"] = "global",
        T: int = 1000,
    ) -> None:
        super().__init__(network, mixed, bases, experts, mixer, scope, T)


def _check(network: Network, bases: int, experts: int, T: int) -> None:
    if bases < 1 or experts < bases:
        raise ValueError(
            f"{experts} experts of {bases} bases: give 1 basis or more, and no fewer experts"
        )
    if experts > T:
        raise ValueError(
            f"{experts} experts cannot share {T} timesteps: give at most as many experts"
        )
    if network.T not in (None, T):
        raise ValueError(
            f"the plain network is made for {network.T} timesteps, not {T}: give both the same T"
        )


def _mixed_parameters(network: Network, endings: Sequence[str]) -> dict[str, str]:
    """The names of all mixed parameters, each with the block that it belongs to.

    Raises:
        ValueError: an ending that no module with parameters has.
    """
    found, block_of = set(), {}
    for name, module in network.named_modules():
        for ending in endings:
            if f".{name}".endswith(f".{ending}"):
                for leaf, _ in module.named_parameters():
                    found.add(ending)
                    block_of[f"{name}.{leaf}"] = name.removesuffix(ending)
    for ending in endings:
        if ending not in found:
            raise ValueError(
                f"no module with parameters in {type(network).__name__} has a name that ends with "
                f"{ending!r}: take endings from the keys of its state dict"
            )
    return block_of
