"""Batch norms and the scaling of the image range folded into the float convolutions beside them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor, nn

from qsr_plugin.deploy.calls import Call, CallRecord, Key, quantizes, record_calls
from qsr_plugin.deploy.linear_chain import nonlinearity
from qsr_plugin.deploy.tail import TOLERANCE, replace_modules, restore_modules
from qsr_plugin.quant.layer_trace import LayerTraceError


@dataclass(frozen=True)
class FoldReport:
    """What became of one batch norm, of the scaling of the image range, or of the mean colour.

    Attributes:
        step: Which of them.
        applied: Whether it was folded; if not, these modules are as they were.
        reason: What was done, or why nothing.
        modules: Dotted names of the modules concerned.
        max_difference: Largest difference that the step makes on a random image: in the image, in [0, 1], or in the
            features beside the fold, as a share of the largest value; ``None`` if the step was not tried.
    """

    step: Literal["batch norm", "image range", "image mean"]
    applied: bool
    reason: str
    modules: tuple[str, ...]
    max_difference: float | None = None

    def __str__(self) -> str:
        return f"{self.step}: {'' if self.applied else 'not folded: '}{self.reason}"


@torch.no_grad()
def fold_affine(net: nn.Module) -> list[FoldReport]:
    """Fold what is affine into neighbouring convolutions, in place; call it before the tail is collapsed.

    * A batch norm that alone reads the result of a float convolution becomes a part of it.
    * The factor ``img_range`` of networks that compute ``(x - mean) * img_range ... / img_range + mean`` goes into the
      convolutions that read the image and the one that makes it; the attribute becomes 1. The mean stays: the image
      without it is padded with zeros, and in a bias the border would see it.

    Convolutions that quantize, or whose weight is quantized, are left alone: engines fold batch norms into the scales
    of integers, and a range that was calibrated on scaled pixels holds for these.

    Args:
        net: Float or lowered network in evaluation mode, (N, C, H, W) in [0, 1] to (N, C', scale H, scale W).

    Returns:
        One report per step, in order of execution; empty if there is nothing to fold. Each step is checked, and undone
        if it makes a difference of more than 1e-4. Beyond the features beside the fold, the check goes on with those
        of before: a quantizer there may answer a rounding error with a whole step.
    """
    try:
        record = record_calls(net)
    except LayerTraceError as error:
        return [FoldReport("batch norm", False, str(error), ())]
    norms = [call for call in record.modules if isinstance(call.module, nn.BatchNorm2d)]
    reports = [_fold_norm(net, record, call) for call in sorted(norms, key=lambda call: call.start)]
    owners = [part for part in net.modules() if _range_of(part) != 1]
    return reports + [_fold_range(net, record, owner) for owner in owners]


def _fold_norm(net: nn.Module, record: CallRecord, call: Call) -> FoldReport:
    norm, maker = call.module, record.maker(call.reads[0], call.start)
    names = (call.name,) if maker is None else (maker.name, call.name)
    if maker is None or not isinstance(maker.module, nn.Conv2d):
        return FoldReport("batch norm", False, f"no convolution stands directly before {call.label}", names)
    if record.read_elsewhere(call.reads[0], maker, call):
        return FoldReport("batch norm", False, f"something else reads the result of {maker.label} as well", names)
    if record.times(norm) != 1 or record.times(maker.module) != 1:
        return FoldReport("batch norm", False, f"{maker.label} or {call.label} runs more than once", names)
    if norm.running_mean is None:
        return FoldReport("batch norm", False, f"{call.label} takes its statistics from the image", names)
    if not _is_float(maker.module):
        return FoldReport("batch norm", False, f"{maker.label} quantizes; engines fold {call.label} themselves", names)
    factor = (norm.running_var.double() + norm.eps).rsqrt()
    offset = -norm.running_mean.double() * factor
    if norm.affine:
        factor, offset = factor * norm.weight.double(), offset * norm.weight.double() + norm.bias.double()
    before = _run(net, record, [norm])
    undo_weights = _scale_outputs(maker.module, factor, offset)
    places = replace_modules(net, {norm: nn.Identity()})

    def undo() -> None:
        undo_weights()
        restore_modules(places)

    difference = _difference(before, _run(net, record, [maker.module], before[1]))
    return _kept("batch norm", f"{call.label} is a part of {maker.label}", names, difference, undo)


def _fold_range(net: nn.Module, record: CallRecord, owner: nn.Module) -> FoldReport:
    factor = _range_of(owner)
    readers, last = image_readers(record), image_maker(record)
    names = tuple(call.name for call in (*readers, *([last] if last else [])))
    if last is None or not readers:
        return FoldReport("image range", False, f"img_range {factor:g}: no convolution at one of the two ends", names)
    for call in (*readers, last):
        if not isinstance(call.module, nn.Conv2d) or not _is_float(call.module):
            reason = f"img_range {factor:g}: {call.label} is not a float convolution"
            return FoldReport("image range", False, reason, names)
        if record.times(call.module) != 1:
            return FoldReport("image range", False, f"img_range {factor:g}: {call.label} runs more than once", names)
    modules = [call.module for call in readers]
    before = _run(net, record, modules)
    undo_weights = [_scale_inputs(call.module, factor) for call in readers]
    undo_weights.append(_scale_outputs(last.module, torch.full((last.module.out_channels,), 1 / factor).double()))
    options = getattr(net, "backbone_options", None)
    owner.img_range = 1.0
    if options is not None:
        net.backbone_options = {**options, "img_range": 1.0}

    def undo() -> None:
        for one in reversed(undo_weights):
            one()
        owner.img_range = factor
        if options is not None:
            net.backbone_options = options

    difference = _difference(before, _run(net, record, modules, before[1]))
    return _kept("image range", f"img_range {factor:g} is a part of {', '.join(names)}", names, difference, undo)


def _kept(
    step: Literal["batch norm", "image range"],
    reason: str,
    names: tuple[str, ...],
    difference: float,
    undo: Callable[[], None],
) -> FoldReport:
    """The report of a step just taken, which is undone if it changes too much."""
    if difference <= TOLERANCE:
        return FoldReport(step, True, reason, names, difference)
    undo()
    reason = f"a difference of {difference:.1e}; allowed is {TOLERANCE:.0e}"
    return FoldReport(step, False, reason, names, difference)


def _run(
    net: nn.Module, record: CallRecord, modules: Sequence[nn.Module], instead: Sequence[Tensor] = ()
) -> tuple[Tensor, list[Tensor]]:
    """Output for the recorded image, and the results of some modules, in whose place others may go on."""
    seen: list[Tensor] = [record.output] * len(modules)

    def watch(index: int) -> Callable[..., Tensor | None]:
        def note(_module: nn.Module, _inputs: object, out: Tensor) -> Tensor | None:
            seen[index] = out.clone()
            return instead[index].clone() if instead else None

        return note

    handles = [module.register_forward_hook(watch(index)) for index, module in enumerate(modules)]
    try:
        return net(record.image), seen
    finally:
        for handle in handles:
            handle.remove()


def _difference(before: tuple[Tensor, list[Tensor]], after: tuple[Tensor, list[Tensor]]) -> float:
    differences = [(before[0] - after[0]).abs().max()]
    for old, new in zip(before[1], after[1], strict=True):
        differences.append((old - new).abs().max() / old.abs().max().clamp_min(torch.finfo(old.dtype).tiny))
    return float(torch.stack(differences).max())


def _range_of(module: nn.Module) -> float:
    """Attribute ``img_range`` of a module; 1 without one."""
    value = getattr(module, "img_range", 1.0)
    usable = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value) and value > 0
    return float(value) if usable else 1.0


def _is_float(conv: nn.Conv2d) -> bool:
    return "weight" in conv._parameters and not quantizes(conv)


def image_readers(record: CallRecord) -> list[Call]:
    """Modules that read the image, or what functions alone make of it."""
    outside = [call for call in record.calls if not any(module.holds(call) for module in record.modules)]
    images: set[Key] = {(id(record.image), record.image._version)}
    for call in sorted(outside, key=lambda one: one.start):
        if call.module is None and images.intersection(call.reads):
            images.update(call.made)
    inner = [call for call in record.modules if images.intersection(call.reads)]
    return [call for call in inner if not any(call.holds(one) and one is not call for one in inner)]


def image_maker(record: CallRecord) -> Call | None:
    """The last convolution, behind which modules only put the pixels elsewhere."""
    call = max(record.modules, key=lambda one: one.start)
    while call is not None and not isinstance(call.module, nn.Conv2d):
        movable = len(call.reads) == 1 and len(call.input_shape) == 4 and not list(call.module.parameters())
        scale = call.output_shape[2] // call.input_shape[2] if movable and len(call.output_shape) == 4 else 0
        if not scale or nonlinearity(call.module, call.input_shape[1], scale):
            return None
        call = record.maker(call.reads[0], call.start)
    return call


def _scale_inputs(conv: nn.Conv2d, factor: float) -> Callable[[], None]:
    """Have a convolution see its input times a factor; returns what undoes it."""
    return _set(conv, conv.weight.double() * factor, None if conv.bias is None else conv.bias.double())


def _scale_outputs(conv: nn.Conv2d, factor: Tensor, offset: Tensor | None = None) -> Callable[[], None]:
    """Multiply the output channels of a convolution, then add; returns what undoes it."""
    bias = None if conv.bias is None else conv.bias.double() * factor
    if offset is not None:
        bias = offset if bias is None else bias + offset
    return _set(conv, conv.weight.double() * factor.to(conv.weight.device).view(-1, 1, 1, 1), bias)


def _set(conv: nn.Conv2d, weight: Tensor, bias: Tensor | None) -> Callable[[], None]:
    """New parameters, in the type of the old ones; other layers may share those."""
    before = (conv.weight, conv.bias)
    conv.weight = nn.Parameter(weight.to(before[0].dtype), requires_grad=False)
    conv.bias = None if bias is None else nn.Parameter(bias.to(before[0].dtype), requires_grad=False)

    def undo() -> None:
        conv.weight, conv.bias = before

    return undo
