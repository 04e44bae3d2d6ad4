"""Networks that take only some sizes, made to take all."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from qsr_plugin.archs.padding import PaddedInput, pad_input, pad_to, without_padding
from torch import Tensor, nn

from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import quantize_model


@pytest.fixture(autouse=True)
def seed() -> None:
    torch.manual_seed(0)


class Windows(nn.Module):
    """Doubles images whose sides are multiples of 8 and at least 16, and remembers what it saw."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Conv2d(3, 3, 3, padding=1)
        self.seen: Tensor | None = None

    def forward(self, x: Tensor) -> Tensor:
        assert x.shape[-1] % 8 == x.shape[-2] % 8 == 0 and min(x.shape[-2:]) >= 16
        self.seen = x
        return nn.functional.interpolate(self.layer(x), scale_factor=2)


@pytest.mark.parametrize("height", [1, 2, 7, 16, 17, 24])
@pytest.mark.parametrize("width", [3, 16, 30])
def test_any_size_goes_in_and_comes_out_enlarged(height: int, width: int) -> None:
    net = pad_input(Windows(), 2, multiple=8, minimum=16)
    image = torch.rand(2, 3, height, width)
    assert net(image).shape == (2, 3, 2 * height, 2 * width)
    assert torch.equal(net.seen[..., :height, :width], image)


def test_padding_mirrors_and_then_repeats_the_last_pixel() -> None:
    row = torch.tensor([1.0, 2.0, 3.0]).view(1, 1, 1, 3)
    assert pad_to(row, 1, 5).flatten().tolist() == [1, 2, 3, 2, 1]
    assert pad_to(row, 1, 7).flatten().tolist() == [1, 2, 3, 2, 1, 1, 1]
    assert pad_to(row.transpose(2, 3), 4, 2).tolist() == [[[[1, 1], [2, 2], [3, 3], [2, 2]]]]
    assert pad_to(row, 1, 3) is row


def test_sizes_that_fit_are_passed_on_unchanged() -> None:
    net = pad_input(Windows(), 2, multiple=8, minimum=16)
    image = torch.rand(1, 3, 16, 24)
    want = net(image)
    assert net.seen is image
    plain = Windows()
    plain.load_state_dict(net.state_dict())  # the keys are the same
    assert torch.equal(want, plain(image))


def test_square_inputs() -> None:
    net = pad_input(Windows(), 2, multiple=8, minimum=16, square=True)
    assert net(torch.rand(1, 3, 17, 40)).shape == (1, 3, 34, 80)
    assert net.seen.shape == (1, 3, 40, 40)


def test_the_class_is_still_a_subclass_and_copies_pad_as_well() -> None:
    net = deepcopy(pad_input(Windows(), 2, multiple=8, minimum=16))
    assert isinstance(net, Windows) and isinstance(net, PaddedInput)
    assert type(net).__name__ == "Windows", "by which role tables and files know it"
    assert net(torch.rand(1, 3, 5, 5)).shape == (1, 3, 10, 10)


def test_quantized_networks_pad_inside_the_record() -> None:
    net = pad_input(Windows(), 2, multiple=8, minimum=16)
    recipe = load_recipe("minmax", placement="mine", placements={"mine": [{"match": "layer", "port": "input"}]})
    image = torch.rand(2, 3, 9, 10)
    out = calibrate(quantize_model(net, recipe), [image])(image)
    assert out.shape == (2, 3, 18, 20)
    assert net.last_record().pixels == 2 * 9 * 10


@pytest.mark.parametrize("wrong", [{"scale": 0}, {"scale": 2, "multiple": 0}, {"scale": 2, "minimum": 1.5}])
def test_numbers_that_make_no_sense_are_refused(wrong: dict) -> None:
    with pytest.raises(ValueError, match="allowed are whole numbers from 1"):
        pad_input(Windows(), **wrong)


def test_padding_goes_from_a_class_made_of_one_that_pads() -> None:
    class Whole(Windows):
        """With the numbers of its padding."""

        pad_scale, pad_multiple, pad_minimum, pad_square = 2, 8, 16, False

    class Padded(PaddedInput, Whole):
        """Pads by itself."""

    class Own(Padded):
        """A user's."""

    net = Own()
    assert net(torch.rand(1, 3, 5, 9)).shape == (1, 3, 10, 18)
    assert type(without_padding(net)) is Whole and net.pad_multiple == 8
