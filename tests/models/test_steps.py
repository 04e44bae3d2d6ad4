"""Where the gradients of a training step come from, on a bare network without the host's loop."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.losses.context import StepContext
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.depth import set_depth
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.schema import Cooperative
from qsr_plugin.quant.surgery import quantize_model

compat.import_host()

from qsr_plugin.losses.mismatch_loss import MismatchLoss  # noqa: E402
from qsr_plugin.models import steps  # noqa: E402
from qsr_plugin.models.stages import parameter_groups  # noqa: E402

GT = torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(9))


@pytest.fixture
def net(tiny_net, images) -> nn.Module:
    built = quantize_model(tiny_net("EDSR"), load_recipe("odm", weight_bits=2, act_bits=2))
    built.keep_pairs = True
    return calibrate(built, images).train()


def losses_of(net: nn.Module, x: Tensor, mismatch: float) -> dict[str, Tensor]:
    out = net(x)
    step = StepContext(out, GT, net.last_record())
    return {"l_pix": nn.functional.l1_loss(out, GT), "l_m": MismatchLoss(loss_weight=mismatch)(step)}


def gradients(net: nn.Module) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in net.named_parameters()}


def separate(net: nn.Module, x: Tensor, mismatch: float) -> tuple[dict, dict]:
    """Gradients of either loss alone, from a forward and a backward of its own."""
    found = []
    for name in ("l_pix", "l_m"):
        net.zero_grad()
        losses_of(net, x, mismatch)[name].backward()
        found.append(gradients(net))
    net.zero_grad()
    return found[0], found[1]


@pytest.mark.parametrize("similarity", ["half_cosine", "cosine", "unit_step"])
def test_cooperative_step_is_the_combination_of_two_backwards(net, images, similarity: str) -> None:
    first, second = separate(net, images[0], 1e-3)
    steps.cooperative(losses_of(net, images[0], 1e-3), ["l_m"], net, Cooperative(similarity=similarity))
    weights = {id(p) for p in parameter_groups(net)["weights"]}
    acted = 0
    for name, p in net.named_parameters():
        want, pull = first[name], second[name]
        if id(p) in weights and pull is not None:
            cosine = (want * pull).sum() / (want.norm() * pull.norm())
            factor = {"cosine": cosine, "half_cosine": (cosine + 1) / 2, "unit_step": (cosine > 0).float()}[similarity]
            want = want + factor * pull
            acted += not torch.allclose(want, first[name], rtol=1e-3)
        assert torch.allclose(p.grad, want, rtol=1e-4, atol=1e-7), name
    assert acted >= 3, "the mismatch is large enough to show"


def test_ranges_learn_from_the_reconstruction_alone(net, images) -> None:
    first, second = separate(net, images[0], 1e-3)
    steps.cooperative(losses_of(net, images[0], 1e-3), ["l_m"], net, Cooperative())
    groups = parameter_groups(net)
    names = {id(p): name for name, p in net.named_parameters()}
    ranges = [names[id(p)] for p in (*groups["ranges"], *groups["weight_ranges"])]
    now = gradients(net)
    assert ranges and all(torch.allclose(now[name], first[name], rtol=1e-4, atol=1e-8) for name in ranges)
    assert any(second[name] is not None and bool(second[name].abs() > 1e-6) for name in ranges)


def test_layers_after_the_last_quantized_one_are_left_to_the_reconstruction(net, images) -> None:
    first, second = separate(net, images[0], 1e-3)
    assert second["conv_last.weight"] is None and second["body.0.conv1.weight"] is not None
    steps.cooperative(losses_of(net, images[0], 1e-3), ["l_m"], net, Cooperative(granularity="global"))
    assert torch.allclose(net.conv_last.weight.grad, first["conv_last.weight"], rtol=1e-5)


def test_frozen_weights_leave_the_regularizer_without_effect(net, images) -> None:
    first, _ = separate(net, images[0], 1e-3)
    groups, names = parameter_groups(net), {id(p): name for name, p in net.named_parameters()}
    for p in groups["weights"]:
        p.requires_grad_(False)
    steps.cooperative(losses_of(net, images[0], 1e-3), ["l_m"], net, Cooperative())
    assert all(p.grad is None for p in groups["weights"])
    for p in groups["ranges"]:
        assert torch.allclose(p.grad, first[names[id(p)]], rtol=1e-4, atol=1e-8)


def test_a_regularizer_without_graph_and_a_parameter_without_use(net, images) -> None:
    first, _ = separate(net, images[0], 1e-3)
    net.unused = nn.Parameter(torch.ones(2))
    losses = losses_of(net, images[0], 1e-3)
    losses["l_m"] = torch.zeros(())  # activations are float
    steps.cooperative(losses, ["l_m"], net, Cooperative())
    assert net.unused.grad.tolist() == [0.0, 0.0]
    assert torch.allclose(net.conv_first.weight.grad, first["conv_first.weight"], rtol=1e-5)


def test_several_depths_share_one_batch(tiny_net, images) -> None:
    net = quantize_model(tiny_net("EDSR", num_block=4), load_recipe({"base": "percentile", "depth": {}}))
    calibrate(net, images).train()
    want: dict[str, Tensor] = {}
    for blocks in (4, 2, 1):
        set_depth(net, blocks)
        net.zero_grad()
        nn.functional.l1_loss(net(images[0]), GT).backward()
        for name, grad in gradients(net).items():
            if grad is not None:
                want[name] = want.get(name, 0) + grad / 3
    set_depth(net, None)
    net.zero_grad()
    found = steps.depths(net, [1.0, 0.5, 0.25], lambda: {"l_pix": nn.functional.l1_loss(net(images[0]), GT)})
    assert list(found) == ["l_pix", "l_pix_2blocks", "l_pix_1blocks"]
    assert all(not value.requires_grad for value in found.values())
    for name, p in net.named_parameters():
        assert torch.allclose(p.grad, want[name], rtol=1e-4, atol=1e-7), name
    full = nn.functional.l1_loss(net(images[0]), GT)
    assert full.item() == pytest.approx(found["l_pix"].item(), rel=1e-6), "all blocks run again afterwards"
