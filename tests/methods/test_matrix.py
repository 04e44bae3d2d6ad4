"""Every shipped recipe with every backbone: quantize, calibrate, run, learn."""

from __future__ import annotations

import pytest
import torch
from qsr_plugin.archs.roles import list_backbones
from torch import nn

from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.quantizer import quantizer_class
from qsr_plugin.quant.recipe import list_methods, load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers
from qsr_plugin.report.fab import feature_average_bits

methods = pytest.mark.parametrize("method", list_methods())
backbones = pytest.mark.parametrize("backbone", list_backbones())
CASES = [(method, placement) for method in list_methods() for placement in load_recipe(method).placements]

#: Changes with which images do not see each other, for recipes where they do as published.
ALONE = {"linq": {"quantizers": {"act": {"type": "linq", "per_sample": True}}}}


def in_the_last_stage(net: nn.Module) -> set[str]:
    """Set all quantizers to the recipe's last stage; returns the names of the parameters that take part in it."""
    for _, quantizer in quantizers(net):
        quantizer.enter_stage(net.recipe.stages[-1])
    idle = {id(parameter) for _, quantizer in quantizers(net) for parameter in quantizer.idle_parameters()}
    return {name for name, parameter in net.named_parameters() if id(parameter) not in idle}


@methods
def test_every_recipe_can_be_compared_at_equal_places(method: str) -> None:
    rules = load_recipe(method, placement="body").rules
    assert {(rule.role, rule.port) for rule in rules} == {("block.conv", "input"), ("block.conv", "weight")}
    assert all(rule.quantizer is None and rule.bits is None for rule in rules) and len(rules) == 2


@backbones
@pytest.mark.parametrize(("method", "placement"), CASES)
def test_one_training_step(tiny_net, images, method: str, placement: str, backbone: str) -> None:
    net = quantize_model(tiny_net(backbone), load_recipe(method, placement=placement, weight_bits=4, act_bits=4))
    used = in_the_last_stage(calibrate(net, images).train())
    out = net(images[0])
    assert out.shape == (2, 3, 16, 16) and bool(torch.isfinite(out).all())
    nn.functional.l1_loss(out, torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))).backward()
    learning = {name for name, p in net.named_parameters() if p.grad is not None and bool(p.grad.isfinite().all())}
    assert used <= learning, "every parameter learns, which distributed training needs"
    optimiser = torch.optim.Adam(net.parameters(), lr=1e-3)
    optimiser.step()
    for _, quantizer in quantizers(net):
        quantizer.project()
    assert bool(torch.isfinite(net(images[0])).all())
    assert feature_average_bits(net, net.last_record()) == 4.0


@backbones
@methods
def test_more_bits_come_closer_to_the_float_network(tiny_net, images, method: str, backbone: str) -> None:
    want, errors, defaults = tiny_net(backbone)(images[0]), [], load_recipe(method).quantizers
    widest = min(quantizer_class(spec.type).bits_span[1] for spec in (defaults.act, defaults.weight))
    for bits in (3, 8, widest):
        net = calibrate(
            quantize_model(tiny_net(backbone), load_recipe(method, weight_bits=bits, act_bits=bits)), images
        )
        with torch.no_grad():
            errors.append((net(images[0]) - want).square().mean().item())
    # Percentile ranges clip whatever the bits are, so their error has a floor.
    assert errors[0] > errors[1] and errors[2] <= errors[1] * 1.05


@backbones
@methods
def test_images_of_a_batch_do_not_see_each_other(tiny_net, images, method: str, backbone: str) -> None:
    net = calibrate(quantize_model(tiny_net(backbone), load_recipe(method, **ALONE.get(method, {}))), images).double()
    batch = images[0].double()
    with torch.no_grad():
        together, apart = net(batch), torch.cat([net(one) for one in batch.split(1)])
    assert torch.allclose(together, apart, atol=1e-9)


@backbones
@methods
def test_autocast_stays_near_full_precision(tiny_net, images, method: str, backbone: str) -> None:
    """bfloat16 has 8 significant bits, so the two differ by its rounding, not by a range that went wrong."""
    net = calibrate(quantize_model(tiny_net(backbone), load_recipe(method, weight_bits=8, act_bits=8)), images)
    used, want = in_the_last_stage(net), net(images[0])
    with torch.autocast("cpu", torch.bfloat16):
        got = net(images[0])
    assert (got.float() - want).abs().mean() < 0.02 * want.abs().mean() + 0.01
    got.float().sum().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(gradients[name] is not None and gradients[name].dtype == torch.float32 for name in used)
