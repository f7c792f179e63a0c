"""Weights as whole numbers: a byte each, and one scale for all that make the same output."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn

LAYERS = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Conv3d)
"""Whose weights are most of a network; norms, biases and embeddings stay as they are."""

SCALE = ".scale"
"""Added to the name of a weight, the name of its scale."""


def quantized(network: nn.Module, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The state dict of a network with w = q s for the weights of its layers (`LAYERS`).

    s = max |w| / 127 over what makes one output channel (float32, [.., out, 1, ..]), and q = w / s
    rounded (int8, shaped as w): no w is off by more than s / 2.
    """
    result = dict(weights)
    for path, module in network.named_modules():
        name = f"{path}.weight"
        if isinstance(module, LAYERS) and name in weights:
            w = weights[name]
            # From behind, because the weights of mixed experts have an axis in front.
            inner = 1 + len(getattr(module, "kernel_size", ()))
            s = w.abs().amax(dim=tuple(range(-inner, 0)), keepdim=True) / 127
            tiny = torch.finfo(s.dtype).tiny  # of a channel of zeros s is 0, and so are all q
            result[name] = (w / s.clamp(min=tiny)).round().to(torch.int8)
            result[name + SCALE] = s
    return result
