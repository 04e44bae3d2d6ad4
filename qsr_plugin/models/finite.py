"""Stopping before a number that is not finite reaches the weights, and finding where it came from."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from qsr_plugin.quant.quantizer import Quantizer


def refuse_non_finite(
    where: str, net: nn.Module, losses: Mapping[str, float], lq: Tensor, gt: Tensor, paths: Sequence[str]
) -> None:
    """Check losses and gradients of a step before the optimiser uses them.

    Args:
        where: What the message starts with.
        net: Bare network with its gradients.
        losses: Names and values.
        lq: Input batch (N, 3, H, W).
        gt: Ground truth batch.
        paths: File names of the batch's images.

    Raises:
        FloatingPointError: If one is NaN or infinite, naming the image, parameter or module where it starts.
    """
    bad = [f"loss {name}" for name, value in losses.items() if not math.isfinite(value)]
    gradients = [p.grad for p in net.parameters() if p.grad is not None]
    if not bad and not bool(torch.stack(torch._foreach_norm(gradients)).isfinite().all()):
        bad = [f"the gradient of {_first_gradient(net)}"]
    if bad:
        normed = any(isinstance(module, _BatchNorm) and module.training for module in net.modules())
        hint = " In the recipe's stages, freeze_batch_norm: true helps where few bits leave channels empty."
        raise FloatingPointError(
            f"{where}: {', '.join(bad)} is not finite; first bad place: {first_non_finite(net, lq, gt, paths)}. "
            "No weight was changed by this step, earlier checkpoints are kept. Lower the learning rates, add "
            f"warmup_iter, or check the data.{hint if normed else ''}"
        )


def _first_gradient(net: nn.Module) -> str:
    gradients = ((name, p.grad) for name, p in net.named_parameters() if p.grad is not None)
    return next(name for name, grad in gradients if not bool(torch.linalg.vector_norm(grad).isfinite()))


def first_non_finite(net: nn.Module, lq: Tensor, gt: Tensor, paths: Sequence[str]) -> str:
    """Name the first thing with a NaN or an infinity: an input file, a parameter or a module's output.

    Args:
        net: Bare network; it is run once more on ``lq``.
        lq: Input batch (N, 3, H, W).
        gt: Ground truth batch.
        paths: File names of the batch's images.
    """
    for batch, kind in ((lq, "LQ"), (gt, "GT")):
        bad = (~torch.isfinite(batch)).flatten(1).any(1).nonzero().flatten().tolist()
        if bad:
            return f"{kind} image {', '.join(paths[i] if i < len(paths) else f'number {i}' for i in bad)}"
    found: list[str] = []

    def look(name: str):
        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> None:
            if found or not isinstance(output, Tensor) or bool(torch.isfinite(output).all()):
                return
            own = [key for key, p in module.named_parameters(name) if not bool(torch.isfinite(p).all())]
            found.append(f"parameter {own[0]}" if own else f"output of {name} ({type(module).__name__})")

        return hook

    # A quantizer passes on what its layer got or made; the layer itself is the place to name.
    places = [(name, m) for name, m in net.named_modules() if name and not isinstance(m, Quantizer)]
    handles = [module.register_forward_hook(look(name)) for name, module in places]
    try:
        with torch.no_grad():
            net(lq)
    finally:
        for handle in handles:
            handle.remove()
    return found[0] if found else "the loss itself (the network's output is finite)"
