"""Cooperative gradient weighting: how far a regularizer may act (Hong and Lee, ECCV 2024, arXiv 2307.13337v2).

The gradient of a regularizing loss is added to that of the reconstruction with a factor between 0 and 1 that grows with
the cosine between them: ``g = g_R + sim(g_R, g_M) g_M`` with ``sim(a, b) = (cos(a, b) + 1) / 2``. Losses carry their
weights already.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from qsr_plugin.quant.schema import Cooperative


def combine(
    names: Sequence[str],
    reconstruction: Sequence[Tensor],
    regularizer: Sequence[Tensor | None],
    options: Cooperative,
) -> list[Tensor]:
    """Combine two sets of gradients with respect to the same parameters.

    Args:
        names: Dotted names of the parameters.
        reconstruction: Their gradients from the reconstruction, of any shapes.
        regularizer: Their gradients from the regularizer, ``None`` where it does not reach.
        options: Granularity of the angle, and the factor it gives.

    Returns:
        The combined gradients, in the shapes of ``reconstruction``; a gradient the regularizer does not reach is passed
        on as it is. Nothing is modified.
    """
    pairs: dict[str, list[tuple[Tensor, Tensor]]] = {}
    for name, a, b in zip(names, reconstruction, regularizer, strict=True):
        if b is not None:
            pairs.setdefault(_part(name, options.granularity), []).append((a, b))
    factor = {part: similarity(tensors, options.similarity) for part, tensors in pairs.items()}
    return [
        a if b is None else torch.addcmul(a, b, factor[_part(name, options.granularity)].to(a.dtype))
        for name, a, b in zip(names, reconstruction, regularizer)
    ]


def similarity(pairs: Sequence[tuple[Tensor, Tensor]], form: str = "half_cosine") -> Tensor:
    """Factor of the regularizer for one part of the parameters.

    Args:
        pairs: (reconstruction's, regularizer's) gradient of each parameter of the part; together they make two vectors.
        form: See :class:`Cooperative`.

    Returns:
        0-d float32 tensor.
    """
    dot, first, second = (
        torch.stack([torch.sum(a.float() * b.float()) for a, b in group]).sum()
        for group in (pairs, [(a, a) for a, _ in pairs], [(b, b) for _, b in pairs])
    )
    norms = first.sqrt() * second.sqrt()
    # A gradient of zero has no direction; its cosine with anything counts as 0.
    cosine = torch.where(norms > 0, dot / norms, torch.zeros_like(dot)).clamp(-1.0, 1.0)
    if form == "cosine":
        return cosine
    return (cosine > 0).to(cosine.dtype) if form == "unit_step" else (cosine + 1.0) * 0.5


def _part(name: str, granularity: str) -> str:
    """What an angle is taken over: the parameter, the module it belongs to, or everything."""
    return {"tensor": name, "layer": name.rpartition(".")[0], "global": ""}[granularity]
