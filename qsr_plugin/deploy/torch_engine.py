"""Networks in PyTorch as engines; what runs exported files needs none of this, and starts faster without."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path

import numpy as np
import torch
from torch import Tensor, nn

from qsr_plugin.checkpoint import CheckpointError, load_quantized
from qsr_plugin.deploy.engine import Engine, no_model
from qsr_plugin.deploy.folding import fold
from qsr_plugin.device import usable_device
from qsr_plugin.errors import UserError
from qsr_plugin.foreign_files import foreign_kind

_TRIED = 48  # side of the image on which a module shows its scale


def quantized_in(path: Path) -> nn.Module:
    """The network in a quantized or packed file.

    Raises:
        UserError: For another kind of file, which is named, or one that cannot be read.
    """
    try:
        return fold(load_quantized(path))  # weights are quantized once, not in every forward
    except CheckpointError:
        if path.is_file() and (wrong := foreign_kind(path)):
            raise no_model(path, wrong) from None
        raise


def torch_engine(net: nn.Module, threads: int | None, device: str) -> Engine:
    """A network as an engine, in evaluation mode and moved to a device, in place.

    Args:
        net: (N, 3, H, W), RGB in [0, 1].
        threads: CPU threads of this process; PyTorch's own choice if not given.
        device: As PyTorch names it.

    Raises:
        UserError: For a device that is not there, or a network that does not enlarge.
    """
    if threads is not None:
        torch.set_num_threads(threads)
    place = usable_device(device)
    net.eval().to(place, memory_format=torch.channels_last)
    run = partial(_run_module, net, place)
    tried = np.full((1, 3, _TRIED, _TRIED), 0.5, np.float32)
    with largest_layer(net) as layer:
        out = run(tried)
    if out.ndim != 4 or out.shape[1] != 3 or out.shape[2] != out.shape[3] or out.shape[2] % _TRIED:
        raise UserError(
            f"{type(net).__name__} makes {tuple(out.shape)} of an image {(1, 3, _TRIED, _TRIED)}: expected three "
            "channels, and both sides enlarged by a whole number"
        )
    return Engine("torch", out.shape[2] // _TRIED, run, device=device, pixel_bytes=layer[0] / _TRIED**2)


def _run_module(net: nn.Module, device: torch.device, x: np.ndarray) -> np.ndarray:
    with torch.inference_mode():
        batch: Tensor = torch.from_numpy(np.ascontiguousarray(x)).to(device, memory_format=torch.channels_last)
        return net(batch).float().contiguous().cpu().numpy()


@contextmanager
def largest_layer(net: nn.Module) -> Iterator[list[int]]:
    """Watch what runs: bytes of input and output, as float32, of the largest module without parts.

    Yields:
        A list of one number, which grows as the network runs.
    """
    most = [0]

    def look(module: nn.Module, inputs: tuple[object, ...], output: object) -> None:
        values = sum(one.numel() for one in (*inputs, output) if isinstance(one, Tensor))
        most[0] = max(most[0], 4 * values)

    hooks = [module.register_forward_hook(look) for module in net.modules() if not list(module.children())]
    try:
        yield most
    finally:
        for hook in hooks:
            hook.remove()
