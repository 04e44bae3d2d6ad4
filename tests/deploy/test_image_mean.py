"""The mean colour moves into the two ends, exactly, borders included."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import nn

from qsr_plugin.deploy.affine import fold_affine
from qsr_plugin.deploy.image_mean import Centred, fold_mean
from qsr_plugin.deploy.tail import collapse_tail


@pytest.mark.parametrize("options", [("EDSR", {}), ("SwinIR", {"img_range": 255.0}), ("HAT", {"img_range": 1.0})])
def test_the_image_is_the_same(tiny_net, options: tuple[str, dict]) -> None:
    net = tiny_net(options[0], **options[1])
    changed = deepcopy(net)
    assert all(report.applied for report in fold_affine(changed))
    (report,) = fold_mean(changed)
    assert report.applied and report.max_difference < 1e-5 and "mean is a part of conv_first and" in str(report)
    assert not changed.mean.any() and any(isinstance(part, Centred) for part in changed.modules())
    collapse_tail(changed)
    for size in ((8, 8), (5, 13), (1, 2)):
        image = torch.rand(2, 3, *size, generator=torch.Generator().manual_seed(0))
        with torch.no_grad():
            assert (net(image) - changed(image)).abs().max() < 1e-4, size


def test_what_is_left_alone(tiny_net) -> None:
    assert fold_mean(tiny_net("MSRResNet")) == [], "no mean"
    net = tiny_net("EDSR")
    assert fold_mean(net) == [], "the range is there"
    fold_affine(net)
    net.mean = torch.zeros(1, 3, 1, 1)
    assert fold_mean(net) == [], "a mean of zero"


def test_a_network_that_uses_its_mean_otherwise_is_left_as_it_was() -> None:
    class Twice(nn.Module):
        """Puts twice the mean back."""

        def __init__(self) -> None:
            super().__init__()
            self.mean = torch.full((1, 3, 1, 1), 0.4)
            self.first, self.last = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.last(torch.relu(self.first(x - self.mean))) + 2 * self.mean

    torch.manual_seed(0)
    net, image = Twice().eval(), torch.rand(1, 3, 6, 6)
    wanted = net(image)
    (report,) = fold_mean(net)
    assert not report.applied and "a difference of 4.0e-01" in str(report) and torch.equal(net(image), wanted)
