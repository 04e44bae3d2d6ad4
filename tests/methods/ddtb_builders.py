"""Quantizers of DDTB with given bounds, with their gate in use or calibrated on features that a gate tells apart."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from qsr_plugin.methods.ddtb import DDTBQuantizer
from qsr_plugin.quant.schema import Stage

C = 4
variants = pytest.mark.parametrize("variant", ["per_sample", "released"])


def close(got: Tensor, want: list, digits: int = 7) -> None:
    """Equal in this many decimals."""
    wanted = torch.tensor(want, dtype=torch.float32).flatten()
    assert torch.allclose(got.detach().flatten(), wanted, atol=1.01 * 10**-digits, rtol=2e-7), got


def ddtb(bits: int | tuple = 2, lower: float = -0.7, upper: float = 1.5, axis: int = 1, **options) -> DDTBQuantizer:
    """Calibrated to given bounds; dynamic, so that its gate takes part as a stage says."""
    candidates = bits if isinstance(bits, tuple) else (bits,)
    q = DDTBQuantizer(DDTBQuantizer.Options(**options), candidates, "act", axis, channels=C)
    q.site = "body.0.input"
    with torch.no_grad():
        q.set_range(torch.tensor(lower), torch.tensor(upper))
    q.mark_calibrated()
    return q


def dynamic(q: DDTBQuantizer, *, gated: bool) -> DDTBQuantizer:
    """The same quantizer with its gate in use."""
    state = q.state_dict()
    state["dynamic"] = torch.tensor(True)
    q.load_state_dict(state)
    q.enter_stage(Stage(gated=gated))
    return q


def features(batch: int = 3, seed: int = 1) -> Tensor:
    """Images of different brightness and contrast, so that a gate tells them apart."""
    draw = torch.Generator().manual_seed(seed)
    x = torch.randn(batch, C, 5, 6, generator=draw)
    return x * torch.linspace(0.4, 1.6, batch).view(-1, 1, 1, 1) + torch.randn(batch, C, 1, 1, generator=draw)
