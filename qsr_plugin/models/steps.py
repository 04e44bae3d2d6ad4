"""Gradients of one training step: summed losses, cooperative weighting, and several depths on one batch.

Each function leaves the step's gradients in ``.grad``, averaged over the processes of a distributed run. Only
:func:`summed` goes through a DDP wrapper; the others run the bare network and reduce by themselves, because what they
do with gradients is not linear (cooperative) or leaves parameters out (depths).
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Collection, Mapping, Sequence

import torch
from torch import Tensor, nn

from qsr_plugin.losses.cooperative import combine
from qsr_plugin.models.stages import parameter_groups
from qsr_plugin.quant.depth import depth_of, set_depth
from qsr_plugin.quant.reduce import average_in_place, copy_from_first
from qsr_plugin.quant.schema import Cooperative

Losses = Mapping[str, Tensor]


def summed(losses: Losses) -> None:
    """Backward of the sum of all losses."""
    sum(losses.values()).backward()


def cooperative(losses: Losses, regularizers: Collection[str], net: nn.Module, options: Cooperative) -> None:
    """Backward of the losses in two sets of gradients over one forward, combined for the weights.

    The regularizers' gradient is taken for the float network's parameters only; ranges and everything else learn from
    the other losses alone. In a distributed run each set is averaged before the two are combined, which equals one
    process on the joint batch.

    Args:
        losses: All losses of the step by name.
        regularizers: Names of those whose gradient is weighted.
        net: Bare network.
        options: The recipe's ``cooperative``.
    """
    names = {id(parameter): name for name, parameter in net.named_parameters()}
    weights = [p for p in parameter_groups(net)["weights"] if p.requires_grad]
    chosen = {id(p) for p in weights}
    rest = [p for p in net.parameters() if p.requires_grad and id(p) not in chosen]
    regularizer = sum(losses[name] for name in regularizers)
    pulling: Sequence[Tensor | None] = [None] * len(weights)
    if weights and regularizer.requires_grad:
        pulling = torch.autograd.grad(regularizer, weights, retain_graph=True, allow_unused=True)
    reconstruction = sum(value for name, value in losses.items() if name not in regularizers)
    learning = torch.autograd.grad(reconstruction, [*weights, *rest], materialize_grads=True)
    average_in_place(learning)
    average_in_place([gradient for gradient in pulling if gradient is not None])
    combined = combine([names[id(p)] for p in weights], learning[: len(weights)], pulling, options)
    for parameter, gradient in zip([*weights, *rest], [*combined, *learning[len(weights) :]]):
        parameter.grad = gradient


def depths(net: nn.Module, shares: Sequence[float], losses_of: Callable[[], Losses]) -> OrderedDict[str, Tensor]:
    """Backward of the mean over several depths of the summed losses, one forward and backward per depth.

    Args:
        net: Bare network with depth blocks.
        shares: Shares of its blocks, see :func:`qsr_plugin.quant.depth.depth_of`.
        losses_of: Runs the network at the depth that is set and returns its losses.

    Returns:
        The losses without graph; those of a reduced depth carry the number of blocks in their names.
    """
    found: OrderedDict[str, Tensor] = OrderedDict()
    try:
        for share in shares:
            blocks = depth_of(net, share)
            set_depth(net, blocks)
            losses = losses_of()
            (sum(losses.values()) / len(shares)).backward()
            suffix = "" if share == 1 else f"_{blocks}blocks"
            found.update({f"{name}{suffix}": value.detach() for name, value in losses.items()})
    finally:
        set_depth(net, None)
    average_in_place([p.grad for p in net.parameters() if p.grad is not None])
    return found


def share_buffers(net: nn.Module) -> None:
    """Give all processes the first one's buffers, as DDP does before its forward."""
    copy_from_first([buffer for buffer in net.buffers()])
