"""One tensor mixed from those of the bases, in one product forward and two backward."""

from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from expertdiff.memory import Memory


class Mixed(Function):
    """sum_k alpha_k stack_k of alpha [K] and stack [K, ...], summed in the type of the stack.

    ``Mixed.apply(alpha, stack, dtype, memory)`` is in `dtype`. Autograd's own way through
    `torch.tensordot` takes a huge matrix product for the gradient of the stack, and fresh memory
    for all: up to five times as long, most of it in page faults.
    """

    @staticmethod
    def forward(
        ctx: Any, alpha: Tensor, stack: Tensor, dtype: torch.dtype, memory: Memory
    ) -> Tensor:
        ctx.memory = memory
        ctx.save_for_backward(alpha, stack)
        total = memory.empty(stack.shape[1:], stack.dtype, stack.device)
        torch.mv(stack.flatten(1).T, alpha, out=total.view(-1))
        return _cast(total, dtype, memory)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: Tensor) -> tuple[Tensor | None, Tensor | None, None, None]:
        alpha, stack = ctx.saved_tensors
        gradient = _cast(gradient, stack.dtype, ctx.memory).flatten()
        of_alpha = of_stack = None
        if ctx.needs_input_grad[0]:
            of_alpha = torch.mv(stack.flatten(1), gradient)
        if ctx.needs_input_grad[1]:
            of_stack = ctx.memory.empty(stack.shape, stack.dtype, stack.device)
            torch.outer(alpha, gradient, out=of_stack.flatten(1))
        return of_alpha, of_stack, None, None


def _cast(x: Tensor, dtype: torch.dtype, memory: Memory) -> Tensor:
    return x if x.dtype == dtype else memory.empty(x.shape, dtype, x.device).copy_(x)
