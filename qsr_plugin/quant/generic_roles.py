"""Roles of a network without a role table, found from what it executes on a small image.

==============  ========================================================================================================
``head``        layers that read the image with no other layer in between, and a depthwise convolution that follows in
                the same module (the other half of a separable convolution)
``tail``        layers whose input has the resolution of the result; the last layer where none has, as in a network that
                ends with a convolution and a PixelShuffle
``upsampler``   layers between the last one at the body's resolution and the tail, and that last one if it makes the
                channels of a PixelShuffle or has a stride of its own
``block.conv``  every other layer: all kernel sizes, groups, attention and linear layers
``block``       modules of the body that follow one another, of one class, with inputs and outputs of one shape; without
                such repeats the outermost modules that keep the shape, or else the last layer of the body
``body_end``    none: it is part of ``block.conv``
``features``    input of the first layer of the upsampler, or of the tail
==============  ========================================================================================================

What cannot be told from a run is absent: ``block.shortcut``, ``block.residual``, ``block.addition``,
``block.conv_first``, ``block.conv_later``, ``block.conv_last``. Layers that see nothing of the image (position biases
made from tables), mean shifts stored as 1x1 convolutions, and layers that never run have no role.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Collection, Iterable, Mapping

from torch import nn

from qsr_plugin.quant.layer_trace import Call, LayerTrace, trace_layers

#: Every role that can be found.
GENERIC_ROLES = ("head", "block", "block.conv", "body_end", "upsampler", "tail", "features")


def generic_roles(net: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """Find the roles of a network by running a copy of it once on a small image.

    Args:
        net: Any network that takes and returns one image tensor (N, C, H, W); it stays as it is.

    Returns:
        Role to dotted module names, or ``name:port``, in order of execution; see the module's table. An empty tuple
        says that the network has no such place, a role that is missing that it cannot be known. Empty for a network
        without convolution and linear layers.

    Raises:
        LayerTraceError: If the network takes no small image.
    """
    trace = trace_layers(net)
    calls = [call for call in trace.calls if _has_role(call)]
    if not calls:
        return {}
    head = _names(call for call in calls if not call.reads_layers)
    head += tuple(name for name in _names(calls) if name not in head and _completes(net, trace, name, head))
    upsampler, tail = _ends(trace, [call for call in calls if call.name not in head])
    body = tuple(name for name in _names(calls) if name not in {*head, *upsampler, *tail})
    roles = {"head": head, "upsampler": upsampler, "tail": tail, "body_end": ()}
    if body:
        roles |= {"block.conv": body, "block": _blocks(trace, body)}
    if tail:
        roles["features"] = (f"{(*upsampler, *tail)[0]}:input",)
    return roles


def _has_role(call: Call) -> bool:
    return call.is_layer and call.reads_image and not call.maps_colours


def _completes(net: nn.Module, trace: LayerTrace, name: str, head: Collection[str]) -> bool:
    """Whether a layer is the depthwise half of a separable convolution that begins in the head."""
    layer, read = (
        net.get_submodule(name),
        {one for call in trace.layers if call.name == name for one in call.reads_layers},
    )
    depthwise = getattr(layer, "groups", 1) > 1 and layer.groups == layer.in_channels
    parent = name.rpartition(".")[0]
    return depthwise and bool(parent) and read <= set(head) and all(one.rpartition(".")[0] == parent for one in read)


def _names(calls: Iterable[Call]) -> tuple[str, ...]:
    return tuple(dict.fromkeys(call.name for call in calls))


def _ends(trace: LayerTrace, calls: list[Call]) -> tuple[tuple[str, ...], tuple[str, ...]]:
    """Upsampler and tail.

    Args:
        trace: For the resolutions of the head and of the result.
        calls: All calls of layers, without those of the head.
    """
    if not calls:
        return (), ()
    base = next(call.positions for call in trace.layers if _has_role(call))
    result = trace.output_shape[-2] * trace.output_shape[-1]
    if result <= base:
        return (), (calls[-1].name,)
    # One position is what pooling leaves for channel attention; it tells nothing about where in the network it stands.
    low = max((i for i, call in enumerate(calls) if 1 < call.positions <= base), default=-1)
    high = calls[low + 1 :]
    larger = [call for call in high if call.positions > base]
    if not larger:
        return (), (calls[-1].name,)
    raising = [calls[low]] if low >= 0 and _enlarges(calls[low], larger[0], base) else []
    tail = _names(call for call in larger if call.positions >= result) or (larger[-1].name,)
    return tuple(name for name in _names([*raising, *high]) if name not in tail), tail


def _enlarges(call: Call, following: Call, base: int) -> bool:
    """Whether a layer has a larger output itself, or its channels are shuffled into more positions after it."""
    made, wanted = call.output_shape[call.channel_axis], following.input_shape[following.channel_axis]
    return call.output_positions > base or made * call.output_positions == wanted * following.positions


# -- blocks ----------------------------------------------------------------------------------------------------------


def _blocks(trace: LayerTrace, body: tuple[str, ...]) -> tuple[str, ...]:
    """Modules that play the part of blocks; their outputs are what feature losses compare."""
    keeping = _modules_that_keep_shape(trace, body)
    groups: dict[tuple[str, str, tuple[int, ...]], list[Call]] = defaultdict(list)
    for call in keeping:
        groups[call.name.rpartition(".")[0], call.kind, call.input_shape].append(call)
    chains = [_chained(group) for group in groups.values()]
    repeated = {call.name: call.kind for chain in chains if len(chain) > 1 for call in chain}
    outermost = _outermost(repeated)
    if not outermost:
        return _outermost([call.name for call in keeping]) or body[-1:]
    held: dict[str, int] = defaultdict(int)
    for name in outermost:
        held[repeated[name]] += sum(layer.startswith(f"{name}.") for layer in body)
    usual = max(held, key=held.__getitem__)
    return tuple(name for name in outermost if repeated[name] == usual)


def _modules_that_keep_shape(trace: LayerTrace, body: tuple[str, ...]) -> list[Call]:
    """First calls of modules that hold layers of the body, none of its ends, and keep the shape of their input."""
    ends = {call.name for call in trace.layers if _has_role(call)} - set(body)
    first: dict[str, Call] = {}
    for call in trace.calls:
        inside = f"{call.name}."
        holds = any(name.startswith(inside) for name in body) and not any(name.startswith(inside) for name in ends)
        if holds and call.reads_image and call.input_shape == call.output_shape:
            first.setdefault(call.name, call)
    return list(first.values())


def _chained(group: list[Call]) -> list[Call]:
    """Those of a group that do not run beside another one on the same input."""
    sources = [call.source for call in group]
    return [call for call in group if call.source is None or sources.count(call.source) == 1]


def _outermost(names: Collection[str]) -> tuple[str, ...]:
    return tuple(name for name in names if not any(name.startswith(f"{other}.") for other in names))
