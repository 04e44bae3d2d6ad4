"""Rewrites of ONNX graphs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any


def quantize_before_shuffle(model: Any) -> int:
    """Move ``Clip -> QuantizeLinear`` from behind a pixel shuffle to before it, in place.

    Rounding to one grid commutes with a permutation, and the shuffle then moves bytes instead of floats.

    Args:
        model: ``onnx.ModelProto`` whose grids have one scale per tensor.

    Returns:
        How many were moved.
    """
    graph, readers = model.graph, defaultdict(list)
    for node in graph.node:
        for name in node.input:
            readers[name].append(node)
    outputs, moved = {output.name for output in graph.output}, 0
    for shuffle in [node for node in graph.node if node.op_type == "DepthToSpace"]:
        row = [shuffle]
        for kind in ("Clip", "QuantizeLinear"):
            following = readers[row[-1].output[0]]
            if len(following) != 1 or following[0].op_type != kind or row[-1].output[0] in outputs:
                break
            row.append(following[0])
        if len(row) == 3:
            _rotate(graph, *row)
            moved += 1
    if moved:
        del graph.value_info[:]  # names have other types now
    return moved


def _rotate(graph: Any, shuffle: Any, clip: Any, quantize: Any) -> None:
    """shuffle, clip, quantize -> clip, quantize, shuffle; the names at both ends stay."""
    first, shuffled, clipped, last = shuffle.input[0], shuffle.output[0], clip.output[0], quantize.output[0]
    clip.input[0], clip.output[0] = first, shuffled
    quantize.input[0], quantize.output[0] = shuffled, clipped
    shuffle.input[0], shuffle.output[0] = clipped, last
    nodes = list(graph.node)
    nodes.remove(shuffle)
    nodes.insert(nodes.index(quantize) + 1, shuffle)
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
