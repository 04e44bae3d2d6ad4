"""Residual blocks that can be left out: the classes, and putting them into a network.

Every residual block ``f(x) = x + branch(x)`` of a role gets a learned factor ``a`` on its identity path and computes
``a * x + branch(x)``; a block that is left out computes ``a * x`` alone (Qin et al., NeurIPS 2023, the depth-dynamic
architecture). Choosing a depth is in :mod:`qsr_plugin.quant.depth`.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import TYPE_CHECKING, Optional

import torch
from torch import Tensor, nn

from qsr_plugin.errors import suggest
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.schema import Depth
from qsr_plugin.quant.sites import derived_class

if TYPE_CHECKING:
    from qsr_plugin.quant.places import Index, Place


class ScaledShortcut:
    """What blocks and the remains of dropped blocks have in common.

    Attributes:
        shortcut_scale: 0-d, the factor ``a`` of the identity path; any real number, 1 at the start.
    """

    shortcut_scale: nn.Parameter


class DepthBlock(ScaledShortcut):
    """Mixin of residual blocks that can be left out.

    Attributes:
        skipped: Whether forwards leave out everything but the identity path; chosen by ``set_depth``.
    """

    skipped: bool = False

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """``a * x + branch(x)``, or ``a * x`` if skipped; the output has the shape of ``x``.

        The block's own forward gives ``x + branch(x)``, so ``(a - 1) * x`` is added to it. At ``a = 1`` the result
        equals the block's own. Further arguments are passed on.
        """
        if self.skipped:
            return x * self.shortcut_scale
        # Autocast would widen everything to the type of the factor.
        return torch.addcmul(super().forward(x, *args, **kwargs), x, (self.shortcut_scale - 1).to(x.dtype))


class DroppedBlock(ScaledShortcut, nn.Module):
    """What is left of a block that was dropped for good: the factor of its identity path."""

    def __init__(self, shortcut_scale: nn.Parameter) -> None:
        super().__init__()
        self.shortcut_scale = shortcut_scale

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """``a * x``; further arguments of the block are ignored."""
        return x * self.shortcut_scale


# -- surgery ---------------------------------------------------------------------------------------------------------


def find_blocks(
    index: Index, roles: Mapping[str, tuple[str, ...]], depth: Depth, places: Iterable[Place], backbone: str
) -> dict[str, nn.Module]:
    """The blocks of a float network that a recipe's ``depth`` speaks of, by name in module order.

    Args:
        index: Names of the network's modules.
        roles: Role table of the backbone.
        depth: The recipe's ``depth``.
        places: Places the recipe quantizes.
        backbone: For messages.

    Raises:
        RecipeError: If the role gives no blocks, a block says why it is ``never_left_out``, is shared or quantized
            itself, or ``kept`` does not fit.
    """
    where, patterns = f"recipe.depth.role is '{depth.role}'", roles.get(depth.role, ())
    if not patterns or any(":" in pattern for pattern in patterns):
        modules = [role for role, found in roles.items() if found and not any(":" in pattern for pattern in found)]
        raise RecipeError(f"{where}: no modules of {backbone} have that role. {suggest(depth.role, modules)}")
    found = {name for pattern in patterns for name, _ in index.matching(pattern, None)}
    blocks = {name: module for name, module in index.modules.items() if name in found}
    if not blocks:
        raise RecipeError(f"{where}: '{', '.join(patterns)}' matches no module of {backbone}: give it more blocks")
    for name, module in blocks.items():
        if reason := getattr(module, "never_left_out", ""):
            raise RecipeError(
                f"{where}: {name} of {backbone} cannot be left out: {reason}. Set 'depth' of the recipe to null, and "
                "'depths' of its stages to [1.0]; or take a backbone whose blocks add their result to their input."
            )
        names = [other for other, one in index.modules.items() if one is module]
        if len(names) > 1:
            raise RecipeError(
                f"{where}: one block is used as {' and '.join(names)}, so none of them could be left out alone. Build "
                f"{backbone} with blocks of their own."
            )
    ports = [f"{place.name}.{place.port}" for place in places if place.name in blocks]
    if ports:
        raise RecipeError(
            f"{where}: the recipe quantizes {ports[0]}. A block that can be left out needs a float identity path: "
            "quantize the layers inside it (role block.conv), or remove 'depth'."
        )
    kept = range(len(blocks)) if depth.kept is None else depth.kept
    if not kept or len(set(kept)) != len(kept) or not set(kept) <= set(range(len(blocks))):
        raise RecipeError(
            f"recipe.depth.kept is {list(kept)}; {backbone} has {len(blocks)} blocks: give different positions from 0 "
            f"to {len(blocks) - 1}"
        )
    return blocks


def add_depth(net: nn.Module, blocks: Mapping[str, nn.Module], kept: Optional[Sequence[int]]) -> None:
    """Give blocks from :func:`find_blocks` their factor, drop those not kept, and give the network its order."""
    device = next((parameter.device for parameter in net.parameters()), None)
    for position, (name, block) in enumerate(blocks.items()):
        block.__class__ = derived_class(DepthBlock, type(block))
        block.shortcut_scale = nn.Parameter(torch.ones((), device=device))
        if kept is not None and position not in kept:
            drop_block(net, name)
    net.register_buffer("block_order", torch.arange(len(blocks if kept is None else kept), device=device))


def drop_block(net: nn.Module, name: str) -> None:
    """Replace a block by what is left of it; its factor stays the same parameter."""
    block, (parent, _, child) = net.get_submodule(name), name.rpartition(".")
    setattr(net.get_submodule(parent), child, DroppedBlock(block.shortcut_scale).train(block.training))


def depth_keys(net: nn.Module) -> set[str]:
    """State-dict keys that :func:`add_depth` added to the float network's."""
    scaled = (name for name, module in net.named_modules() if isinstance(module, ScaledShortcut))
    keys = {f"{name}.shortcut_scale" for name in scaled}
    return {*keys, "block_order"} if keys else keys
