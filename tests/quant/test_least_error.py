"""The range of least mean logarithm of the images' errors."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.quant.least_error import IMAGES, LeastErrorObserver
from qsr_plugin.quant.observers import minmax
from qsr_plugin.quant.ops import fake_quantize
from qsr_plugin.quant.record import record_root


def observed(*batches: Tensor, bits: int = 4) -> tuple[float, float]:
    observer = LeastErrorObserver(bits)
    for batch in batches:
        observer.update(batch)
    low, high = observer.range()
    return float(low), float(high)


def mean_log_error(images: Tensor, low: float, high: float, bits: int = 4) -> float:
    """What the observer minimises, from the values themselves."""
    low, high, steps = torch.tensor(low), torch.tensor(high), 2.0**bits - 1
    x = fake_quantize(images, high - low, steps, (0.0, steps), bounds=(low, high), anchor=low)
    return float((x - images).double().square().flatten(1).mean(1).log().mean())


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("bits", [2, 4, 8])
def test_no_other_range_is_much_better(bits: int) -> None:
    x = normal(4, 6, 40, 40).exp()  # skewed
    low, high = observed(x, bits=bits)
    found, widest = mean_log_error(x, low, high, bits), minmax(x)
    for a in torch.linspace(0, 1, 21):
        for b in torch.linspace(0, 1, 41)[1:]:
            middle = float(x.mean())
            other = middle - a * (middle - float(widest[0])), middle + b * (float(widest[1]) - middle)
            assert found <= mean_log_error(x, *map(float, other), bits) + 0.02


def test_an_image_that_explodes_does_not_rule() -> None:
    x = normal(8, 4, 32, 32)
    calm = observed(x)
    wild = observed(torch.cat([x, 1000 * normal(1, 4, 32, 32, seed=1)]))
    assert calm[0] * 1.6 < wild[0] < 0 < wild[1] < calm[1] * 1.6
    assert observed(x, *[x * 1000] * 3)[1] > 10 * calm[1], "but more wild images than calm ones do"


def test_values_that_never_reach_below_zero_keep_zero_as_their_end() -> None:
    low, high = observed(normal(3, 4, 32, 32).relu())
    assert low == 0 and 1 < high < 4.5


def test_zero_is_an_end_where_values_lie_densely_behind_a_relu() -> None:
    x = (0.1 - torch.rand(2, 16, 128, 128, generator=torch.Generator().manual_seed(0)).log()).clamp(max=2.5) - 0.3
    low, high = observed(x.relu(), bits=2)
    assert low == 0 and 1 < high < 2.2


@pytest.mark.parametrize("slope", [0.05, 0.3])
def test_an_image_without_features_has_no_say(slope: float) -> None:
    """It is quantized without error where zero is a level, and by how little it is wrong would weigh more than all."""
    x = nn.functional.leaky_relu(3 * normal(20, 8, 24, 24) + 1, slope)
    assert observed(x, torch.zeros(1, 8, 24, 24)) == observed(x)


def test_eight_bits_keep_nearly_the_whole_range() -> None:
    x = torch.rand(2, 3, 64, 64, generator=torch.Generator().manual_seed(0))
    low, high = observed(x, bits=8)
    assert low == pytest.approx(0, abs=0.01) and high == pytest.approx(1, abs=0.01)


def test_sixteen_bits_keep_all_of_it() -> None:
    """Of every image, however many there are, and without a histogram."""
    observer = LeastErrorObserver(16)
    images = normal(2 * IMAGES, 1, 4, 4)
    for batch in images.split(100):
        observer.update(batch)
    assert tuple(map(float, observer.range())) == (float(images.min()), float(images.max()))
    assert not observer._kept


def test_values_far_from_zero_lose_nothing() -> None:
    x = normal(3, 4, 32, 32)
    near, far = observed(x), observed(x + 4096)
    assert far[0] - 4096 == pytest.approx(near[0], abs=5e-3) and far[1] - 4096 == pytest.approx(near[1], abs=5e-3)


def test_sizes_batches_and_windows_do_not_matter() -> None:
    x = normal(4, 8, 16, 16)
    one_by_one = observed(*x.split(1))
    assert observed(x) == one_by_one

    class Windowed(nn.Module):
        def forward(self, image: Tensor) -> Tensor:
            observer.update(image.unflatten(2, (2, 8)).movedim(2, 1).flatten(0, 1))  # two windows of each image
            return image

    observer = LeastErrorObserver(4)
    record_root(Windowed())(x)
    assert tuple(map(float, observer.range())) == one_by_one


def test_thousands_of_images_need_no_more_memory() -> None:
    observer = LeastErrorObserver(4)
    for seed in range(3):
        observer.update(normal(300, 1, 4, 4, seed=seed))
    assert IMAGES / 2 <= len(observer._kept) <= IMAGES
    low, high = observer.range()
    assert low < -1 and high > 1


@pytest.mark.parametrize("value", [0.0, 3.5])
def test_constant_tensors_have_a_range(value: float) -> None:
    low, high = observed(torch.full((2, 3, 4, 4), value))
    assert low == high == value


@pytest.mark.parametrize("bits", [4, 16])
def test_what_cannot_be_observed_is_refused(bits: int) -> None:
    observer = LeastErrorObserver(bits)
    with pytest.raises(RuntimeError, match="nothing was observed"):
        observer.range()
    with pytest.raises(ValueError, match="non-finite"):
        observer.update(torch.tensor([[1.0, float("nan")]]))
    with pytest.raises(ValueError, match="empty"):
        observer.update(torch.zeros(1, 0))
