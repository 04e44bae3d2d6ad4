"""The convolution of a collapsed tail in 8 bits: what it computes, and when it stays float."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.deploy.collapsed import CollapsedTail
from qsr_plugin.deploy.comparison import synthetic_images
from qsr_plugin.deploy.lowering import LoweredConv2d, lower
from qsr_plugin.deploy.tail import collapse_tail
from qsr_plugin.deploy.tail_bits import quantize_tail
from qsr_plugin.errors import UserError
from tests.deploy.tails import SIZES, Tail, lively

BATCHES = synthetic_images(4, (16, 20)).split(1)


def network(**changes: bool) -> nn.Module:
    """A convolution with a ReLU, and a linear tail."""
    torch.manual_seed(0)
    tail = (nn.Conv2d(12, 48, 3, padding=1), nn.PixelShuffle(2), nn.Conv2d(12, 3, 3, padding=1))
    made = lively(Tail(*tail))
    with torch.no_grad():
        made.tail[2].weight *= 0.2
    assert collapse_tail(made, **changes).applied
    return made


@pytest.fixture
def net() -> nn.Module:
    """With a collapsed tail, borders included."""
    return network()


def tail_of(net: nn.Module) -> CollapsedTail:
    return next(module for module in net.modules() if isinstance(module, CollapsedTail))


@torch.no_grad()
def test_it_is_the_convolution_of_rounded_numbers(net: nn.Module) -> None:
    """Input in steps of range / 255 around zero, kernel in steps of its largest value / 127, each output its own."""
    tail, kernel = tail_of(net), tail_of(net).conv.weight.clone()
    inputs = [net.head(batch) for batch in BATCHES]
    report = quantize_tail(net, BATCHES)
    assert report.applied and str(report).startswith("tail: its convolution in 8 bits") and "2 image(s)" in str(report)
    made = tail_of(net).conv
    assert isinstance(made, LoweredConv2d) and made.codes.codes.dtype == torch.int8
    largest = max(float(inputs[0].max()), float(inputs[2].max()))  # of every second batch; the ReLU makes the least 0
    assert float(made.input_grid.scale) == pytest.approx(largest / 255) and int(made.input_grid.zero) == 0
    own = kernel.abs().amax((1, 2, 3), keepdim=True) / 127
    assert (made.codes() - kernel).abs().le(own * 0.501).all()
    step = made.input_grid.scale
    x = torch.round(inputs[1] / step).clamp(0, 255) * step
    wanted = nn.functional.conv2d(x, torch.round(kernel / own) * own, made.bias, padding=tail.conv.padding)
    torch.testing.assert_close(made(inputs[1]), wanted, rtol=1e-5, atol=1e-5)


@torch.no_grad()
def test_the_border_is_mended_as_before(net: nn.Module) -> None:
    """At all sizes, down to those that the original modules make."""
    before = lower(net)
    assert quantize_tail(net, BATCHES).applied
    for size in SIZES:
        image = synthetic_images(1, size)
        assert (net(image) - before(image)).abs().max() < 0.05, size


@torch.no_grad()
@pytest.mark.parametrize("least", [200.0, 1e9])
def test_too_much_change_leaves_it_float(net: nn.Module, least: float) -> None:
    conv, wanted = tail_of(net).conv, net(BATCHES[0])
    report = quantize_tail(net, BATCHES, least=least)
    assert not report.applied and f"allowed {least:g}" in str(report) and "stays float" in str(report)
    assert tail_of(net).conv is conv and torch.equal(net(BATCHES[0]), wanted)


def test_the_change_is_measured_on_images_that_the_range_is_not_from(net: nn.Module) -> None:
    """Fifty times darker images give a range that the others do not fit into."""
    dark_first = [batch * (1 if index % 2 else 0.02) for index, batch in enumerate(BATCHES)]
    assert not quantize_tail(net, dark_first).applied
    bright_first = [batch * (0.02 if index % 2 else 1) for index, batch in enumerate(BATCHES)]
    assert quantize_tail(net, bright_first).applied


def test_nothing_to_do(net: nn.Module) -> None:
    with pytest.raises(UserError, match=r"1 image\(s\) for the range of the tail: give two or more"):
        quantize_tail(net, BATCHES[:1])
    plain = nn.Sequential(nn.Conv2d(3, 12, 3, padding=1), nn.ReLU(), nn.PixelShuffle(2))
    with pytest.raises(UserError, match="has no collapsed tail that could compute in 8 bits: leave the images out"):
        quantize_tail(plain, BATCHES)


@torch.no_grad()
@pytest.mark.parametrize("signed", [False, True])
def test_features_below_zero(signed: bool) -> None:
    """Zero is a level of the input then as well, also of signed bytes; so borders are those of padding with it."""
    made = network(ring=False)
    made.head[1] = nn.Identity()
    inputs = [made.head(batch) for batch in BATCHES]
    conv = tail_of(made).conv
    assert quantize_tail(made, BATCHES, least=20, signed=signed).applied
    low, high = (float(find(torch.cat(inputs[::2]))) for find in (torch.min, torch.max))
    step = (high - low) / 255
    zero = round(-low / step)
    assert low < 0 and tail_of(made).conv.input_grid.has_zero
    x = (torch.round(inputs[1] / step) + zero).clamp(0, 255) * step - zero * step
    own = conv.weight.abs().amax((1, 2, 3), keepdim=True) / 127
    wanted = nn.functional.conv2d(x, torch.round(conv.weight / own) * own, conv.bias, padding=conv.padding)
    torch.testing.assert_close(tail_of(made).conv(inputs[1]), wanted, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(("bits", "signed"), [(4, False), (8, False), (8, True)])
def test_exported(quantized: Callable[..., nn.Module], tmp_path: Path, bits: int, signed: bool) -> None:
    """One more convolution of integers than without; engines give what PyTorch gives."""
    onnx = pytest.importorskip("onnx", reason="the extra [deploy] is not installed")
    for package in ("onnxscript", "onnxruntime", "openvino"):
        pytest.importorskip(package, reason="the extra [deploy] is not installed")
    from qsr_plugin import export_onnx
    from qsr_plugin.deploy.engine import open_engine

    net = quantized("auto", "EDSR", bits, fragile=None)
    path = tmp_path / "net.onnx"
    plain, with_tail = (
        export_onnx(net, path),
        export_onnx(net, tmp_path / "tail.onnx", tail_images=BATCHES, signed=signed),
    )
    assert with_tail.tail_in_bytes and not plain.tail_in_bytes and "its convolution in 8 bits" in str(with_tail)
    assert with_tail.agreement.quantizers == plain.agreement.quantizers + 1 and with_tail.agreement.holds
    initializers = onnx.load(with_tail.path).graph.initializer
    assert sum(tensor.data_type == onnx.TensorProto.INT8 for tensor in initializers) > sum(
        tensor.data_type == onnx.TensorProto.INT8 for tensor in onnx.load(path).graph.initializer
    )
    image: np.ndarray = synthetic_images(1, (13, 18)).numpy()
    results: list[Tensor] = [
        torch.from_numpy(open_engine(with_tail.path, kind)(image)) for kind in ("onnxruntime", "openvino")
    ]
    before = torch.from_numpy(open_engine(path)(image))
    for result in results:
        assert (result - results[0]).square().mean() < 1e-6
        assert 0 < (result - before).square().mean() < 10**-4.5
