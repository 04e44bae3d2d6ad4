"""Storage against bytes that are really packed."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import complexity, list_backbones, load_recipe, quantize_model
from qsr_plugin.quant.surgery import persistent_state, plugin_keys, quantizers, sites
from qsr_plugin.report.storage import storage_bits


def pack(weight: Tensor, bits: int) -> bytes:
    """Codes of a symmetric grid, offset to be unsigned, ``bits`` bits each without gaps."""
    largest = 2 ** (bits - 1) - 1
    codes = (weight.detach() / weight.detach().abs().max() * largest).round().to(torch.int64).numpy().ravel() + largest
    assert 0 <= codes.min() <= codes.max() < 2**bits
    return np.packbits((codes[:, None] >> np.arange(bits)) & 1 == 1).tobytes()


@pytest.mark.parametrize("backbone", list_backbones())
@pytest.mark.parametrize(("method", "bits"), [("pams", 4), ("pams", 3), ("minmax", 5), ("percentile", 8)])
def test_equals_the_packed_bytes_and_the_listed_extras(tiny, backbone: str, method: str, bits: int) -> None:
    net = tiny(backbone, method, weight_bits=bits, act_bits=bits)
    packed = {f"{name}.weight" for name, site in sites(net) if site.quantizer("weight") is not None}
    blob = b""
    for key, tensor in persistent_state(net).items():
        if key in packed:
            blob += pack(tensor, bits)
        elif key not in plugin_keys(net) and not key.endswith("num_batches_tracked"):
            blob += tensor.float().numpy().tobytes()
    ranges = sum(quantizer.extra_storage_bits() for _, quantizer in quantizers(net))
    assert packed
    assert storage_bits(net) == 8 * len(blob) + ranges == complexity(net, (4, 4)).storage_bits


@pytest.mark.parametrize("backbone", list_backbones())
def test_float_size_is_that_of_the_float_network(tiny, backbone: str) -> None:
    float_state = persistent_state(tiny(backbone))
    numbers = sum(t.numel() for key, t in float_state.items() if not key.endswith("num_batches_tracked"))
    assert storage_bits(tiny(backbone)) == storage_bits(tiny(backbone, "pams"), as_float=True) == 32 * numbers


def test_ranges_are_32_bits_each(tiny) -> None:
    """PAMS, per block: three max scales and two weight steps."""
    net = tiny("EDSR", "pams", weight_bits=4, act_bits=4)
    weights = sum(site.weight.numel() for _, site in sites(net) if site.quantizer("weight") is not None)
    assert storage_bits(net) == storage_bits(net, as_float=True) - 28 * weights + 2 * 5 * 32


def test_each_tensor_is_rounded_up_to_whole_bytes() -> None:
    net = nn.Sequential(nn.Conv2d(1, 5, 1, bias=False), nn.Conv2d(5, 1, 1, bias=False))
    rule = {"match": "?", "port": "weight"}
    quantizers = {"act": "asymmetric", "weight": "symmetric"}
    recipe = {"method": "hand", "placement": "all", "placements": {"all": [rule]}, "quantizers": quantizers}
    quantize_model(net, load_recipe({**recipe, "bits": {"weight": 3}}))
    assert storage_bits(net) == 2 * (16 + 32)


def test_counters_tables_and_temporary_buffers_are_left_out() -> None:
    net = nn.BatchNorm2d(4)
    net.register_buffer("table", torch.zeros(100, dtype=torch.int64))
    net.register_buffer("scratch", torch.zeros(100), persistent=False)
    assert storage_bits(net) == 32 * 16


def test_a_tensor_shared_by_two_layers_is_stored_once() -> None:
    net = nn.Sequential(nn.Linear(4, 4, bias=False), nn.Linear(4, 4, bias=False))
    net[1].weight = net[0].weight
    assert storage_bits(net) == 32 * 16
