"""Where networks run: the device a user names, tried before any work is done for it."""

from __future__ import annotations

import torch

from qsr_plugin.errors import UserError, first_line


def usable_device(name: str) -> torch.device:
    """The device of a name, if something can be computed on it.

    Args:
        name: As PyTorch names it: ``cpu``, ``cuda``, ``cuda:1``.

    Raises:
        UserError: For an unknown device, or one that is not there.
        torch.OutOfMemoryError: If its memory is full.
    """
    try:
        device = torch.device(name)
        torch.ones(1, device=device).item()
    except torch.OutOfMemoryError:
        raise
    except (RuntimeError, AssertionError) as error:  # the latter from builds without CUDA
        raise UserError(f"device is '{name}', which cannot be used here ({first_line(error)}): try cpu") from None
    return device
