"""LinQ, DoReFa and LSQ as the quantizers of every other recipe."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsr_plugin.models.stages import StageSchedule, parameter_groups
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import list_methods, load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers

#: What takes the place of a recipe's own quantizers: activations, weights.
OTHERS = {
    "linq": ("linq", "linq"),
    "dorefa": ("dorefa", "dorefa_weight"),
    "lsq": ("lsq", "lsq"),
}


def losses_of(net: nn.Module, images: torch.Tensor) -> torch.Tensor:
    """L1 against a fixed target."""
    out = net(images)
    return nn.functional.l1_loss(out, torch.rand(out.shape, generator=torch.Generator().manual_seed(9)))


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize("roles", [("act",), ("weight",), ("act", "weight")], ids="-".join)
@pytest.mark.parametrize("method", list_methods())
def test_another_quantizer_learns_in_every_recipe(tiny_net, images, method: str, roles: tuple, other: str) -> None:
    kinds = dict(zip(("act", "weight"), OTHERS[other]))
    recipe = load_recipe(method, quantizers={role: {"type": kinds[role]} for role in roles}, act_bits=4, weight_bits=4)
    assert all(not getattr(recipe.quantizers, role).extras() for role in roles), "options of the old one are gone"
    net = calibrate(quantize_model(tiny_net(), recipe), images).train()
    groups, last = parameter_groups(net), recipe.stages[-1]
    learning = {name: parameters for name, parameters in groups.items() if name in last.train}
    if other == "lsq":
        ranges = {"act": "ranges", "weight": "weight_ranges"}
        assert all(learning[ranges[role]] for role in roles), "its steps are trained"
        assert all(getattr(last.lr, ranges[role]) is not None for role in roles), "with a rate of their own"

    if not any(groups[name] for name in last.train):  # a post-training recipe has ranges to learn, or nothing
        assert "weights" not in last.train
        return
    for index in range(len(recipe.stages)):
        StageSchedule(recipe.stages, 1e-4).apply(index, net)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        optimiser = torch.optim.Adam(trained, lr=1e-3)
        net.zero_grad()
        losses_of(net, images[0]).backward()
        if index == len(recipe.stages) - 1:
            for name, parameters in learning.items():
                for parameter in parameters:
                    assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        optimiser.step()
        for _, quantizer in quantizers(net):
            quantizer.project()
    assert bool(torch.isfinite(net(images[0])).all())
