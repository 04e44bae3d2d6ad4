"""Statistics and gradients over all processes of a distributed run."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor
from torch import distributed as dist


def world_size() -> int:
    """Number of processes; 1 outside of a distributed run."""
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum of a tensor over all processes, identical on each; the tensor itself outside of a distributed run."""
    return _over_ranks(value, "SUM")


def max_over_ranks(value: Tensor) -> Tensor:
    """Largest value of each element over all processes; the tensor itself outside of a distributed run."""
    return _over_ranks(value, "MAX")


def _over_ranks(value: Tensor, operation: str) -> Tensor:
    if world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value, getattr(dist.ReduceOp, operation))
    return value


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, identical on each; the tensor itself outside of a distributed run."""
    return sum_over_ranks(value) / world_size() if world_size() > 1 else value


def gather_over_ranks(value: Tensor) -> Tensor:
    """Tensors of all processes, of equal shapes, one after the other along the first axis in the order of ranks."""
    if world_size() == 1:
        return value
    parts = [torch.empty_like(value) for _ in range(world_size())]
    dist.all_gather(parts, value.contiguous())
    return torch.cat(parts)


def average_in_place(tensors: Sequence[Tensor]) -> None:
    """Replace tensors by their means over all processes, in one message per data type."""
    if world_size() == 1:
        return
    for dtype in {tensor.dtype: None for tensor in tensors}:
        group = [tensor for tensor in tensors if tensor.dtype == dtype]
        mean = mean_over_ranks(torch.cat([tensor.detach().flatten() for tensor in group]))
        for tensor, part in zip(group, mean.split([tensor.numel() for tensor in group])):
            tensor.copy_(part.view_as(tensor))


def copy_from_first(tensors: Sequence[Tensor]) -> None:
    """Replace floating-point tensors by those of the first process, in one message per data type."""
    if world_size() == 1:
        return
    floating = [tensor for tensor in tensors if tensor.is_floating_point()]
    for dtype in {tensor.dtype: None for tensor in floating}:
        group = [tensor for tensor in floating if tensor.dtype == dtype]
        flat = torch.cat([tensor.detach().flatten() for tensor in group])
        dist.broadcast(flat, src=0)
        for tensor, part in zip(group, flat.split([tensor.numel() for tensor in group])):
            tensor.copy_(part.view_as(tensor))
