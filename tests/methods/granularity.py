"""The part of Granular-DQ that networks share, calibrated outside of any, with photos and records for it."""

from __future__ import annotations

import torch
from torch import Tensor

from qsr_plugin.methods.granular_dq import GranularityOptions, SharedGranularity
from qsr_plugin.quant.record import ForwardRecord

CANDIDATES = (4, 5, 6, 8)


def photos(count: int, side: int = 12, seed: int = 0) -> Tensor:
    """Images from constant to noise, in an order that is no sorting."""
    generator = torch.Generator().manual_seed(seed)
    spread = torch.rand(count, 1, 1, 1, generator=generator)
    return 0.5 + spread * (torch.rand(count, 3, side, side, generator=generator) - 0.5)


def shared(channels: int = 16, **options: object) -> SharedGranularity:
    """The part of a network, calibrated on 64 images, in evaluation mode."""
    made = SharedGranularity(GranularityOptions(**options), CANDIDATES, ("a.input",), (channels,))
    made.begin_calibration()
    made.observe(photos(64, seed=9))
    made.end_calibration()
    return made.eval()


def prefer(part: SharedGranularity, *biases: float) -> SharedGranularity:
    """The same part with these biases of its gate."""
    with torch.no_grad():
        part.gate.linear.bias.copy_(torch.tensor(biases))
    return part


def forward_of(image: Tensor, channels: int = 16, seed: int = 1) -> ForwardRecord:
    """The record of a forward of these images, with random features that the gate reads."""
    features = torch.randn(image.shape[0], channels, *image.shape[2:], generator=torch.Generator().manual_seed(seed))
    return ForwardRecord(image.shape[0], image=image, taps={"head:output": features})


def close(got: Tensor, want: object, digits: int = 6) -> None:
    """Equal in this many decimals."""
    assert torch.allclose(got.detach().flatten(), torch.tensor(want), atol=1.01 * 10**-digits, rtol=2e-7), got
