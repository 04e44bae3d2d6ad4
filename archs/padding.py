"""Networks that take only some sizes of images made to take all: the input is padded, the result cropped."""

from __future__ import annotations

from functools import cache, partial

import torch
from basicsr.archs.swinir_arch import SwinIR, SwinTransformerBlock
from torch import Tensor, nn

from qsr_plugin.data.borders import pad_to

#: Masks and tables of position biases in the host's SwinIR.
_WINDOW_TABLES = ("attn_mask", "relative_position_index")


class PaddedInput:
    """Mixin of networks whose input is padded at the right and at the bottom.

    Attributes:
        pad_multiple: Both sides become a multiple of it, in pixels.
        pad_minimum: Least length of a side after padding, in pixels.
        pad_square: Both sides become as long as the longer one.
        pad_scale: Pixels of the result per pixel of the input and side.
    """

    pad_multiple: int
    pad_minimum: int
    pad_square: bool
    pad_scale: int

    def forward(self, x: Tensor, *args, **kwargs) -> Tensor:
        """(N, C, H, W) of any size to (N, C', pad_scale H, pad_scale W)."""
        height, width = x.shape[-2:]
        low, high = self._padded(height), self._padded(width)
        if self.pad_square:
            low = high = max(low, high)
        out = super().forward(pad_to(x, low, high), *args, **kwargs)
        return out[..., : self.pad_scale * height, : self.pad_scale * width]

    def _padded(self, side: int) -> int:
        return -(-max(side, self.pad_minimum) // self.pad_multiple) * self.pad_multiple


def pad_input(net: nn.Module, scale: int, multiple: int = 1, minimum: int = 1, square: bool = False) -> nn.Module:
    """Have a network pad its input to the sizes it needs, and crop its result; parameters and keys stay as they are.

    Args:
        net: Takes and returns one image tensor. Its class is swapped, in place, for a subclass of the same name.
        scale: Upsampling factor, at least 1.
        multiple: Both sides must be a multiple of this.
        minimum: And not shorter than this.
        square: And equal.

    Returns:
        ``net``.

    Raises:
        ValueError: For numbers below 1.
    """
    for name, value in (("scale", scale), ("multiple", multiple), ("minimum", minimum)):
        if isinstance(value, bool) or not isinstance(value, int) or value < 1:
            raise ValueError(f"{name} is {value!r}; allowed are whole numbers from 1")
    net.__class__ = _padded(type(net))
    net.pad_scale, net.pad_multiple, net.pad_minimum, net.pad_square = scale, multiple, minimum, square
    return net


def without_padding(net: nn.Module) -> nn.Module:
    """Undo :func:`pad_input`, in place, or leave out the padding of a network with :class:`PaddedInput` as its base.

    ``pad_multiple``, ``pad_minimum`` and ``pad_square`` still say what is needed. Masks of the host's shifted windows
    are computed without writing into slices, so that exporters can follow.
    """
    if isinstance(net, PaddedInput):
        net.__class__ = next(kind for kind in type(net).__mro__ if not issubclass(kind, PaddedInput))
    for part in net.modules():
        if isinstance(part, SwinTransformerBlock):
            part.calculate_mask = partial(shift_mask, window=part.window_size, shift=part.shift_size)
    return net


def shift_mask(size: tuple[int, int], window: int, shift: int) -> Tensor:
    """What keeps pixels of shifted windows apart that are no neighbours in the image.

    Args:
        size: Height and width, multiples of ``window``.
        window: Side of a window.
        shift: How far windows are shifted, more than 0 and less than ``window``.

    Returns:
        (windows, window^2, window^2): 0, or -100 for a pair that is kept apart.
    """
    rows, columns = (
        (places >= side - window).int() + (places >= side - shift).int()
        for places, side in ((torch.arange(side), side) for side in size)
    )
    kinds = (3 * rows.unsqueeze(1) + columns).view(size[0] // window, window, size[1] // window, window)
    kinds = kinds.transpose(1, 2).reshape(-1, window * window)
    return -100.0 * (kinds.unsqueeze(1) != kinds.unsqueeze(2)).float()


@cache
def _padded(kind: type) -> type:
    """The class that pads, under the name by which a network is known to its role table, to reports and to files."""
    return type(kind.__name__, (PaddedInput, kind), {"__module__": kind.__module__, "__doc__": kind.__doc__})


def pad_to_windows(net: nn.Module) -> nn.Module:
    """Have the host's SwinIR pad its input to whole windows, and files leave out what building it makes anew.

    Every other network is returned as it is.
    """
    if not isinstance(net, SwinIR):
        return net
    for part in net.modules():
        if tables := [key for key, table in part.named_buffers(recurse=False) if key in _WINDOW_TABLES]:
            part.rebuilt_buffers = frozenset(tables)
    return pad_input(net, net.upscale, multiple=net.layers[0].residual_group.blocks[0].window_size)
