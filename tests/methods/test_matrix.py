"""Every shipped recipe with every backbone: quantize, calibrate, run, learn; adaptive ones also with their own widths."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.models.stages import bit_policies, parameter_groups, project
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.quantizer import quantizer_class
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers
from qsr_plugin.report.fab import feature_average_bits
from tests.backbones import FITTING, REFUSED, TRANSFORMERS
from tests.quant.choosers import bright_to_dark, trained
from tests.recipes import ADAPTIVE, METHODS, by_role, equal, shipped, widths

methods = pytest.mark.parametrize("method", METHODS)
adaptive = pytest.mark.parametrize("method", ADAPTIVE)
fitting = pytest.mark.parametrize(("method", "backbone"), FITTING)
fitting_adaptive = pytest.mark.parametrize(("method", "backbone"), [pair for pair in FITTING if pair[0] in ADAPTIVE])
#: (recipe, backbone, placement, whether with its own bit widths instead of equal ones)
CASES = [
    (method, backbone, placement, own)
    for method, backbone in FITTING
    for placement in by_role(method, backbone in TRANSFORMERS)
    for own in ((False, True) if method in ADAPTIVE else (False,))
]

#: Changes with which images do not see each other, for recipes where they do as published.
ALONE = {"linq": {"quantizers": {"act": {"type": "linq", "per_sample": True}}}}


def in_the_last_stage(net: nn.Module) -> set[str]:
    """Set quantizers and policies to the recipe's last stage; returns the names of the parameters that take part."""
    for part in (*(quantizer for _, quantizer in quantizers(net)), *bit_policies(net)):
        part.enter_stage(net.recipe.stages[-1])
    used = {id(parameter) for parameters in parameter_groups(net).values() for parameter in parameters}
    return {name for name, parameter in net.named_parameters() if id(parameter) in used}


def chosen(net: nn.Module) -> Tensor:
    """Bits ``(places, images)`` of the last forward, at the places with a choice."""
    return torch.stack([bits.detach() for bits in net.last_record().bits.values() if isinstance(bits, Tensor)])


def choosing(method: str, plain: nn.Module, batch: Tensor) -> nn.Module:
    """A network with a recipe's own widths whose policy uses several of them on a batch, in evaluation mode."""
    net = calibrate(quantize_model(plain, shipped(method, plain)), [batch])
    return trained(net.eval(), batch)


@methods
def test_every_recipe_can_be_compared_at_equal_places(method: str) -> None:
    rules = load_recipe(method, placement="body").rules
    assert {(rule.role, rule.port) for rule in rules} == {("block.conv", "input"), ("block.conv", "weight")}
    assert all(rule.quantizer is None and rule.bits is None for rule in rules) and len(rules) == 2


@pytest.mark.parametrize(("method", "backbone"), REFUSED)
def test_recipes_of_several_depths_say_why_a_backbone_has_one(tiny_net, method: str, backbone: str) -> None:
    with pytest.raises(
        RecipeError, match=rf"{backbone} cannot be left out: {REFUSED[method, backbone]}.*'depth'.*null"
    ):
        quantize_model(tiny_net(backbone), method)


@pytest.mark.parametrize(("method", "backbone", "placement", "own"), CASES)
def test_one_training_step(tiny_net, images, method: str, backbone: str, placement: str, own: bool) -> None:
    plain = tiny_net(backbone)
    recipe = shipped(method, plain, placement=placement) if own else equal(method, 4, placement=placement)
    net = quantize_model(plain, recipe)
    used = in_the_last_stage(calibrate(net, images).train())
    out = net(images[0])
    assert out.shape == (2, 3, 16, 16) and bool(torch.isfinite(out).all())
    nn.functional.l1_loss(out, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))).backward()
    learning = {name for name, p in net.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}
    assert used <= learning, "every parameter learns, which distributed training needs"
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    optimiser.step()
    project(net)
    assert bool(torch.isfinite(net(images[0])).all())
    allowed, found = widths(recipe), feature_average_bits(net, net.last_record())
    assert min(allowed) <= found <= max(allowed)
    if len(allowed) > 1:
        assert set(chosen(net).flatten().tolist()) <= set(map(float, allowed)) and chosen(net).shape[1] == 2


@fitting_adaptive
def test_images_of_a_batch_have_bits_of_their_own(tiny_net, method: str, backbone: str) -> None:
    """One to many at a time, the last batch incomplete."""
    batch = bright_to_dark(16)
    net = choosing(method, tiny_net(backbone), batch)
    with torch.no_grad():
        together, bits = net(batch), chosen(net)
        assert (bits != bits[:, :1]).any(), "the images of this batch differ in their bits"
        for size in (1, 5):
            apart = [(net(part), chosen(net)) for part in batch.split(size)]
            assert torch.equal(torch.cat([part for _, part in apart], 1), bits)
            assert torch.allclose(torch.cat([part for part, _ in apart]), together, atol=1e-4)


@adaptive
def test_plain_images_have_finite_results_and_no_more_bits_than_others(tiny_net, images, method: str) -> None:
    batch = torch.cat([torch.zeros(1, 3, 8, 8), torch.ones(1, 3, 8, 8), torch.full((1, 3, 8, 8), 0.3), images[0]])
    net = calibrate(quantize_model(tiny_net(), shipped(method, tiny_net())), images)
    with torch.no_grad():
        assert bool(torch.isfinite(net(batch)).all())
    bits = chosen(net).float().mean(0)
    assert bool((bits[:3] <= bits[3:].min()).all())


@fitting
def test_more_bits_come_closer_to_the_float_network(tiny_net, images, method: str, backbone: str) -> None:
    want, errors, defaults = tiny_net(backbone)(images[0]), [], load_recipe(method).quantizers
    widest = min(quantizer_class(spec.type).bits_span[1] for spec in (defaults.act, defaults.weight))
    for bits in (3, 8, widest):
        net = calibrate(quantize_model(tiny_net(backbone), equal(method, bits)), images)
        with torch.no_grad():
            errors.append((net(images[0]) - want).square().mean().item())
    # Percentile ranges clip whatever the bits are, so their error has a floor.
    assert errors[0] > errors[1] and errors[2] <= errors[1] * 1.1


@fitting
def test_images_of_a_batch_do_not_see_each_other(tiny_net, images, method: str, backbone: str) -> None:
    plain = tiny_net(backbone)
    net = calibrate(quantize_model(plain, shipped(method, plain, **ALONE.get(method, {}))), images).double()
    batch = images[0].double()
    with torch.no_grad():
        together, apart = net(batch), torch.cat([net(one) for one in batch.split(1)])
    assert torch.allclose(together, apart, atol=1e-9)


@fitting
def test_autocast_stays_near_full_precision(tiny_net, images, method: str, backbone: str) -> None:
    """bfloat16 has 8 significant bits, so the two differ by its rounding, not by a range that went wrong."""
    net = calibrate(quantize_model(tiny_net(backbone), equal(method, 8)), images)
    used, want = in_the_last_stage(net), net(images[0])
    with torch.autocast("cpu", torch.bfloat16):
        got = net(images[0])
    assert (got.float() - want).abs().mean() < 0.02 * want.abs().mean() + 0.01
    got.float().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(gradients[name] is not None and gradients[name].dtype == torch.float32 for name in used)


@fitting_adaptive
def test_autocast_changes_no_decision(tiny_net, images, method: str, backbone: str) -> None:
    plain = tiny_net(backbone)
    net = calibrate(quantize_model(plain, shipped(method, plain)), images)
    used = in_the_last_stage(net)
    net(images[0])
    want = chosen(net)
    with torch.autocast("cpu", torch.bfloat16):
        got = net(images[0])
    assert torch.equal(chosen(net), want) and bool(torch.isfinite(got).all())
    got.float().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(gradients[name] is not None and gradients[name].dtype == torch.float32 for name in used)
