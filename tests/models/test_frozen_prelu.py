"""PReLU whose slopes are not trained: bit for bit what PyTorch's own gives."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from qsr_plugin.models.frozen_prelu import FrozenPReLU, freeze_slopes


@pytest.mark.parametrize("slopes", [1, 6])
@pytest.mark.parametrize("shape", [(2, 6, 5, 7), (3, 6), (2, 6, 4)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_prelu(slopes: int, shape: tuple[int, ...], dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    usual = nn.PReLU(slopes).to(dtype)
    with torch.no_grad():
        usual.weight.uniform_(-0.5, 1.5)
    frozen = nn.Sequential(nn.PReLU(slopes).to(dtype))
    frozen[0].load_state_dict(usual.state_dict())
    freeze_slopes(frozen)
    assert type(frozen[0]) is FrozenPReLU and frozen.state_dict().keys() == {"0.weight"}
    x, grad = torch.randn(shape).to(dtype), torch.randn(shape).to(dtype)
    x.view(-1)[::5] = 0.0  # zero is not above zero
    results = []
    for layer in (usual, frozen):
        leaf = x.clone().requires_grad_()
        out = layer(leaf)
        out.backward(grad)
        results.append((out.detach(), leaf.grad))
    assert torch.equal(results[0][0], results[1][0])
    assert torch.equal(results[0][1], results[1][1])
    assert frozen[0].weight.grad is None


def test_subclasses_are_left_alone() -> None:
    class Own(nn.PReLU):
        pass

    net = nn.Sequential(Own())
    freeze_slopes(net)
    assert type(net[0]) is Own
