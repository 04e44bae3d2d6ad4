"""What a network calls on one small image: modules and functions in order, and the tensors that pass between them.

A tensor is told by its identity and by how often it was changed in place, so a sum written as ``res += x`` stands
between the module that made ``res`` and the one that reads it.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from qsr_plugin.deploy.grids import Grid
from qsr_plugin.quant.layer_trace import CHANNELS, SIZES, LayerTraceError
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.sites import Site

#: Identity of a tensor, and how often it was changed in place.
Key = tuple[int, int]


@dataclass(frozen=True, eq=False)
class Call:
    """One call of a module or function.

    Attributes:
        name: Dotted name of the module; "" for a function.
        module: The module; ``None`` for a function.
        start: When it began; calls inside it begin later.
        end: When it was done.
        reads: Tensors among its arguments.
        made: Tensors in its result.
        input_shape: Shape of the first tensor of the arguments; () without one.
        output_shape: Shape of the first tensor of the result; () without one.
    """

    name: str
    module: nn.Module | None
    start: int
    end: int
    reads: tuple[Key, ...]
    made: tuple[Key, ...]
    input_shape: tuple[int, ...]
    output_shape: tuple[int, ...]

    def holds(self, other: Call) -> bool:
        """Whether another call is this one, or a part of it."""
        return self.start <= other.start and other.end <= self.end

    @property
    def label(self) -> str:
        """Name and class of the module, for messages."""
        return f"'{self.name}' ({type(self.module).__name__})"


@dataclass(frozen=True, eq=False)
class CallRecord:
    """All calls of one run.

    Attributes:
        image: What the network was given, (1, C, S, S) in [0, 1].
        output: What it returned, (1, C', S', S').
        calls: In the order in which they were done.
        modules: Those of modules other than the network, without what a layer calls inside itself.
        kept: Every tensor seen: an identity is reused as soon as its tensor is gone.
    """

    image: Tensor
    output: Tensor
    calls: tuple[Call, ...]
    modules: tuple[Call, ...]
    kept: tuple[Tensor, ...]

    def maker(self, key: Key, before: int) -> Call | None:
        """The innermost module that returned a tensor, of those done before a time; ``None`` if a function made it."""
        made, found = [call for call in self.modules if call.made == (key,) and call.end < before], None
        while made:
            found = max(made, key=lambda call: call.end)
            made = [call for call in made if found.holds(call) and call is not found]
        return found

    def read_elsewhere(self, key: Key, made_by: Call, read_by: Call) -> bool:
        """Whether anything but one call, and what holds it, reads the tensor that another one made."""
        readers = (call for call in self.calls if key in call.reads and not made_by.holds(call))
        return any(not read_by.holds(call) and not call.holds(read_by) for call in readers)

    def times(self, module: nn.Module) -> int:
        """How often a module was called."""
        return sum(call.module is module for call in self.calls)


def quantizes(module: nn.Module) -> bool:
    """Whether a module holds quantizers, or the grids that take their place in a lowered network."""
    return any(isinstance(part, (Quantizer, Grid)) for part in module.modules())


@torch.inference_mode(mode=False)
@torch.no_grad()
def record_calls(net: nn.Module) -> CallRecord:
    """Run a network on a small random image and record what it calls.

    Args:
        net: Takes and returns one image tensor (N, C, H, W); in evaluation mode. Left as it is.

    Raises:
        LayerTraceError: If it is in training mode, or takes none of the images of 16 to 64 pixels a side.
    """
    if net.training:
        raise LayerTraceError(f"{type(net).__name__} is in training mode: call net.eval() first")
    problem = None
    for size in SIZES:
        for channels in CHANNELS:
            try:
                return _run(net, channels, size)
            except Exception as error:  # what a network raises for a size it does not take can be anything
                problem = problem or f"{type(error).__name__}: {error}".splitlines()[0]
    raise LayerTraceError(f"{type(net).__name__} takes no small test image: {problem}")


def _run(net: nn.Module, channels: int, size: int) -> CallRecord:
    like = next((p for p in net.parameters() if p.is_floating_point()), torch.zeros(()))
    image = torch.rand(1, channels, size, size, generator=torch.Generator().manual_seed(0)).to(like)
    watch = _Watch()
    handles = [handle for name, module in net.named_modules() for handle in watch.hooks(name, module)]
    try:
        with watch:
            out = net(image)
    finally:
        for handle in handles:
            handle.remove()
    if not isinstance(out, Tensor) or out.dim() != 4:
        raise TypeError("it did not return an image tensor (N, C, H, W)")
    modules = [call for call in watch.calls if call.module is not None]
    layers = [call for call in modules if _is_layer(call.module) and call.module is not net]
    visible = [
        call
        for call in modules
        if call.module is not net and not any(layer.holds(call) and layer is not call for layer in layers)
    ]
    return CallRecord(image, out, tuple(watch.calls), tuple(visible), tuple(watch.kept))


def _is_layer(module: nn.Module) -> bool:
    """Modules that are looked at as a whole: those with a weight, and those that may quantize."""
    return isinstance(module, (Site, nn.modules.conv._ConvNd, nn.Linear)) or "weight" in module._parameters


class _Watch(TorchFunctionMode):
    """Fills ``calls`` while a network runs under it."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[Call] = []
        self.kept: list[Tensor] = []
        self._open: list[tuple[int, tuple[Key, ...], tuple[int, ...]]] = []
        self._time = 0

    def hooks(self, name: str, module: nn.Module) -> Iterator[Any]:
        """Register hooks on a module; yields their handles."""
        yield module.register_forward_pre_hook(lambda _, args, named: self._enter((args, named)), with_kwargs=True)
        yield module.register_forward_hook(lambda module, _, out: self._leave(name, module, out))

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Run a function and note it; functions that return no tensor, as sizes, do not read the values of any."""
        self._enter((args, kwargs))
        out = func(*args, **(kwargs or {}))
        self._leave("", None, out)
        if not self.calls[-1].made:
            self.calls.pop()
        return out

    def _enter(self, arguments: Any) -> None:
        self._time += 1
        self._open.append((self._time, *self._keys(arguments)))

    def _leave(self, name: str, module: nn.Module | None, out: Any) -> None:
        start, reads, input_shape = self._open.pop()
        made, output_shape = self._keys(out)
        self._time += 1
        self.calls.append(Call(name, module, start, self._time, reads, made, input_shape, output_shape))

    def _keys(self, value: Any) -> tuple[tuple[Key, ...], tuple[int, ...]]:
        with torch._C.DisableTorchFunction():
            tensors = list(_tensors(value))
            self.kept += tensors
            shape = tuple(tensors[0].shape) if tensors else ()
            return tuple((id(tensor), tensor._version) for tensor in tensors), shape


def _tensors(value: Any) -> Iterator[Tensor]:
    if isinstance(value, Tensor):
        yield value
    elif isinstance(value, (tuple, list)):
        for item in value:
            yield from _tensors(item)
    elif isinstance(value, dict):
        yield from _tensors(list(value.values()))
