"""Plain files: float checkpoints of the backbone with the quantized values as weights, for any program that has it.

Only what is in the weights goes along. Activations are not quantized any more, so the scores are those of a network
with quantized weights and float activations, and nothing runs faster.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Union

import torch
from safetensors.torch import save as safetensors_bytes
from torch import nn

from qsr_plugin.checkpoint import CheckpointError, check_writable, save_torch, write_atomically
from qsr_plugin.deploy.collapsed import CollapsedTail
from qsr_plugin.deploy.folding import fold
from qsr_plugin.errors import UserError
from qsr_plugin.quant.depth_surgery import DepthBlock, ScaledShortcut
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.surgery import plugin_keys, quantizers

ENDINGS = (".pth", ".safetensors")


@dataclass(frozen=True)
class PlainReport:
    """What a plain file holds, and what it does not.

    Attributes:
        path: The file.
        file_bytes: Its size.
        architecture: Class of the float network.
        keys: Number of tensors, all that the architecture has.
        weights: How many of them have quantized values.
        lost: Places where activations were quantized and are not any more.
        added: Those of them that also added a learned shift to the tensor, which is lost as well.
    """

    path: Path
    file_bytes: int
    architecture: str
    keys: int
    weights: int
    lost: tuple[str, ...]
    added: tuple[str, ...]

    def __str__(self) -> str:
        lines = [f"{self.path}: {self.keys} tensors of {self.architecture}, {self.weights} with quantized values"]
        if self.lost:
            lines.append(f"note: activations are not quantized in it ({len(self.lost)} places, first {self.lost[0]})")
        if self.added:
            lines.append(
                f"note: {len(self.added)} of these places shift their tensor (first {self.added[0]}); the weights were "
                "trained with that, so the images may differ more than by rounding"
            )
        return "\n".join(lines)


def check_plain_path(path: Union[str, Path]) -> None:
    """Refuse a path that :func:`save_plain` could not write, before work is done for it.

    Raises:
        CheckpointError: For another ending.
        OSError: If the folder cannot be made or written.
    """
    if Path(path).suffix not in ENDINGS:
        raise CheckpointError(f"'{path}': plain weights are saved as {' or '.join(ENDINGS)}; change the ending")
    check_writable(path)


def save_plain(net: nn.Module, path: Union[str, Path]) -> PlainReport:
    """Save the float backbone of a quantized network with the quantized values as its weights.

    The keys are those of the float architecture, so :func:`qsr_plugin.checkpoint.load_float_weights` and whatever else
    has that architecture can load it. What quantizes activations is lost.

    Args:
        net: Quantized and calibrated; folded or not. Not changed.
        path: ``.pth``, with the state dict under ``params`` as BasicSR writes it, or ``.safetensors``.

    Returns:
        What the file holds, and what was lost.

    Raises:
        CheckpointError: If the network is not quantized, or for another ending.
        UserError: If it is not calibrated, or computes what the architecture cannot (see :func:`check_plain`).
        OSError: If the file cannot be written.
    """
    check_plain_path(path)
    if getattr(net, "recipe", None) is None:
        raise CheckpointError(f"{type(net).__name__} is not quantized: it is plain already, save its state dict")
    check_plain(net)
    folded = fold(net).cpu()
    added = plugin_keys(folded)
    state = {key: value.detach().contiguous().clone() for key, value in folded.state_dict().items() if key not in added}
    if Path(path).suffix == ".pth":
        save_torch({"params": state}, path)
    else:
        data = safetensors_bytes(state, metadata={"format": "pt"})
        write_atomically(path, lambda temporary: temporary.write_bytes(data))
    acts = [(place, quantizer) for place, quantizer in quantizers(folded) if quantizer.role == "act"]
    return PlainReport(
        path=Path(path),
        file_bytes=Path(path).stat().st_size,
        architecture=folded.float_class.__name__,
        keys=len(state),
        weights=sum(1 for _, quantizer in quantizers(folded) if quantizer.role == "weight"),
        lost=tuple(place for place, _ in acts),
        added=tuple(place for place, quantizer in acts if _shifts(quantizer)),
    )


def check_plain(net: nn.Module) -> None:
    """Refuse a network that computes what its float architecture cannot, whatever its weights are.

    Raises:
        UserError: For a block that is left out, or scales its identity path, or a collapsed tail.
    """
    for name, block in net.named_modules():
        if isinstance(block, CollapsedTail):
            raise UserError(
                f"{name} is a collapsed tail, its original weights are gone: export the file that this one was made of"
            )
        if not isinstance(block, ScaledShortcut):
            continue
        if not isinstance(block, DepthBlock) or block.skipped:
            raise UserError(f"{name} is left out of this network, which plain weights cannot say: export it as packed")
        if float(block.shortcut_scale.detach()) != 1.0:
            raise UserError(
                f"{name} scales its identity path by {float(block.shortcut_scale.detach()):.4g}, which plain weights "
                "cannot say: export it as packed"
            )


def _shifts(quantizer: Quantizer) -> bool:
    """Whether a quantizer adds something to its tensor that is not zero."""
    axes = 4 if quantizer.channel_axis == 1 else 3
    with torch.no_grad():
        return bool(quantizer.on_grid(torch.zeros([1] * axes)).any())
