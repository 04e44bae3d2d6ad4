"""Calibration passes end behind the last place that watches, and ranges are those of complete passes."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.quant.calibrate import calibrate, calibrating, fit_ranges
from qsr_plugin.quant.record import float_mode
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.backbones import FITTING
from tests.recipes import custom_recipe, shipped


@pytest.fixture
def crops() -> list[Tensor]:
    """Two sizes in turn: one that a batch of several begins with, and one that a batch of two does."""
    generator = torch.Generator().manual_seed(5)
    sizes = [(4, 8, 8), (2, 8, 12), (1, 8, 8), (5, 8, 12), (4, 8, 8)]
    return [torch.rand(count, 3, *size, generator=generator) for count, *size in sizes]


@pytest.mark.parametrize(
    ("method", "backbone"), [case for case in FITTING if case[0] in ("auto", "adabm") or case[1] == "EDSR"]
)
def test_ranges_are_those_of_complete_passes(tiny_net, crops, method: str, backbone: str) -> None:
    short, whole = (quantize_model(tiny_net(backbone), shipped(method, tiny_net(backbone))) for _ in range(2))
    calibrate(short, crops)
    with calibrating(whole):
        for batch in crops:
            whole(batch)
    if fit := whole.recipe.calibration.fit:
        fit_ranges(whole, torch.cat([batch for batch in crops if batch.shape[1:] == crops[0].shape[1:]])[:fit])
    found, want = short.state_dict(), whole.state_dict()
    assert found.keys() == want.keys()
    assert all(torch.equal(found[key], value) for key, value in want.items())


def passes(module: nn.Module) -> list[int]:
    """How many images a module is given, by call."""
    seen: list[int] = []
    module.register_forward_pre_hook(lambda _, args: seen.append(len(args[0])))
    return seen


def test_what_comes_after_the_last_place_runs_for_one_image_of_a_size(tiny_net, crops) -> None:
    net = quantize_model(tiny_net(), "minmax")  # of the blocks alone
    last, first, behind = passes(net.body[1].conv2), passes(net.conv_first), passes(net.conv_last)
    calibrate(net, crops)
    assert behind == [1, 2], "the first of the four, and the two of the other size"
    assert first == last == [1, 4, 2, 1, 5, 4]


def test_a_complete_pass_follows(tiny_net, crops) -> None:
    """Nothing is left over of the calibration, nor of one that fails."""
    net = quantize_model(tiny_net(), "minmax")
    calibrate(net, crops)
    with pytest.raises(ValueError, match="expected a float tensor"):
        calibrate(net, [*crops, torch.rand(3, 8, 8)])
    with torch.no_grad(), float_mode():
        assert torch.equal(net(crops[0]), tiny_net()(crops[0]))
    assert net.last_record().images == 4


class Branching(nn.Module):
    """Bright images take another way; ``swallow`` catches all errors of a layer."""

    def __init__(self, swallow: bool = False) -> None:
        super().__init__()
        self.a, self.b, self.c, self.tail = (nn.Conv2d(3, 3, 1) for _ in range(4))
        self.swallow = swallow

    def forward(self, x: Tensor) -> Tensor:
        x = self.c(self.b(x)) if x.mean() > 1 else self._through(self.a, x)
        return self.tail(x)

    def _through(self, layer: Callable[[Tensor], Tensor], x: Tensor) -> Tensor:
        try:
            return layer(x)
        except Exception:
            if self.swallow:
                return x
            raise


def test_a_pass_that_goes_another_way_runs_to_its_end() -> None:
    recipe = custom_recipe(*({"match": name, "port": "input"} for name in "abc"))
    net = quantize_model(Branching(), recipe)
    behind, dark, bright = passes(net.tail), torch.full((1, 3, 4, 4), 0.25), torch.full((1, 3, 4, 4), 1.5)
    calibrate(net, [dark, 2 * dark, bright, 2 * dark])
    assert behind == [1, 1], "the first one and the bright one"
    upper = {place: quantizer.upper.item() for place, quantizer in quantizers(net)}
    assert upper["a.input"] < 0.6 and upper["b.input"] == pytest.approx(1.5, abs=1e-4)


def test_a_network_that_catches_errors_is_left_all_the_same() -> None:
    net = quantize_model(Branching(swallow=True), custom_recipe({"match": "a", "port": "input"}))
    behind = passes(net.tail)
    calibrate(net, [torch.rand(1, 3, 4, 4)] * 3)
    assert behind == [1]
