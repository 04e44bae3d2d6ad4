"""Names of what ``qsr bench`` compares; cheap to import."""

from __future__ import annotations

#: What all others are compared with: the fair baseline, PyTorch itself is slower.
REFERENCE = "openvino-float"
TORCH, NNCF, ONNXRUNTIME = "torch", "nncf", "onnxruntime-int8"
CHANNELS_LAST = "torch-channels-last"
#: Name to what it is, in the order of the table.
VARIANTS = {
    TORCH: "float network, PyTorch as it is, (N, C, H, W)",
    CHANNELS_LAST: "the same with channels last in memory",
    REFERENCE: "float network, exported as it is",
    "openvino-float-passes": "float network, after the exact passes of qsr export",
    "openvino-int8-no-passes": "quantized network, exported as it is: what is float in it stays as it was",
    "openvino-int8": "quantized network as qsr export writes it, with the exact passes",
    ONNXRUNTIME: "the same file in ONNX Runtime, all its optimisations on",
    NNCF: "float network after the exact passes, quantized by NNCF to 8 bits everywhere, without training, in OpenVINO",
}
#: Those measured if nothing else is said.
DEFAULT = tuple(name for name in VARIANTS if name != ONNXRUNTIME)
#: Variants that come from the quantized network.
QUANTIZED = tuple(name for name in VARIANTS if "int8" in name)
