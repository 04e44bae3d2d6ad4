"""Names of what ``qsr bench`` compares; cheap to import."""

from __future__ import annotations

#: What all others are compared with: the fair baseline, PyTorch itself is slower.
REFERENCE = "openvino-float"
TORCH, NNCF, ONNXRUNTIME = "torch", "nncf", "onnxruntime-int8"
CHANNELS_LAST, PASSES = "torch-channels-last", "openvino-float-passes"
INT8, INT8_TAIL, INT8_PLAIN = "openvino-int8", "openvino-int8-tail", "openvino-int8-no-passes"
#: Name to what it is, in the order of the table.
VARIANTS = {
    TORCH: "float network, PyTorch as it is, (N, C, H, W)",
    CHANNELS_LAST: "the same with channels last in memory",
    REFERENCE: "float network, exported as it is",
    PASSES: "float network, after the exact passes of qsr export",
    INT8_PLAIN: "quantized network, exported as it is: what is float in it stays as it was",
    INT8: "quantized network as qsr export writes it, with the exact passes",
    INT8_TAIL: "the same, and the convolution of a collapsed tail in 8 bits as well (qsr export --tail-images)",
    ONNXRUNTIME: "the file of openvino-int8 in ONNX Runtime, all its optimisations on",
    NNCF: "float network after the exact passes, quantized by NNCF to 8 bits everywhere, without training, in OpenVINO",
}
#: Those measured if nothing else is said.
DEFAULT = tuple(name for name in VARIANTS if name != ONNXRUNTIME)
#: Variants that come from the quantized network.
QUANTIZED = tuple(name for name in VARIANTS if "int8" in name)
