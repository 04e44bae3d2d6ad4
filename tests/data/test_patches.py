"""Patches: nothing lost, no seams, honest failures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from qsr_plugin import calibrate, compat
from qsr_plugin.data.patches import run_in_patches, spans


@given(st.integers(1, 200), st.integers(1, 64), st.data())
def test_every_pixel_has_one_owner(length: int, size: int, data: st.DataObject) -> None:
    overlap = data.draw(st.integers(0, size - 1))
    cut = spans(length, size, overlap)
    assert [i for span in cut for i in range(span.keep_from, span.keep_to)] == list(range(length))
    for span in cut:
        assert 0 <= span.start <= span.keep_from < span.keep_to <= span.stop <= length
        assert span.stop - span.start == min(size, length)
    for a, b in zip(cut, cut[1:]):
        assert a.stop - b.start >= overlap
        assert a.stop - a.keep_to >= overlap // 2 and b.keep_from - b.start >= overlap // 2


@pytest.mark.parametrize(("height", "width"), [(17, 23), (1, 1), (1, 100), (64, 64), (33, 90)])
@pytest.mark.parametrize("batch", [1, 3])
def test_identity_reproduces_the_image(height: int, width: int, batch: int) -> None:
    image = torch.rand(1, 3, height, width)
    assert torch.equal(run_in_patches(lambda x: x, image, 1, 24, 8, batch), image)
    enlarged = run_in_patches(lambda x: F.interpolate(x, scale_factor=4), image, 4, 24, 8, batch)
    assert torch.equal(enlarged, F.interpolate(image, scale_factor=4))


def test_static_network_equals_the_whole_image_where_its_view_is_covered() -> None:
    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import QuantNet

    torch.manual_seed(0)
    backbone = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 8, "num_block": 1, "upscale": 2}
    image = torch.rand(1, 3, 92, 62)
    net = calibrate(QuantNet(backbone, "minmax"), [image]).eval()
    with torch.no_grad():
        whole = net(image)
        covered = run_in_patches(net, image, 2, 32, 16)  # 6 convolutions of 3x3 see 6 pixels; half the overlap is 8
        scanty = run_in_patches(net, image, 2, 32, 2)
    torch.testing.assert_close(covered, whole, atol=2e-5, rtol=0)
    assert (scanty - whole).abs().max() > (covered - whole).abs().max()


@pytest.mark.parametrize(("size", "overlap"), [(8, 8), (8, -1), (0, 0), (4, 9)])
def test_stride_beyond_the_patch_is_refused(size: int, overlap: int) -> None:
    with pytest.raises(ValueError, match="the overlap must be"):
        spans(100, size, overlap)


def test_wrong_scale_is_refused() -> None:
    with pytest.raises(ValueError, match="scale 4 asks for"):
        run_in_patches(lambda x: x, torch.rand(1, 3, 8, 8), 4, 8, 0)


def test_out_of_memory_halves_batch_then_patch_and_loses_nothing(caplog: pytest.LogCaptureFixture) -> None:
    image = torch.rand(1, 3, 70, 70)

    def small_only(x: torch.Tensor) -> torch.Tensor:
        if x.numel() > 3 * 16 * 16:
            raise torch.OutOfMemoryError("out of memory")
        return x

    assert torch.equal(run_in_patches(small_only, image, 1, 64, 4, batch=4), image)
    assert "patches of 16 pixels" in caplog.text


def test_out_of_memory_to_the_end_is_an_error() -> None:
    def never(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run_in_patches(never, torch.rand(1, 3, 70, 70), 1, 64, 4)
