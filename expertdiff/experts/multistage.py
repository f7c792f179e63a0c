"""One encoder and a decoder an interval (multi-stage, arXiv 2312.09181)."""

import copy
from collections.abc import Sequence

from torch import Tensor, nn

from expertdiff.describe import build, describe
from expertdiff.diffusion.partition import Partition
from expertdiff.experts.routed import by_owner, owner_of
from expertdiff.networks.network import EncoderDecoder, Network
from expertdiff.networks.unet import ADMUNet


class MultiStage(Network):
    """``dec_i(enc(x_t, t))``, where i owns t: one encoder, and one decoder an interval.

    The encoder runs once on the whole batch, each decoder on the rows that it owns. With one
    decoder as wide as the network's it is that network bit for bit, first weights included.

    Args:
        network: gives the encoder and the kind of the decoders.
        widths: the `decoder_width` of each decoder, cleanest first.
        partition: who owns which t.
        T: timesteps of the chain.

    Attributes:
        active: the decoder of every t, to ask one about intervals of others; else ``None``.

    Raises:
        ValueError: not one width an interval, an interval without timesteps, or a network of
            another chain.
    """

    def __init__(
        self,
        network: EncoderDecoder,
        widths: Sequence[int],
        partition: Partition,
        T: int = 1000,
    ) -> None:
        super().__init__()
        _check(network, widths, partition, T)
        self.T, self.num_classes, self.null_class = T, network.num_classes, network.null_class
        self.partition, self.active = partition, None
        encoding, decoding = network.halves()
        self.encoder = _without(copy.deepcopy(network), decoding)
        # The given decoder comes first, where it fits: its weights were drawn with the encoder's.
        whole = [copy.deepcopy(network)] if widths[0] == network.decoder_width else []
        whole += [_of_width(network, width) for width in widths[len(whole) :]]
        self.decoders = nn.ModuleList(_without(each, each.halves()[0]) for each in whole)

    def forward(self, x_t: Tensor, t: Tensor, y: Tensor | None = None) -> Tensor:
        """What the owner of each t says; t [B] may lie on the CPU while x_t is on a GPU.

        Raises:
            ValueError: t is of continuous time, or of several seeds side by side.
        """
        if t.ndim > 1:
            raise ValueError(
                "seeds cannot be trained side by side by decoders that have different rows of "
                "each seed: train one seed a job"
            )
        owner = owner_of(t, self.partition, self.T)
        code = self.encoder.encode(x_t, t.to(x_t.device, non_blocking=True), y)
        if self.active is not None:
            return self.decoders[self.active].decode(*code)
        return by_owner(owner, lambda i, *rows: self.decoders[i].decode(*rows), *code)

    def expert(self, i: int) -> dict[str, Tensor]:
        """The state dict of a plain network that is the encoder and decoder `i`."""
        return self.encoder.state_dict() | self.decoders[i].state_dict()


class MultiStageUNet(MultiStage):
    """A `MultiStage` ADM UNet: time, class and the way down shared; a decoder has a middle, too."""

    def __init__(
        self, network: ADMUNet, widths: Sequence[int], partition: Partition, T: int = 1000
    ) -> None:
        super().__init__(network, widths, partition, T)


def _check(network: Network, widths: Sequence[int], partition: Partition, T: int) -> None:
    if len(widths) != len(partition):
        raise ValueError(
            f"widths {list(widths)} are of {len(widths)} decoders, but {partition} has "
            f"{len(partition)} intervals: give one width an interval"
        )
    for interval in partition.intervals():
        if not interval.steps(T):
            raise ValueError(
                f"interval {interval} holds none of the {T} timesteps: use fewer decoders"
            )
    if network.T not in (None, T):
        raise ValueError(
            f"the network is made for {network.T} timesteps, not {T}: give both the same T"
        )


def _of_width(network: EncoderDecoder, width: int) -> EncoderDecoder:
    """A new network like this one, with a decoder of this width."""
    description = describe(network)
    description["init_args"]["decoder_width"] = width
    return build(description, EncoderDecoder)


def _without(network: EncoderDecoder, names: Sequence[str]) -> EncoderDecoder:
    """This network, with nothing in place of these modules."""
    for name in names:
        path, _, leaf = name.rpartition(".")
        # Not deleted: a Sequential would number the others anew.
        setattr(network.get_submodule(path), leaf, nn.Identity())
    return network
