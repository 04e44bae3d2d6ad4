"""Networks of several depths from one set of weights: which blocks run, which are dropped first, slimming for good.

All depths share every parameter (Qin et al., NeurIPS 2023, the depth-dynamic architecture). The buffer ``block_order``
of the network holds the positions of its blocks, those kept longest first. The blocks themselves are in
:mod:`qsr_plugin.quant.depth_surgery`.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from typing import Optional

import torch
from torch import nn

from qsr_plugin.errors import UserError
from qsr_plugin.quant.depth_surgery import DepthBlock, ScaledShortcut, drop_block


class DepthError(UserError, ValueError):
    """A depth that a network does not have; the message says which it has."""


def depth_blocks(net: nn.Module) -> Iterator[tuple[str, DepthBlock]]:
    """Blocks of a network that can be left out, with their dotted names, in module order; not dropped ones."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, DepthBlock))


def set_depth(net: nn.Module, blocks: Optional[int]) -> nn.Module:
    """Choose how many blocks run: the first of ``block_order``; the others only scale, and cost nothing else.

    The choice holds for this network object, copies made from now on included, until the next one; files do not keep
    it (see :func:`slim`). Choose again after loading other weights, and calibrate at full depth: places in blocks that
    are left out see no data. One host synchronisation on a GPU, none in forwards.

    Args:
        net: Quantized network whose recipe has ``depth``. With ``blocks=None`` any network.
        blocks: 1 to all; ``None`` for all.

    Returns:
        ``net``.

    Raises:
        DepthError: For a number of blocks the network does not have.
    """
    own = [block for _, block in depth_blocks(net)]
    if blocks is not None:
        _check_depth(net, blocks, len(own))
    running = set(range(len(own)) if blocks is None else net.block_order[:blocks].tolist())
    for position, block in enumerate(own):
        block.skipped = position not in running
    return net


def _check_depth(net: nn.Module, blocks: int, available: int) -> None:
    kind = getattr(net, "float_class", type(net)).__name__
    if not available:
        raise DepthError(f"this {kind} has one depth only: its recipe needs depth: {{role: block}} for blocks to go")
    if isinstance(blocks, bool) or not isinstance(blocks, int) or not 1 <= blocks <= available:
        raise DepthError(f"depth is {blocks!r}; this {kind} has {available} blocks: give 1 to {available}")


def depth_of(net: nn.Module, share: float) -> int:
    """Number of blocks for a share of those the backbone has: ``round(share * n)``, at least 1.

    Exactly n/2 and n/4 where these are whole; the authors' script keeps one block more at each. In a network that was
    slimmed, n still counts the dropped blocks, and the answer is no more than what is left.

    Args:
        net: Network with depth.
        share: In (0, 1].
    """
    everything = sum(isinstance(module, ScaledShortcut) for module in net.modules())
    return min(max(1, round(share * everything)), sum(1 for _ in depth_blocks(net)))


def trained_depths(net: nn.Module) -> tuple[int, ...]:
    """Depths that the recipe's stages train and the network still has, the largest first; empty without depth."""
    if getattr(net, "block_order", None) is None:
        return ()
    shares = {share for stage in net.recipe.stages for share in stage.depths}
    return tuple(sorted({len(net.block_order), *(depth_of(net, share) for share in shares)}, reverse=True))


def rank_blocks(net: nn.Module) -> tuple[int, ...]:
    """Order the blocks by |a|, the smallest kept longest; equal ones keep their order. The depth stays as it is.

    A large factor says that the identity dominates, so little is lost without the branch. The paper ranks by these
    factors; that the small ones stay is inferred, not stated.

    Returns:
        Positions of the blocks, kept longest first; also written to ``net.block_order``.

    Raises:
        DepthError: If the network has one depth only.
    """
    own = [block for _, block in depth_blocks(net)]
    _check_depth(net, 1, len(own))
    running = sum(not block.skipped for block in own)
    net.block_order.copy_(torch.stack([block.shortcut_scale.detach().abs() for block in own]).argsort(stable=True))
    set_depth(net, running)
    return tuple(net.block_order.tolist())


def slim(net: nn.Module, blocks: int) -> nn.Module:
    """A copy of a network with that many blocks for good, to save or export; its output equals ``set_depth``'s.

    Dropped blocks leave only the factor of their identity path. ``recipe.depth.kept`` says which are left, counted in
    the float backbone; ``block_order`` counts those left, so that depths below can still be chosen, and a slimmed
    network can be slimmed again.

    Args:
        net: Quantized network whose recipe has ``depth``; not changed.
        blocks: 1 to all.

    Raises:
        DepthError: For a number of blocks the network does not have.
    """
    names = [name for name, _ in depth_blocks(net)]
    _check_depth(net, blocks, len(names))
    order = net.block_order[:blocks].tolist()
    left, depth = sorted(order), net.recipe.depth
    before = range(len(names)) if depth.kept is None else sorted(depth.kept)
    small = set_depth(copy.deepcopy(net), None)
    for position, name in enumerate(names):
        if position not in left:
            drop_block(small, name)
    small.block_order = net.block_order.new_tensor([left.index(position) for position in order])
    kept = {"kept": tuple(before[position] for position in left)}
    small.recipe = net.recipe.model_copy(update={"depth": depth.model_copy(update=kept)})
    return small
