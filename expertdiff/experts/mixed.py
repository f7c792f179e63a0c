"""Tensors mixed from those of the bases, with a gradient that is written where it stays."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from expertdiff.memory import Memory


class Mixed(Function):
    """sum_k alpha_k stack_k for each stack [K, ...], a matrix-vector product each; alpha is [K].

    ``Mixed.apply(alpha, memory, dtypes, *stacks)`` sums in the type of a stack and returns as many
    tensors, in `dtypes`. Autograd's own way has a node for each step of each, makes a huge matrix
    product of the gradient of a stack, and takes fresh memory for all.
    """

    @staticmethod
    def forward(
        ctx: Any, alpha: Tensor, memory: Memory, dtypes: Sequence[torch.dtype], *stacks: Tensor
    ) -> tuple[Tensor, ...]:
        ctx.memory = memory
        ctx.save_for_backward(alpha, *stacks)
        ctx.set_materialize_grads(False)
        weights = []
        for stack, dtype in zip(stacks, dtypes):
            weight = memory.empty(stack.shape[1:], stack.dtype, stack.device)
            _sum(alpha, stack, weight)
            weights.append(_cast(weight, dtype, memory))
        return tuple(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        alpha, *stacks = ctx.saved_tensors
        of_alpha, _, _, *learned = ctx.needs_input_grad
        slope = torch.zeros_like(alpha) if of_alpha else None
        of_stacks = []
        for stack, gradient, learns in zip(stacks, gradients, learned):
            of_stack = None
            if gradient is not None:
                gradient = _cast(gradient, stack.dtype, ctx.memory).flatten()
                if slope is not None:
                    slope += _dots(stack, gradient)
                if learns:
                    of_stack = ctx.memory.empty(stack.shape, stack.dtype, stack.device)
                    torch.outer(alpha, gradient, out=of_stack.view(len(alpha), -1))
            of_stacks.append(of_stack)
        return slope, None, None, *of_stacks


# On a CPU, passes over numbers that stay in its cache are faster than its products of matrix and
# vector; elsewhere, each pass would be a kernel to launch.


def _sum(alpha: Tensor, stack: Tensor, out: Tensor) -> None:
    """sum_k alpha_k stack_k into `out`."""
    if stack.device.type != "cpu":
        torch.mv(stack.view(len(alpha), -1).T, alpha, out=out.view(-1))
        return
    torch.mul(stack[0], alpha[0], out=out)
    for a, basis in zip(alpha[1:], stack[1:]):
        out.addcmul_(basis, a)


def _dots(stack: Tensor, x: Tensor) -> Tensor:
    """The dot product of each basis with `x`, [K]."""
    if stack.device.type != "cpu":
        return torch.mv(stack.view(len(stack), -1), x)
    return torch.stack([torch.dot(basis, x) for basis in stack.view(len(stack), -1)])


def _cast(x: Tensor, dtype: torch.dtype, memory: Memory) -> Tensor:
    return x if x.dtype == dtype else memory.empty(x.shape, dtype, x.device).copy_(x)
