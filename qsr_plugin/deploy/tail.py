"""The linear end of a network as one convolution and one pixel shuffle.

Upsamplers such as ``conv -> shuffle 2 -> conv -> shuffle 2 -> conv`` have no activation in between. Away from the
borders they are one convolution of low-resolution features, which needs a tenth of the multiplications at scale 4. At
the borders each of their convolutions pads with zeros; there, small convolutions of the outermost features mend it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import nn

from qsr_plugin.deploy.calls import Call, CallRecord, quantizes, record_calls
from qsr_plugin.deploy.collapsed import CollapsedTail, collapsed_tail
from qsr_plugin.deploy.exact_border import exact_border, smallest_side
from qsr_plugin.deploy.linear_chain import affine_map, in_float64, nonlinearity, reach
from qsr_plugin.errors import first_line
from qsr_plugin.quant.layer_trace import LayerTraceError

#: Largest difference allowed in the image, in [0, 1].
TOLERANCE = 1e-4


@dataclass(frozen=True)
class TailReport:
    """What became of the end of a network.

    Attributes:
        applied: Whether it was replaced; if not, the network is as it was.
        reason: What was done, or why nothing.
        modules: Dotted names of the modules in the linear end, in order; if ``applied``, of those replaced.
        kernel_size: (height, width) of the one convolution in low-resolution pixels; ``None`` if there is none.
        macs_before: Multiplications per pixel of the input image in ``modules``.
        macs_after: The same of the one convolution, without the next.
        border_macs: Multiplications per pixel along the four sides of the image that make the border exact; 0 without.
        ring: Width of the border in output pixels where the convolution alone is not exact.
        interior_difference: Largest difference away from the ring, on a random image in [0, 1].
        ring_difference: The same with the ring.
    """

    applied: bool
    reason: str
    modules: tuple[str, ...] = ()
    kernel_size: tuple[int, int] | None = None
    macs_before: float = 0.0
    macs_after: float = 0.0
    border_macs: float = 0.0
    ring: int = 0
    interior_difference: float | None = None
    ring_difference: float | None = None

    def __str__(self) -> str:
        if not self.applied:
            return f"tail: {self.reason}"
        border = f", the outermost {self.ring} pixels not exact" if self.ring and not self.border_macs else ""
        return f"tail: {self.reason} ({self.macs_before / self.macs_after:.1f} times fewer multiplications{border})"


@torch.inference_mode(mode=False)
@torch.no_grad()
def collapse_tail(net: nn.Module, *, ring: bool = True) -> TailReport:
    """Replace the linear end of a network by one convolution and a pixel shuffle, in place.

    The end is the longest row of modules, each reading the very tensor that the one before made, up to the last module
    that runs, in which every module is linear with a constant and treats all places alike. Of it, the part that saves
    most is replaced. What follows the last module is not touched.

    Args:
        net: Float or lowered network in evaluation mode, (N, C, H, W) in [0, 1] to (N, C', scale H, scale W).
        ring: Have the border exact as well. Without it, the outermost pixels differ, ``TailReport.ring`` of them.

    Returns:
        What was done. The result is compared with that of the untouched network before it is kept.
    """
    if collapsed_tail(net) is not None:
        return TailReport(False, "collapsed already")
    try:
        record = record_calls(net)
    except LayerTraceError as error:
        return TailReport(False, str(error))
    if not record.modules:
        return TailReport(False, f"{type(net).__name__} calls no modules")
    chain, stop = _linear_end(record)
    names, macs = tuple(call.name for call in chain), sum(_macs(record, call) for call in chain)
    refused = TailReport(False, "", names, macs_before=macs)
    choice = _best_start(record, chain) if chain else None
    if choice is None:
        return _refuse(refused, f"{stop}, and there is no convolution after it and before the resolution rises")
    start, radius, after = choice
    chain = chain[start:]
    names, macs = names[start:], sum(_macs(record, call) for call in chain)
    if after >= macs:
        return _refuse(
            refused,
            f"no gain, one convolution would need {after:.0f} multiplications per pixel, and {', '.join(names)} need "
            f"{macs:.0f}",
        )
    modules = [call.module for call in chain]
    tail = _collapsed(modules, names, chain[0].input_shape[1], _scale(chain), radius, ring)
    if isinstance(tail, str):
        return _refuse(refused, f"{', '.join(names)} {tail}")
    tail = tail.to(record.output).eval()
    tail.minimum = tail.smallest * record.image.shape[2] // chain[0].input_shape[2]
    undo = put_tail(net, modules, tail)
    interior, border = _differences(record, net, tail.ring)
    if all(difference <= TOLERANCE for difference in ((interior, border) if ring else (interior,))):
        height, width = tail.conv.kernel_size
        return TailReport(
            applied=True,
            reason=f"{', '.join(names)} are one {height}x{width} convolution and a pixel shuffle",
            modules=names,
            kernel_size=(height, width),
            macs_before=macs,
            macs_after=_kernel_macs(record, chain, height * width),
            border_macs=_border_macs(record, chain, tail),
            ring=tail.ring,
            interior_difference=interior,
            ring_difference=border,
        )
    restore_modules(undo)
    return _refuse(
        refused,
        f"the image would change by {interior:.1e} away from borders, {border:.1e} with them; allowed {TOLERANCE:.0e}",
    )


def _collapsed(
    modules: Sequence[nn.Module], names: tuple[str, ...], channels: int, scale: int, radius: int, ring: bool
) -> CollapsedTail | str:
    """What takes the place of modules, in float64; or why nothing can."""
    f = in_float64(modules)
    found = affine_map(f, channels, scale, radius)
    if found is None:
        return "are no convolution when taken together"
    if not ring or not found.ring:
        return CollapsedTail(found, names)
    try:
        border = exact_border(f, found, radius)
    except RuntimeError as error:
        return f"have no gradient, which an exact border is made of ({first_line(error)})"
    smallest = smallest_side(f, CollapsedTail(found, names, border), channels)
    if smallest is None:
        return "make something else of the borders than small convolutions of the outermost pixels do"
    return CollapsedTail(found, names, border, nn.Sequential(*modules), smallest)


def put_tail(
    net: nn.Module, modules: Sequence[nn.Module], tail: CollapsedTail
) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put a collapsed tail in the place of the first of some modules, and nothing in that of the others.

    Returns:
        What :func:`restore_modules` needs.
    """
    return replace_modules(net, {modules[0]: tail, **{module: nn.Identity() for module in modules[1:]}})


def replace_modules(net: nn.Module, new: Mapping[nn.Module, nn.Module]) -> list[tuple[nn.Module, str, nn.Module]]:
    """Put other modules in the place of some, under every name they have.

    Returns:
        What :func:`restore_modules` needs.
    """
    places = [
        (parent, name, child) for parent in net.modules() for name, child in parent._modules.items() if child in new
    ]
    for parent, name, child in places:
        setattr(parent, name, new[child])
    return places


def restore_modules(places: Sequence[tuple[nn.Module, str, nn.Module]]) -> None:
    """Undo :func:`replace_modules`."""
    for parent, name, child in places:
        setattr(parent, name, child)


def _refuse(report: TailReport, reason: str) -> TailReport:
    return replace(report, reason=f"not collapsed: {reason}")


def _linear_end(record: CallRecord) -> tuple[list[Call], str]:
    """The modules at the end that are linear and read one another, and why there are no more."""
    call, chain = max(record.modules, key=lambda one: one.start), []
    while True:
        if problem := _problem(call):
            return chain, f"{call.label} {problem}"
        chain.insert(0, call)
        earlier = record.maker(call.reads[0], call.start)
        if earlier is None:
            return chain, f"what {call.label} reads is not the result of one module"
        if record.read_elsewhere(call.reads[0], earlier, call):
            return chain, f"the result of {earlier.label} is read in several places"
        call = earlier


def _problem(call: Call) -> str | None:
    """Why a module cannot be a part of the linear end."""
    if quantizes(call.module):
        return "quantizes"
    shapes = (call.input_shape, call.output_shape)
    if len(call.reads) != 1 or len(call.made) != 1 or any(len(shape) != 4 for shape in shapes):
        return "does not make one feature map of one"
    scale = shapes[1][2] // shapes[0][2]
    if scale < 1 or any(after != scale * before for before, after in zip(shapes[0][2:], shapes[1][2:])):
        sizes = ["x".join(map(str, shape[2:])) for shape in shapes]
        return f"makes {sizes[1]} pixels of {sizes[0]}, no whole multiple"
    return nonlinearity(call.module, shapes[0][1], scale)


def _best_start(record: CallRecord, chain: Sequence[Call]) -> tuple[int, int, float] | None:
    """Where to begin so that most multiplications are saved: position, reach, and what the convolution would need."""
    best, most = None, -math.inf
    for start, call in enumerate(chain):
        rest = chain[start:]
        modules = [one.module for one in rest]
        alone = modules.count(call.module) == 1 and all(record.times(one) == modules.count(one) for one in modules)
        if not _macs(record, call) or _scale(rest) < 2 or not alone:
            continue
        radius = reach(in_float64(modules), call.input_shape[1], _scale(rest))
        if radius is None:
            continue
        after = _kernel_macs(record, rest, (2 * radius + 1) ** 2)
        if (saved := sum(_macs(record, one) for one in rest) - after) > most:
            best, most = (start, radius, after), saved
    return best


def _scale(chain: Sequence[Call]) -> int:
    return chain[-1].output_shape[2] // chain[0].input_shape[2]


def _macs(record: CallRecord, call: Call) -> float:
    """Multiplications of the convolutions in a call, per pixel of the image."""
    total = 0
    for part in record.calls:
        if isinstance(part.module, nn.modules.conv._ConvNd) and call.holds(part):
            conv = part.module
            taps = math.prod(conv.kernel_size) * conv.in_channels * conv.out_channels // conv.groups
            total += taps * math.prod((part.input_shape if conv.transposed else part.output_shape)[2:])
    return total / record.image[0, 0].numel()


def _kernel_macs(record: CallRecord, chain: Sequence[Call], area: int) -> float:
    """The same of one convolution in the place of a chain."""
    taps = area * chain[0].input_shape[1] * chain[-1].output_shape[1] * _scale(chain) ** 2
    return taps * math.prod(chain[0].input_shape[2:]) / record.image[0, 0].numel()


def _border_macs(record: CallRecord, chain: Sequence[Call], tail: CollapsedTail) -> float:
    """Multiplications of the exact border per pixel along it; the corners are so few that they do not count."""
    if tail.border is None:
        return 0.0
    sides = list(tail.border.sides.values())
    taps = sum(side.conv.weight.numel() for side in sides) / len(sides)
    return taps * chain[0].input_shape[2] / record.image.shape[2]


def _differences(record: CallRecord, net: nn.Module, ring: int) -> tuple[float, float]:
    """Largest difference from the untouched network away from a border of ``ring`` pixels, and everywhere."""
    try:
        differences = (net(record.image) - record.output).abs()
    except (RuntimeError, IndexError, AttributeError, TypeError):  # something else reads what is gone
        return math.inf, math.inf
    inner = differences[..., ring : differences.shape[-2] - ring, ring : differences.shape[-1] - ring]
    return float(inner.max() if inner.numel() else differences.max()), float(differences.max())
