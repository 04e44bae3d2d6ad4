"""What a network executes on one small image: its layers in order, their shapes, and what their inputs come from.

The network runs once, as a copy and in evaluation mode. Sources are found in the autograd graph, so they depend on the
structure alone and not on weights or pixels; nothing that a backward pass would need is kept.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass
from typing import Any, Optional

import torch
from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qsr_plugin.errors import UserError
from qsr_plugin.quant.record import float_mode

logger = logging.getLogger("qsr_plugin")

#: Sides of the square images that are tried, in this order, and their channels.
SIZES = (16, 32, 48, 64)
CHANNELS = (3, 1)
_LAYERS = (nn.Conv1d, nn.Conv2d, nn.Conv3d, nn.ConvTranspose1d, nn.ConvTranspose2d, nn.ConvTranspose3d, nn.Linear)


class LayerTraceError(UserError, RuntimeError):
    """A network whose layers cannot be found by running it; the message says what was tried and what to do."""


@dataclass(frozen=True)
class Call:
    """One execution of a module that takes a tensor and returns one.

    Attributes:
        name: Dotted name of the module, the first one if it is shared.
        kind: Name of its class.
        is_layer: A convolution, transposed convolution or linear layer.
        input_shape: Shape of its first argument, for an image (1, C, S, S).
        output_shape: Shape of its result.
        channel_axis: Axis of the channels in both, 1 or -1.
        reads_image: Its input depends on the image; what only depends on parameters and buffers does not.
        reads_layers: Layers that its input comes from directly, that is with no other layer in between. Without any,
            it reads the image itself, or a sum, a repeat or another rearrangement of it.
        maps_colours: A 1x1 convolution between as many channels as the image has, such as the mean shifts that some
            networks store as layers. In ``reads_layers`` the first of them count as a part of the image.
        source: Number of the operation that made its input: calls with equal ones read the same tensor. ``None`` if
            nothing that depends on the image made it.
    """

    name: str
    kind: str
    is_layer: bool
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    channel_axis: int
    reads_image: bool
    reads_layers: frozenset[str]
    maps_colours: bool
    source: Optional[int]

    @property
    def positions(self) -> int:
        """Number of places in its input that share the channels: H * W of a feature map, tokens of a sequence."""
        return _positions(self.input_shape, self.channel_axis)

    @property
    def output_positions(self) -> int:
        """The same for its output."""
        return _positions(self.output_shape, self.channel_axis)


def _positions(shape: tuple[int, ...], channel_axis: int) -> int:
    return torch.Size(shape).numel() // shape[channel_axis] if len(shape) > 1 else 1


@dataclass(frozen=True)
class LayerTrace:
    """What ran, in order of execution.

    Attributes:
        image_shape: Of the image, (1, C, S, S).
        output_shape: Of the result, (1, C', S', S').
        calls: Every call of a module with a tensor in and a tensor out, modules that hold others included.
    """

    image_shape: tuple[int, ...]
    output_shape: tuple[int, ...]
    calls: tuple[Call, ...]

    @property
    def layers(self) -> tuple[Call, ...]:
        """First call of every layer, in order of first execution."""
        first: dict[str, Call] = {}
        for call in self.calls:
            if call.is_layer:
                first.setdefault(call.name, call)
        return tuple(first.values())


@torch.inference_mode(mode=False)
@torch.enable_grad()
def trace_layers(net: nn.Module) -> LayerTrace:
    """Run a copy of a network on a small image and list what it executes.

    Images of 16 to 64 pixels a side with three channels, then one, are tried until the network takes one: some need a
    multiple of a window or a least size. The network itself is left as it is.

    Args:
        net: Float, quantized or tapped; takes and returns one image tensor (N, C, H, W). Sites run as float layers.

    Raises:
        LayerTraceError: If it takes none of the images, or returns something other than an image tensor.
    """
    kind = getattr(net, "float_class", type(net)).__name__
    try:
        copy = deepcopy(net).eval().requires_grad_(False)
    except (RuntimeError, TypeError, ValueError) as error:
        raise LayerTraceError(
            f"{kind} cannot be copied to look at its layers ({error}). Remove weight norm or parametrizations from it, "
            "or register a role table (qsr_plugin.quant.places.register_roles)."
        ) from None
    problems: dict[str, str] = {}
    for size in SIZES:
        for channels in CHANNELS:
            try:
                return _run(copy, (1, channels, size, size))
            except Exception as error:  # what a network raises for a size it does not take can be anything
                problem = f"{type(error).__name__}: {error}".splitlines()[0]
                problems.setdefault(problem, f"{channels}x{size}x{size}")  # most say the same at every size
                logger.debug("%s does not take an image of %dx%dx%d", kind, channels, size, size, exc_info=True)
    tried = "\n  ".join(f"{image}: {problem}" for problem, image in problems.items())
    raise LayerTraceError(
        f"{kind} takes no small test image, so its layers cannot be found. Tried:\n  {tried}\nMake its forward take "
        "and return one image tensor (N, C, H, W), pad inside it to the sizes it needs, or register a role table "
        "(qsr_plugin.quant.places.register_roles)."
    )


def _run(copy: nn.Module, shape: tuple[int, ...]) -> LayerTrace:
    like = next((p for p in copy.parameters() if p.is_floating_point()), torch.zeros(()))
    generator = torch.Generator().manual_seed(0)
    image = torch.rand(shape, generator=generator).to(like).requires_grad_() * 1  # changing a leaf is refused
    watch = _Watch(image)
    handles = [handle for name, module in copy.named_modules() for handle in watch.hooks(name, module)]
    devices = [like.device] if like.device.type == "cuda" else []
    try:
        with (
            torch.random.fork_rng(devices),
            saved_tensors_hooks(lambda tensor: None, lambda nothing: None),
            float_mode(),
        ):
            out = copy(image)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(out, Tensor) or out.ndim != 4:
        what = f"a tensor of shape {tuple(out.shape)}" if isinstance(out, Tensor) else f"a {type(out).__name__}"
        raise TypeError(f"it returned {what}, not an image tensor (N, C, H, W)")
    return LayerTrace(shape, tuple(out.shape), tuple(call for call in watch.calls if call is not None))


class _Watch:
    """Hooks that fill ``calls``; the place of a call is that of its start."""

    def __init__(self, image: Tensor) -> None:
        self.calls: list[Optional[Call]] = []
        self._image = image
        self._open: list[tuple[int, dict[str, Any]]] = []
        self._made_by: dict[object, str] = {}
        self._labels: dict[object, int] = {}
        self._latest: Optional[str] = None

    def hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Register hooks on a module; yields their handles."""
        if name:
            yield module.register_forward_pre_hook(lambda module, inputs: self._enter(name, module, inputs))
            yield module.register_forward_hook(lambda module, inputs, out: self._leave(module, out))

    def _enter(self, name: str, module: nn.Module, inputs: tuple[Any, ...]) -> None:
        x, seen = inputs[0] if inputs else None, {}
        if isinstance(x, Tensor) and x.ndim > 0:
            is_layer, axis = isinstance(module, _LAYERS), 1 if x.ndim == 4 else -1
            if is_layer:
                axis = -1 if isinstance(module, nn.Linear) else x.ndim - len(module.kernel_size) - 1
            seen = {
                "name": name,
                "kind": type(module).__name__,
                "is_layer": is_layer,
                "input_shape": tuple(x.shape),
                "channel_axis": axis,
                "reads_image": x.requires_grad or not torch.is_grad_enabled(),
                "reads_layers": self._layers_before(x) if is_layer else frozenset(),
                "source": None if x.grad_fn is None else self._labels.setdefault(x.grad_fn, len(self._labels)),
            }
        self._open.append((len(self.calls), seen))
        self.calls.append(None)

    def _leave(self, module: nn.Module, out: Any) -> None:
        position, seen = self._open.pop()
        if not seen or not isinstance(out, Tensor) or out.ndim == 0:
            return
        call = Call(**seen, output_shape=tuple(out.shape), maps_colours=self._maps_colours(module, seen["is_layer"]))
        self.calls[position] = call
        if call.is_layer and (call.reads_layers or not call.maps_colours):
            self._latest = call.name
            if out.grad_fn is not None:
                self._made_by[out.grad_fn] = call.name

    def _maps_colours(self, module: nn.Module, is_layer: bool) -> bool:
        if not is_layer or isinstance(module, nn.Linear) or set(module.kernel_size) != {1}:
            return False
        return module.in_channels == module.out_channels == self._image.shape[1]

    def _layers_before(self, x: Tensor) -> frozenset[str]:
        """Names of the layers nearest to a tensor in the graph; the latest one where no graph is made."""
        if not torch.is_grad_enabled():
            return frozenset(() if self._latest is None else (self._latest,))
        found, seen, todo = set(), set(), [x.grad_fn]
        while todo:
            node = todo.pop()
            if node is None or node in seen or node is self._image.grad_fn:
                continue
            seen.add(node)
            if node in self._made_by:
                found.add(self._made_by[node])
            else:
                todo += [earlier for earlier, _ in node.next_functions]
        return frozenset(found)
