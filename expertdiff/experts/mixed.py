"""Tensors mixed from those of the bases, with a gradient that is written where it stays."""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.autograd import Function
from torch.autograd.function import once_differentiable

from expertdiff.memory import Memory

Empty = Callable[..., Tensor]
"""Called with shape, dtype and device, as `torch.empty`."""


class Mixed(Function):
    """sum_k alpha_k stack_k for each stack [K, ...], a matrix-vector product each; alpha is [K].

    ``Mixed.apply(alpha, memory, dtypes, compiled, *stacks)`` sums in the type of a stack and
    returns as many tensors, in `dtypes`. Autograd's own way has a node for each step of each, makes
    a huge matrix product of the gradient of a stack, and takes fresh memory for all.
    """

    @staticmethod
    def forward(
        ctx: Any,
        alpha: Tensor,
        memory: Memory,
        dtypes: Sequence[torch.dtype],
        compiled: bool,
        *stacks: Tensor,
    ) -> tuple[Tensor, ...]:
        ctx.memory, ctx.compiled = memory, compiled
        ctx.save_for_backward(alpha, *stacks)
        ctx.set_materialize_grads(False)
        weights = [memory.empty(s.shape[1:], d, s.device) for s, d in zip(stacks, dtypes)]
        _run(ctx, _sums, alpha, stacks, weights)
        return tuple(weights)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *gradients: Tensor | None) -> tuple[Tensor | None, ...]:
        alpha, *stacks = ctx.saved_tensors
        of_alpha, _, _, _, *learned = ctx.needs_input_grad
        slope = torch.zeros_like(alpha) if of_alpha else None
        of_stacks = [
            ctx.memory.empty(stack.shape, stack.dtype, stack.device)
            if learns and gradient is not None
            else None
            for stack, gradient, learns in zip(stacks, gradients, learned)
        ]
        _run(ctx, _slopes, alpha, stacks, gradients, slope, of_stacks)
        return slope, None, None, None, *of_stacks


def _run(ctx: Any, function: Callable[..., None], *args: Any) -> None:
    if ctx.compiled:
        _compiled(function)(*args, torch.empty)
    else:
        function(*args, ctx.memory.empty)


@functools.cache
def _compiled(function: Callable[..., None]) -> Callable[..., None]:
    return torch.compile(function)


def _sums(alpha: Tensor, stacks: Sequence[Tensor], outs: Sequence[Tensor], empty: Empty) -> None:
    """sum_k alpha_k stack_k of each stack into its out."""
    for stack, out in zip(stacks, outs):
        exact = out.dtype == stack.dtype
        total = out if exact else empty(out.shape, dtype=stack.dtype, device=stack.device)
        if _in_passes(stack):
            torch.mul(stack[0], alpha[0], out=total)
            for a, basis in zip(alpha[1:], stack[1:]):
                total.addcmul_(basis, a)
        else:
            torch.mv(stack.view(len(alpha), -1).T, alpha, out=total.view(-1))
        if not exact:
            out.copy_(total)


def _slopes(
    alpha: Tensor,
    stacks: Sequence[Tensor],
    gradients: Sequence[Tensor | None],
    of_alpha: Tensor | None,
    of_stacks: Sequence[Tensor | None],
    empty: Empty,
) -> None:
    """Adds the gradient of `alpha`, and writes those of the stacks; where all are not ``None``."""
    for stack, gradient, of_stack in zip(stacks, gradients, of_stacks):
        if gradient is None:
            continue
        if gradient.dtype != stack.dtype:
            exact = empty(gradient.shape, dtype=stack.dtype, device=stack.device)
            gradient = exact.copy_(gradient)
        bases, gradient = stack.view(len(alpha), -1), gradient.flatten()
        if of_alpha is not None:
            if _in_passes(stack):
                of_alpha += torch.stack([torch.dot(basis, gradient) for basis in bases])
            else:
                of_alpha += torch.mv(bases, gradient)
        if of_stack is not None:
            torch.outer(alpha, gradient, out=of_stack.view(len(alpha), -1))


def _in_passes(stack: Tensor) -> bool:
    """Whether to go over one basis after another, instead of a product of matrix and vector.

    On a CPU, passes over numbers that stay in its cache are faster, and a compiler makes one pass
    of them all. Elsewhere, each would be a kernel to launch.
    """
    return stack.device.type == "cpu" or torch.compiler.is_compiling()
