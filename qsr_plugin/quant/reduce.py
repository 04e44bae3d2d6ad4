"""Statistics over all processes of a distributed run."""

from __future__ import annotations

from torch import Tensor
from torch import distributed as dist


def mean_over_ranks(value: Tensor) -> Tensor:
    """Mean of a tensor over all processes, identical on each; the tensor itself outside of a distributed run."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return value
    value = value.clone()
    dist.all_reduce(value)
    return value / dist.get_world_size()
