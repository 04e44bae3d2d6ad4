"""Bits of the patches of an image: batched or alone, in patches or whole."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsr_plugin.data.patches import PatchOptions, patches_of
from qsr_plugin.options_file import OptionsError
from qsr_plugin.report.patch_bits import run_and_observe
from tests.quant.choosers import Net, bright_to_dark, quantized, trained


@pytest.fixture
def picture() -> torch.Tensor:
    """(1, 3, 21, 37), dark and flat on the left, bright and rough on the right."""
    ramp = torch.linspace(0.1, 0.9, 37)
    noise = torch.rand(1, 3, 21, 37, generator=torch.Generator().manual_seed(5)) - 0.5
    return (ramp + 0.3 * ramp * noise).clamp(0, 1)


@pytest.fixture(params=["toy_brightness", "toy_gate", "toy_selector"])
def net(request: pytest.FixtureRequest, choosers: None, images: list[torch.Tensor]) -> nn.Module:
    """A network that uses several widths on the picture."""
    return trained(quantized(request.param, images), bright_to_dark(6)).eval()


@pytest.mark.parametrize("last", ["enlarge", "shift"])
def test_batches_of_patches_change_nothing(net: nn.Module, picture: torch.Tensor, last: str) -> None:
    alone, one_by_one = run_and_observe(net, picture, 1, size=8, overlap=3, last=last)
    together, batched = run_and_observe(net, picture, 1, size=8, overlap=3, last=last, batch=16)
    assert one_by_one == batched
    assert len({tuple(part.bits.values()) for part in batched}) > 1, "patches get different bits"
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)
    for part in one_by_one[:: len(one_by_one) - 1]:
        with torch.no_grad():
            own = net(part.patch.of(picture))
        assert part.bits == {place: float(bits) for place, bits in net.last_record().bits.items()}
        rows, columns = part.top - part.patch.y.start, part.left - part.patch.x.start
        kept = own[..., rows : rows + part.height, columns : columns + part.width]
        whole = alone[..., part.top : part.top + part.height, part.left : part.left + part.width]
        torch.testing.assert_close(kept, whole, atol=1e-6, rtol=0)


def test_parts_tile_the_image_in_rows(net: nn.Module, picture: torch.Tensor) -> None:
    _, parts = run_and_observe(net, picture, 1, size=8, overlap=3, batch=4)
    covered = torch.zeros(21, 37)
    for part in parts:
        covered[part.top : part.top + part.height, part.left : part.left + part.width] += 1
    assert bool((covered == 1).all())
    assert [part.patch for part in parts] == patches_of(21, 37, PatchOptions(size=8, overlap=3, last="enlarge"))


def test_whole_images_are_one_part_each_and_nothing_stays_changed(net: nn.Module, picture: torch.Tensor) -> None:
    net.train()
    out, parts = run_and_observe(net, picture.expand(2, -1, -1, -1), 1)
    assert not out.requires_grad and net.training
    assert [(part.top, part.left, part.height, part.width) for part in parts] == [(0, 0, 21, 37)] * 2
    assert parts[0] == parts[1] and set(parts[0].bits.values()) <= {4.0, 6.0, 8.0}


def test_a_float_network_has_no_bits(picture: torch.Tensor) -> None:
    for cut in ({}, {"size": 16, "overlap": 2}):
        _, parts = run_and_observe(Net(), picture, 1, **cut)
        assert all(part.bits == part.others == {} for part in parts)


def test_impossible_patches_are_refused(picture: torch.Tensor) -> None:
    with pytest.raises(OptionsError, match="the overlap must be 0 to 7 pixels"):
        run_and_observe(Net(), picture, 1, size=8, overlap=8)


def test_smaller_patches_are_another_protocol(picture: torch.Tensor) -> None:
    class Small(nn.Module):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            if x.shape[-1] > 20:
                raise torch.OutOfMemoryError("out of memory")
            return x

    with pytest.raises(torch.OutOfMemoryError):
        run_and_observe(Small(), picture, 1, size=32, last="shift")
    out, parts = run_and_observe(Small(), picture, 1, size=32, last="shift", may_shrink=True)
    assert torch.equal(out, picture) and max(part.width for part in parts) == 16
