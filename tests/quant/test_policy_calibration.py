"""Bit policies and fitted ranges in a calibration: who is told what, in which order, and what a failure leaves."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.methods.pams import PAMSQuantizer
from qsr_plugin.quant.calibrate import calibrate, calibrating, fit_ranges
from qsr_plugin.quant.record import fitting_on, float_mode
from qsr_plugin.quant.surgery import policies, quantize_model, quantizers
from tests.quant.choosers import Brightness, Net, quantized, recipe

pytestmark = pytest.mark.usefixtures("choosers")


@pytest.fixture
def net() -> nn.Module:
    torch.manual_seed(0)
    return quantize_model(Net(), recipe("toy_brightness"))


def largest(net: nn.Module) -> dict[str, Tensor]:
    return {place: policy.largest for place, policy in policies(net)}


def test_policies_see_the_float_tensors_of_their_place_and_the_images(net, images) -> None:
    seen: dict[str, list[Tensor]] = {}
    for name, module in net.named_modules():
        if name.endswith(("conv1", "conv2")):
            module.register_forward_pre_hook(
                lambda _, args, key=f"{name}.input": seen.setdefault(key, []).append(args[0])
            )
    calibrate(net, images)
    want = {place: torch.stack([x.abs().amax() for x in tensors]).amax() for place, tensors in seen.items()}
    assert largest(net) == want
    means = torch.cat(images).mean((1, 2, 3))
    assert net.bit_policy.limits.tolist() == [means.min().item(), means.max().item()]
    assert net.bit_policy.settled == want, "it is told of all places, after each of them has ended"


def test_outside_of_a_calibration_nothing_is_observed(net, images) -> None:
    calibrate(net, images)
    before, limits = largest(net), net.bit_policy.limits.clone()
    with float_mode():
        net(10 * images[0])
    net(10 * images[0])
    assert largest(net) == before and torch.equal(net.bit_policy.limits, limits)


def test_calibrating_again_replaces_the_first(net, images) -> None:
    calibrate(net, [5 * batch for batch in images])
    calibrate(net, images)
    torch.manual_seed(0)
    fresh = calibrate(quantize_model(Net(), recipe("toy_brightness")), images)
    assert largest(net) == largest(fresh) and torch.equal(net.bit_policy.limits, fresh.bit_policy.limits)


def test_a_failure_forgets_what_was_seen(net, images) -> None:
    calibrate(net, images)
    limits = net.bit_policy.limits.clone()
    with pytest.raises(RuntimeError, match="on purpose"), calibrating(net):
        net(images[0] * 3)
        raise RuntimeError("on purpose")
    assert torch.equal(net.bit_policy.limits, limits) and net.bit_policy.seen_means is None
    assert all(not policy.open and policy.largest is None for _, policy in policies(net))
    net(images[0])


def test_a_place_without_data_changes_no_policy(images, monkeypatch) -> None:
    torch.manual_seed(0)
    idle = Net()
    idle.unused = nn.Module()
    idle.unused.conv1 = nn.Conv2d(4, 4, 1)
    net = quantize_model(idle, recipe("toy_brightness"))
    with pytest.raises(RuntimeError, match=r"unused\.conv1\.input"):
        calibrate(net, images)
    assert net.bit_policy.limits.tolist() == pytest.approx([0.45, 0.55]) and net.bit_policy.settled == {}
    assert not any(quantizer.is_calibrated for _, quantizer in quantizers(net) if quantizer.role == "act")


# -- ranges fitted to bits -------------------------------------------------------------------------------------------


@pytest.fixture
def fits(monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, Tensor, object]]:
    """What PAMS quantizers were fitted to, each of which then halves its range."""
    calls: list[tuple[str, Tensor, object]] = []

    def fit(self, x: Tensor, bits: object) -> None:
        assert fitting_on() and not torch.is_grad_enabled()
        calls.append((self.site, x.clone(), bits))
        with torch.no_grad():
            self.alpha.mul_(0.5)

    monkeypatch.setattr(PAMSQuantizer, "fit", fit)
    return calls


def test_every_range_is_fitted_behind_the_fitted_ones(images, fits) -> None:
    net = quantized("toy_brightness", images, calibration={"images": 6, "batch": 2, "fit": 2})
    assert [site for site, _, _ in fits] == [place for place, q in quantizers(net) if q.role == "act"]
    assert {bits for _, _, bits in fits} == {6}, "the policy's usual bits"
    assert not fitting_on()
    # The network as it is now gives every place the tensor that it was fitted to.
    seen: dict[str, Tensor] = {}
    for name, module in net.named_modules():
        if name.endswith(("conv1", "conv2")):
            module.register_forward_pre_hook(lambda _, args, key=f"{name}.input": seen.update({key: args[0]}))
    net.eval()(images[0])
    for site, x, _ in fits:
        assert torch.equal(x, seen[site]), site


@pytest.mark.parametrize(("fit", "sizes"), [(0, []), (1, [1]), (2, [2]), (3, [3]), (50, [6])])
def test_the_first_images_are_used_together(images, fits, fit: int, sizes: list[int]) -> None:
    quantized("toy_brightness", images, calibration={"images": 6, "batch": 2, "fit": fit})
    first = [x for site, x, _ in fits if site == "body.0.conv1.input"]
    assert [x.shape[0] for x in first] == sizes


def test_only_images_of_the_size_of_the_first_are_used_together(images, fits) -> None:
    net = quantize_model(Net(), recipe("toy_brightness", calibration={"fit": 3}))
    calibrate(net, [images[0][:1], images[0][:1, :, :-2], images[0][1:]])
    assert {x.shape[0] for _, x, _ in fits} == {2}


def test_fitting_leaves_mode_and_other_forwards_alone(images, fits) -> None:
    net = quantized("toy_brightness", images).train()
    fits.clear()
    net(images[0])
    assert fits == []
    fit_ranges(net, images[0])
    assert len(fits) == 4 and net.training and all(part.training for part in net.modules())


def test_shared_parts_are_settled_after_their_places(images, monkeypatch) -> None:
    order: list[str] = []
    end = Brightness.end_calibration
    monkeypatch.setattr(Brightness, "end_calibration", lambda self, **k: order.append(f"end {k}") or end(self, **k))
    monkeypatch.setattr(Brightness, "settle", lambda self, policies: order.append(f"settle {len(policies)}"))
    quantized("toy_brightness", images)
    assert order == ["end {}", "settle 4", "end {'keep': False}"]
