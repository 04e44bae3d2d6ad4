"""LinQ, DoReFa and LSQ as the quantizers of every other recipe."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsr_plugin.models.stages import StageSchedule, parameter_groups, project
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.surgery import quantize_model
from tests.recipes import ADAPTIVE, METHODS, equal, shipped

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


#: (recipe, whose places another quantizer takes, whether with the recipe's own bit widths instead of 4)
CASES = [(method, roles, False) for method in METHODS for roles in (("act",), ("weight",), ("act", "weight"))]
CASES += [(method, ("act",), True) for method in ADAPTIVE]


@pytest.mark.parametrize("other", OTHERS)
@pytest.mark.parametrize(("method", "roles", "own"), CASES)
def test_another_quantizer_learns_in_every_recipe(
    tiny_net, images, method: str, roles: tuple[str, ...], own: bool, other: str
) -> None:
    kinds = dict(zip(("act", "weight"), OTHERS[other]))
    changes = {"quantizers": {role: {"type": kinds[role]} for role in roles}}
    recipe = shipped(method, tiny_net(), **changes) if own else equal(method, 4, **changes)
    assert all(not getattr(recipe.quantizers, role).extras() for role in roles), "options of the old one are gone"
    net = calibrate(quantize_model(tiny_net(), recipe), images).train()
    groups = parameter_groups(net)
    last = {name: index for index, stage in enumerate(recipe.stages) for name in stage.train if groups[name]}
    if other == "lsq":
        for name in ({"act": "ranges", "weight": "weight_ranges"}[role] for role in roles):
            assert groups[name] and name in last, "its steps are trained"
            assert getattr(recipe.stages[last[name]].lr, name) is not None, "with a rate of their own"
    if not last:  # a post-training recipe has ranges to learn, or nothing
        assert all("weights" not in stage.train for stage in recipe.stages)
    for index in range(len(recipe.stages)):
        StageSchedule(recipe.stages, 1e-4).apply(index, net)
        trained = [parameter for parameter in net.parameters() if parameter.requires_grad]
        if not trained:  # a stage for ranges that the other quantizer has not
            continue
        optimiser = torch.optim.Adam(trained, lr=1e-3)
        net.zero_grad()
        losses_of(net, images[0]).backward()
        for name in (name for name in last if last[name] == index):
            for parameter in groups[name]:
                assert parameter.grad is not None and bool(torch.isfinite(parameter.grad).all()), name
        optimiser.step()
        project(net)
    assert bool(torch.isfinite(net(images[0])).all())
