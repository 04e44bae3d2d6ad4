"""Patches: nothing lost, no seams, honest failures."""

from __future__ import annotations

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.nn import functional as F

from qsr_plugin import calibrate, compat
from qsr_plugin.data.patches import PatchOptions, patches_of, protocol, run_in_patches, run_with_notes
from qsr_plugin.data.spans import spans
from qsr_plugin.options_file import OptionsError


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


@given(st.integers(1, 200), st.integers(1, 64), st.data())
def test_the_last_patch_takes_in_what_is_left_over(length: int, size: int, data: st.DataObject) -> None:
    """Written down as published: starts while a whole patch fits, then margins of half the overlap, rounded down."""
    overlap = data.draw(st.integers(0, size - 1))
    cut, step, margin = spans(length, size, overlap, "enlarge"), size - overlap, overlap // 2
    assert [span.start for span in cut] == [s for s in range(0, length, step) if s <= max(length - size, 0)]
    assert all(span.stop - span.start == size for span in cut[:-1]) and cut[-1].stop == length
    assert cut[-1].stop - cut[-1].start <= size + step - 1
    for index, span in enumerate(cut):
        assert span.keep_from == (span.start + margin if index else 0)
        assert span.keep_to == (length if span is cut[-1] else span.start + step + margin)
    assert [i for span in cut for i in range(span.keep_from, span.keep_to)] == list(range(length))


def test_published_geometry() -> None:
    """50x70 pixels, patches of 24, step 20, scale 2: owners change at output row 44 and columns 44 and 84."""
    patches = patches_of(50, 70, PatchOptions(size=24, overlap=4, last="enlarge"))
    assert [(patch.y.start, patch.x.start) for patch in patches] == [(y, x) for y in (0, 20) for x in (0, 20, 40)]
    assert [patch.shape for patch in patches] == [(h, w) for h in (24, 30) for w in (24, 24, 30)]
    owner = torch.zeros(1, 1, 50, 70)
    calls = []

    def number(x: torch.Tensor) -> torch.Tensor:
        calls.append(tuple(x.shape))
        return torch.full((x.shape[0], 1, 2 * x.shape[2], 2 * x.shape[3]), float(len(calls)))

    owner = run_in_patches(number, owner, 2, 24, 4, 1, "enlarge")[0, 0]
    assert (torch.nonzero(owner[1:, 0] != owner[:-1, 0]).flatten() + 1).tolist() == [44]
    assert (torch.nonzero(owner[0, 1:] != owner[0, :-1]).flatten() + 1).tolist() == [44, 84]
    calls.clear()
    run_in_patches(number, torch.zeros(1, 1, 50, 70), 2, 24, 4, 16, "enlarge")
    assert sorted(calls) == [(1, 1, 24, 30), (1, 1, 30, 30), (2, 1, 24, 24), (2, 1, 30, 24)], "equal sizes run together"


def test_a_side_shorter_than_two_steps_is_one_patch() -> None:
    """Patches of 96 without overlap get as long as 191 pixels."""
    assert [len(spans(length, 96, 0, "enlarge")) for length in (1, 95, 96, 191, 192)] == [1, 1, 1, 1, 2]
    assert [span.start for span in spans(320, 96, 6, "enlarge")] == [0, 90, 180]


@pytest.mark.parametrize("last", ["shift", "enlarge"])
@pytest.mark.parametrize(("size", "overlap"), [(24, 8), (24, 7), (24, 0), (24, 23), (200, 6)])
@pytest.mark.parametrize(("height", "width"), [(17, 23), (1, 1), (1, 100), (64, 64), (33, 90)])
@pytest.mark.parametrize("batch", [1, 3])
def test_identity_reproduces_the_image(height: int, width: int, batch: int, size: int, overlap: int, last: str) -> None:
    if size == 24 and overlap == 23:
        height, width = min(height, 30), min(width, 34)  # or there are thousands of patches
    image = torch.rand(1, 3, height, width)
    assert torch.equal(run_in_patches(lambda x: x, image, 1, size, overlap, batch, last), image)
    enlarged = run_in_patches(lambda x: F.interpolate(x, scale_factor=4), image, 4, size, overlap, batch, last)
    assert torch.equal(enlarged, F.interpolate(image, scale_factor=4))


@pytest.mark.parametrize("batch", [1, 2, 100])
def test_notes_come_back_with_the_patch_they_are_of(batch: int) -> None:
    image = torch.arange(50 * 70.0).reshape(1, 1, 50, 70)
    options = PatchOptions(size=24, overlap=4, last="enlarge", batch=batch)
    out, notes = run_with_notes(lambda x: (x, [part[0, 0, 0].item() for part in x]), image, 1, options)
    assert torch.equal(out, image)
    assert [patch for patch, _ in notes] == patches_of(50, 70, options)
    assert all(note == image[0, 0, patch.y.start, patch.x.start] for patch, note in notes)


def test_only_one_image_is_cut() -> None:
    with pytest.raises(ValueError, match="a batch of 2 images"):
        run_in_patches(lambda x: x, torch.rand(2, 3, 8, 8), 1, 8, 0)


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
@pytest.mark.parametrize("last", ["shift", "enlarge"])
def test_stride_beyond_the_patch_is_refused(size: int, overlap: int, last: str) -> None:
    with pytest.raises(ValueError, match="the overlap must be"):
        spans(100, size, overlap, last)


@pytest.mark.parametrize(
    ("data", "says"),
    [
        (
            {"size": 96, "overlp": 6},
            r"val\.patches\.overlp: unknown key\. Did you mean 'overlap'\? Allowed: batch, last",
        ),
        ({"overlap": 6}, r"val\.patches\.size: required, but not given"),
        ({"size": 8, "overlap": 8}, r"val\.patches: patch size 8 with overlap 8: the overlap must be 0 to 7 pixels"),
        ({"size": 8, "last": "grow"}, r"val\.patches\.last: .*'shift' or 'enlarge' \(got 'grow'\)"),
        ({"size": 8, "batch": 0}, r"val\.patches\.batch: .*greater than or equal to 1"),
        (96, r"val\.patches is 96; expected a mapping"),
    ],
)
def test_options_that_say_nonsense_are_refused(data: object, says: str) -> None:
    with pytest.raises(OptionsError, match=says):
        PatchOptions.read(data)


def test_the_protocol_is_named_without_what_changes_no_result() -> None:
    options = PatchOptions.read({"size": 96, "overlap": 6, "batch": 16})
    assert protocol(options) == "patches of 96x96, overlap 6, last moved back"
    assert protocol(None) == "whole images" and PatchOptions.read(None) is None
    assert options.to_dict() == {"size": 96, "overlap": 6, "last": "shift"}


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
    options = PatchOptions(size=16, overlap=4, batch=4)
    assert torch.equal(run_with_notes(lambda x: (small_only(x), x), image, 1, options, smallest=16)[0], image)
    with pytest.raises(torch.OutOfMemoryError):
        run_with_notes(lambda x: (small_only(x), x), image, 1, options.model_copy(update={"size": 32}), smallest=32)


def test_out_of_memory_to_the_end_is_an_error() -> None:
    def never(x: torch.Tensor) -> torch.Tensor:
        raise torch.OutOfMemoryError("out of memory")

    with pytest.raises(torch.OutOfMemoryError):
        run_in_patches(never, torch.rand(1, 3, 70, 70), 1, 64, 4)
