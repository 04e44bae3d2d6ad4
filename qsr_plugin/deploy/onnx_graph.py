"""Rewrites of ONNX graphs."""

from __future__ import annotations

from collections import defaultdict
from typing import Any

#: ``onnx.TensorProto``: UINT8 and INT8, the types of a zero point.
_BYTES = (2, 3)


def quantize_before_shuffle(model: Any) -> int:
    """Move ``Clip -> QuantizeLinear`` from behind a pixel shuffle to before it, in place.

    Rounding to one grid commutes with a permutation, and the shuffle then moves bytes instead of floats. Wider grids
    stay behind it: ONNX Runtime has no shuffle of 16-bit integers.

    Args:
        model: ``onnx.ModelProto`` whose grids have one scale per tensor.

    Returns:
        How many were moved.
    """
    graph, readers = model.graph, defaultdict(list)
    for index, node in enumerate(graph.node):
        for name in node.input:
            readers[name].append((index, node))
    outputs, rows = {output.name for output in graph.output}, []
    bytes_wide = {tensor.name for tensor in graph.initializer if tensor.data_type in _BYTES}
    for index, node in enumerate(graph.node):
        row = [(index, node)]
        for kind in ("Clip", "QuantizeLinear"):
            following = readers[row[-1][1].output[0]]
            if len(following) != 1 or following[0][1].op_type != kind or row[-1][1].output[0] in outputs:
                break
            row.append(following[0])
        if node.op_type == "DepthToSpace" and len(row) == 3 and row[-1][1].input[2] in bytes_wide:
            rows.append(row)
    order = list(range(len(graph.node)))
    for (shuffle, _), _, (quantize, _) in rows:
        order.remove(shuffle)
        order.insert(order.index(quantize) + 1, shuffle)
    for row in rows:
        _rotate(*(node for _, node in row))
    nodes = [graph.node[index] for index in order]
    kept = [type(node).FromString(node.SerializeToString()) for node in nodes]
    del graph.node[:]
    graph.node.extend(kept)
    if rows:
        del graph.value_info[:]  # names have other types now
    return len(rows)


def _rotate(shuffle: Any, clip: Any, quantize: Any) -> None:
    """shuffle, clip, quantize -> clip, quantize, shuffle; the names at both ends stay."""
    first, shuffled, clipped, last = shuffle.input[0], shuffle.output[0], clip.output[0], quantize.output[0]
    clip.input[0], clip.output[0] = first, shuffled
    quantize.input[0], quantize.output[0] = shuffled, clipped
    shuffle.input[0], shuffle.output[0] = clipped, last


def without_traces(model: Any) -> None:
    """Take out what the exporter notes of the code it followed, in place: paths, classes, and most of a small file."""
    graph = model.graph
    for part in (graph, *graph.node, *graph.input, *graph.output, *graph.value_info, *graph.initializer):
        del part.metadata_props[:]
        part.ClearField("doc_string")
