"""Bit tables as plain data, and images from flat to rough that find their rows."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from qsr_plugin.quant.image_stats import edge_scores
from qsr_plugin.quant.surgery import policies

CANDIDATES = (4, 6, 8)


def content(places: list[str], rows: list[tuple[float, str]], **changes: Any) -> dict[str, Any]:
    """A table as plain data, from (score, one character per place)."""
    scores, bits = [score for score, _ in rows], [row for _, row in rows]
    made = {"places": places, "candidates": list(CANDIDATES), "scores": scores, "bits": bits, "patch": 96, "step": 94}
    return {**made, **changes}


def places_of(net: nn.Module) -> list[str]:
    """Places with a choice."""
    return [place for place, policy in policies(net) if len(policy.candidates) > 1]


def varied(count: int, side: int = 12) -> Tensor:
    """``(count, 3, side, side)`` images from flat to rough, in a mixed order."""
    noise = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) - 0.5
    strength = torch.linspace(0, 1, count)[torch.randperm(count, generator=torch.Generator().manual_seed(2))]
    return 0.5 + strength.view(-1, 1, 1, 1) * noise


def rows_for(images: Tensor, places: list[str]) -> list[tuple[float, str]]:
    """One row per image at its own score; the rougher, the more bits: 4.5, 5.5 and 8 for four places."""
    scores = sorted({round(float(score), 2) for score in edge_scores(images)})
    rest = len(places) - 1
    levels = ["6" + "4" * rest, "4" + "6" * rest, "8" + "8" * rest]
    return [(score, levels[3 * index // len(scores)]) for index, score in enumerate(scores)]
