"""The terms of AdaBM's bits, of images and of places, against figures computed with the published code (float32)."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin.methods import adabm
from qsr_plugin.methods.adabm import AdaBMOptions, AdaBMPolicy, ImageBits, complexity
from qsr_plugin.quant.observers import quantiles
from qsr_plugin.quant.record import ForwardRecord

WIDTHS = (2, 3, 4, 5, 6)


def close(got: Tensor, want: list | float, digits: int = 6) -> None:
    wanted = torch.tensor(want, dtype=torch.float32).flatten()
    assert torch.allclose(got.detach().float().flatten(), wanted, atol=1.01 * 10**-digits, rtol=1e-6), got


def image_bits(low: float = 20.0, high: float = 120.0, places: tuple[str, ...] = (), **options: float) -> ImageBits:
    part = ImageBits(AdaBMOptions(**options), WIDTHS, places, ())
    with torch.no_grad():
        part.lower.fill_(low)
        part.upper.fill_(high)
    return part


def image(a: int, b: int, c: int, d: int, p: int) -> Tensor:
    """The worked examples' image, (3, 12, 10) in 0..1."""
    y, x = torch.meshgrid(torch.arange(12), torch.arange(10), indexing="ij")
    return torch.stack([(a * y + b * x + 17 * c * k + d * (x * y % 7) * (k + 1)) % p for k in range(3)]) / 255


IMAGES = torch.stack([image(1, 1, 0, 0, 97), image(3, 5, 1, 2, 251), image(11, 7, 2, 3, 211), image(29, 31, 3, 5, 239)])
COMPLEXITIES = [3.56209, 19.80159, 39.96477, 73.41377]


def test_complexity_thresholds_and_terms_of_images() -> None:
    c = complexity(IMAGES)
    close(c, COMPLEXITIES, digits=4)
    part = image_bits()
    part.begin_calibration()
    part.observe(IMAGES)
    part.end_calibration()
    close(torch.stack([part.lower, part.upper]), [8.43394, 63.37906], digits=4)
    part = image_bits()
    record = ForwardRecord(4, image=IMAGES, policy=part)
    term = part.term(record)
    assert term.tolist() == [-1, -1, 0, 0]
    middle, half = 70.0, 50.0
    soft = [-0.868946, -0.763256, -0.537551, 0.068169]
    close(torch.tanh((c - middle) / half), soft)
    for index, z in enumerate(soft):
        got = torch.autograd.grad(part.term(record)[index], (part.lower, part.upper))
        k, d = 1 - z**2, 100.0
        turn = 2 * (COMPLEXITIES[index] - middle) / d**2
        close(torch.stack(got), [k * (-1 / d + turn), k * (-1 / d - turn)])


def test_thresholds_themselves_lie_between() -> None:
    c = torch.tensor([19.999, 20.0, 120.0, 120.001])
    assert image_bits().of_complexity(c).tolist() == [-1, 0, 0, 1]


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_thresholds_stay_apart_in_any_type(dtype: torch.dtype) -> None:
    part = image_bits().to(dtype)
    with torch.no_grad():
        part.lower.fill_(100.0), part.upper.fill_(50.0)
    part.project()
    assert part.upper > part.lower
    gradients = torch.autograd.grad(part.of_complexity(torch.tensor([90.0, 110.0])).sum(), (part.lower, part.upper))
    assert all(bool(torch.isfinite(gradient)) for gradient in gradients)


def test_image_thresholds_compare_images_that_come_one_by_one() -> None:
    together, apart = image_bits(), image_bits()
    for part, batches in ((together, [IMAGES]), (apart, IMAGES.split(1))):
        part.begin_calibration()
        for batch in batches:
            part.observe(batch)
        part.end_calibration()
    assert torch.equal(apart.lower, together.lower) and torch.equal(apart.upper, together.upper)


def test_image_thresholds_follow_the_batches_of_a_calibration(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(adabm, "COMPARED", 4)
    part = image_bits()
    part.begin_calibration()
    part.observe(IMAGES)
    part.observe(IMAGES[:1])
    part.end_calibration()
    want = [0.9 * 8.43394 + 0.1 * COMPLEXITIES[0], 0.9 * 63.37906 + 0.1 * COMPLEXITIES[0]]
    close(torch.stack([part.lower, part.upper]), want, digits=4)
    part.observe(IMAGES[3:])
    part.end_calibration(keep=False)
    close(torch.stack([part.lower, part.upper]), want, digits=4)


def test_terms_of_places_from_their_sensitivities(monkeypatch: pytest.MonkeyPatch) -> None:
    thresholds = []

    def watched(*arguments: object) -> list[Tensor]:
        thresholds.extend(quantiles(*arguments))
        return thresholds

    monkeypatch.setattr("qsr_plugin.methods.adabm.quantiles", watched)
    asking = {f"place{i}": AdaBMPolicy(AdaBMOptions(), WIDTHS) for i in range(7)}
    for policy, sensitivity in zip(asking.values(), [0.5, 1.5, 0.9, 2.2, 3.1, 0.7, 1.1]):
        policy.sensitivity = torch.tensor(sensitivity)
    image_bits(places=tuple(asking)).settle(asking)
    close(torch.stack(thresholds), [0.86, 1.64])
    assert [policy.offset.item() for policy in asking.values()] == [-1, 0, 0, 1, 1, -1, 0]


def test_sensitivity_is_the_mean_over_batches_of_the_mean_over_images() -> None:
    policy = AdaBMPolicy(AdaBMOptions(), WIDTHS)
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(n, 2, 3, 4, generator=generator) * n for n in (1, 3)]
    policy.begin_calibration()
    for batch in batches:
        policy.observe(batch)
    policy.end_calibration()
    want = sum(sum(one.std().item() for one in batch) / len(batch) for batch in batches) / 2
    assert policy.sensitivity.item() == pytest.approx(want, rel=1e-6)


@pytest.mark.parametrize("level", [0.0, 0.5, 1.0])
def test_images_of_one_colour_are_the_simplest(level: float) -> None:
    part = image_bits(low=5.0)
    term = part.term(ForwardRecord(1, image=torch.full((1, 3, 6, 6), level), policy=part))
    assert term.item() == -1 and bool(
        torch.isfinite(torch.stack(torch.autograd.grad(term, [part.lower, part.upper]))).all()
    )


def test_a_calibration_on_one_colour_keeps_the_thresholds_apart() -> None:
    part = image_bits()
    part.begin_calibration()
    part.observe(torch.full((2, 3, 6, 6), 0.3))
    part.end_calibration()
    assert part.upper - part.lower >= 0.99e-3
    assert bool(torch.isfinite(part.of_complexity(torch.tensor([0.0, 50.0]))).all())
    with torch.no_grad():
        part.lower.fill_(90.0)
    part.project()
    assert part.upper > part.lower
