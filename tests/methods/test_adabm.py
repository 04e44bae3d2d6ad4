"""AdaBM against figures computed with the published code (float32), and its parts in networks."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.losses.context import StepContext
from qsr_plugin.methods.adabm import AdaBMOptions, AdaBMPolicy, BitAwareQuantizer, ImageBits
from qsr_plugin.methods.minmax_percentile import SymmetricQuantizer
from qsr_plugin.options_file import options_folder
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.record import ForwardRecord, fitting
from qsr_plugin.quant.surgery import policies, quantize_model, quantizers
from tests.methods.asymmetric_examples import EXAMPLES, NAMES

compat.import_host()

from qsr_plugin.losses.bit_loss import BitLoss  # noqa: E402
from qsr_plugin.losses.distill_loss import TeacherLoss  # noqa: E402

WIDTHS = (2, 3, 4, 5, 6)


def close(got: Tensor, want: list | float, digits: int = 6) -> None:
    wanted = torch.tensor(want, dtype=torch.float32).flatten()
    assert torch.allclose(got.detach().float().flatten(), wanted, atol=1.01 * 10**-digits, rtol=1e-6), got


def bounded(low: float, high: float, **options: object) -> BitAwareQuantizer:
    q = BitAwareQuantizer(BitAwareQuantizer.Options(**options), WIDTHS, "act", 1)
    with torch.no_grad():
        q.set_range(torch.tensor(low), torch.tensor(high))
    q.mark_calibrated()
    return q


@pytest.mark.parametrize(NAMES, EXAMPLES)
def test_activations_of_one_image_with_its_own_bits(low, high, bits, x, values, dx, dl, du, db) -> None:
    q, x, width = (
        bounded(low, high),
        torch.tensor([x], requires_grad=True),
        torch.tensor([float(bits)], requires_grad=True),
    )
    out = q(x, width)
    close(out, values)
    for got, want in zip(torch.autograd.grad(out.sum(), (x, q.lower, q.upper, width)), (dx, dl, du, db)):
        close(got, want)


def test_weights_and_the_search_of_their_bound() -> None:
    recipe = load_recipe("adabm")
    options = SymmetricQuantizer.Options(**recipe.quantizers.weight.extras())
    q = SymmetricQuantizer(options, (4,), "weight", 0)
    q.begin_calibration()
    q.observe(torch.tensor([0.05, -0.1, 0.2, 0.3, -0.35, 0.9, -1.1, 0.12]))
    q.end_calibration()
    close(q.bound, 0.9)
    with torch.no_grad():
        q.bound.fill_(0.5)
    out = q(torch.tensor([-0.9, -0.1, 0.0, 0.25, 0.31, 0.8]))
    close(out, [-0.5, -0.1, 0.033333, 0.233333, 0.3, 0.5])
    close(torch.autograd.grad(out.sum(), q.bound)[0], 0.013333)


def test_bounds_are_averaged_over_batches() -> None:
    q = bounded(0.0, 0.0)
    q.begin_calibration()
    for batch, want in (([-1.0, 0, 2, 5], (-1, 5)), ([-3.0, 1, 4], (-1.2, 4.9)), ([-0.5, 0.5], (-1.13, 4.46))):
        q.observe(torch.tensor(batch))
        close(torch.stack(q.observed_range()), list(map(float, want)))
    q.end_calibration()
    close(torch.stack([q.lower, q.upper]), [-1.13, 4.46])


X = torch.tensor([-0.2, 0.1, 0.3, 0.5, 0.2, -0.1, 3.0, 0.25])


def test_bit_aware_clipping() -> None:
    q = bounded(-0.2, 3.0)
    q.fit(X, 3)
    close(torch.stack([q.lower, q.upper]), [-0.198, 2.97])
    q = bounded(-0.2, 3.0, mix=1.0)
    q.fit(X, 3)
    close(torch.stack([q.lower, q.upper]), [-0.196, 2.94])


def test_clipping_leaves_places_with_bits_of_their_own() -> None:
    q = bounded(-0.2, 3.0)
    q.counts_in_fab = False
    q.fit(X, 3)
    close(torch.stack([q.lower, q.upper]), [-0.2, 3.0])


@pytest.mark.parametrize(
    ("offset", "bits", "slope"), [(-1.0, 3, -0.028516), (-0.4, 4, 21.4331), (0.6, 5, 35.5953), (1.7, 5, 6.25338)]
)
def test_the_place_learns_from_reconstruction_and_price(offset: float, bits: int, slope: float) -> None:
    policy = AdaBMPolicy(AdaBMOptions(), WIDTHS)
    with torch.no_grad():
        policy.offset.fill_(offset)
    x = torch.tensor([[0.12, 0.77, 1.31]])
    width = policy.decide(x, None).bits
    record = ForwardRecord(1, bits={"place": width}, policy=ImageBits(AdaBMOptions(), WIDTHS, (), ()))
    price = BitLoss(loss_weight=50)(StepContext(x, x, record))
    assert width.item() == bits == policy.usual_bits()
    assert price.item() == 50 * max(bits - 4, 0)
    (got,) = torch.autograd.grad(bounded(0.0, 1.6)(x, width).sum() + price, policy.offset)
    assert got.item() == pytest.approx(slope, rel=3e-5, abs=1e-6)


@pytest.mark.parametrize(
    ("bits", "slope"), [((3.0, 4.0), 0.0), ((4.0, 4.0), 25.0), ((3.0, 5.0), 25.0), ((4.0, 5.0), 50.0)]
)
def test_at_the_bits_of_the_recipe_the_price_has_half_of_its_slope(bits: tuple[float, float], slope: float) -> None:
    mean, x = torch.tensor(0.0, requires_grad=True), torch.zeros(2, 1)
    record = ForwardRecord(
        2, bits={"place": torch.tensor(bits) + mean}, policy=ImageBits(AdaBMOptions(), WIDTHS, (), ())
    )
    price = BitLoss(loss_weight=50)(StepContext(x, x, record))
    assert torch.autograd.grad(price, mean)[0].item() == slope


def test_one_bit_width_is_asked_for() -> None:
    with pytest.raises(ValueError, match=r"2 bits below and above one bit width, got \[4, 6, 8\]"):
        AdaBMPolicy(AdaBMOptions(), (4, 6, 8))
    with pytest.raises(RecipeError, match="give 4 or more"):
        load_recipe("adabm", act_bits=3)


def adapted(net: nn.Module, images: list[Tensor], **changes: object) -> nn.Module:
    return calibrate(quantize_model(net, load_recipe("adabm", **changes)), images)


@pytest.mark.parametrize("placement", ["body", "full"])
@pytest.mark.parametrize("kind", ["EDSR", "SRResNet"])
def test_bits_in_a_network(tiny_net, images, kind: str, placement: str) -> None:
    net = adapted(tiny_net(kind), images, placement=placement)
    flat = torch.full((1, 3, 8, 8), 0.5)
    batch = torch.cat([flat, images[0]])
    out, bits = net(batch), net.last_record().bits
    term = net.bit_policy.term(net.last_record())
    asking = {name: policy for name, policy in policies(net) if isinstance(policy, AdaBMPolicy)}
    assert len(asking) == (4 if placement == "body" else 5) and set(asking) == set(net.bit_policy.places)
    for name, policy in asking.items():
        assert torch.equal(bits[name], policy.usual_bits() + term) and set(bits[name].tolist()) <= {2, 3, 4, 5, 6}
    assert {width for name, width in bits.items() if name not in asking} == ({8} if placement == "full" else set())
    assert sorted({policy.usual_bits() for policy in asking.values()}) == [3, 4, 5], "places differ in sensitivity"
    assert term[0] == -1, "the simplest image"
    for index in range(3):
        assert torch.allclose(net(batch[index : index + 1]), out[index : index + 1], atol=1e-6)
        assert [net.last_record().bits[name].item() for name in asking] == [bits[name][index].item() for name in asking]


def test_ranges_are_clipped_behind_quantized_layers(tiny_net, images) -> None:
    net = adapted(tiny_net(), images)
    plain = adapted(tiny_net(), images, calibration={"fit": 0})
    widths = {name: (q.lower.item(), q.upper.item()) for name, q in quantizers(plain) if q.role == "act"}
    moved = 0
    for name, q in quantizers(net):
        if q.role == "act":
            low, high = widths[name]
            share = q.upper.item() / high
            assert 0.5 <= share <= 1 + 1e-6 and q.lower.item() == pytest.approx(share * low, abs=1e-5)
            moved += share < 1
    assert moved
    with torch.no_grad(), fitting():  # the two images that the recipe fits to, once more by hand
        plain(images[0][:2])
    assert all(torch.allclose(net.state_dict()[key], value) for key, value in plain.state_dict().items())


def test_a_second_calibration_replaces_the_first(tiny_net, images) -> None:
    net = adapted(tiny_net("SRResNet"), images)
    first = {key: value.clone() for key, value in net.state_dict().items()}
    calibrate(net, [0.3 * batch for batch in images])
    assert any(not torch.equal(first[key], value) for key, value in net.state_dict().items())
    calibrate(net, images)
    assert all(torch.equal(first[key], value) for key, value in net.state_dict().items())


def test_every_part_learns(tiny_net, images) -> None:
    net = adapted(tiny_net(), images).train()
    out = net(images[0])
    record = net.last_record()
    loss = TeacherLoss()(StepContext(out, out, record, torch.zeros_like(out))) + BitLoss(target_bits=2)(
        StepContext(out, out, record)
    )
    loss.backward()
    assert all(p.grad is not None and bool(p.grad != 0) for p in [q.offset for _, q in policies(net)])
    assert bool(net.bit_policy.lower.grad != 0) and bool(net.bit_policy.upper.grad != 0)


def test_the_percentile_variant_changes_ranges_and_the_price_of_bits_alone(tiny_net, images) -> None:
    path = options_folder() / "ablations/adabm_percentile.yml"
    published, variant = load_recipe("adabm").to_dict(), load_recipe(path).to_dict()
    *kept, price = published.pop("losses")
    *same, cheaper = variant.pop("losses")
    assert same == kept and cheaper == price | {"loss_weight": cheaper["loss_weight"]}
    assert cheaper["loss_weight"] < price["loss_weight"]
    widest, narrower = (
        {
            name: q.upper.item()
            for name, q in quantizers(calibrate(quantize_model(tiny_net(), recipe), images))
            if q.role == "act"
        }
        for recipe in (load_recipe("adabm", calibration={"fit": 0}), load_recipe(path, calibration={"fit": 0}))
    )
    assert all(0 < narrower[name] <= upper for name, upper in widest.items()) and narrower != widest
    assert variant["quantizers"].pop("act") == published["quantizers"].pop("act") | {"observer": "percentile"}
    assert variant == published
