"""Chains of trainings: one that starts from what another option file trains.

The key ``starts_from`` of an option file names the other one, ``qsr:...`` or relative to the file it is written in.
"""

from __future__ import annotations

import logging
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Optional

from qsr_plugin.options_file import OptionsError, load_options

logger = logging.getLogger("qsr_plugin")


def start_of(options: Mapping[str, Any], *, resuming: bool, distributed: bool) -> Optional[Path]:
    """The quantized network that a training starts from; it is trained first if it has not been.

    That training runs as its own option file says, from the same float weights if it names none; an interrupted one
    goes on.

    Args:
        options: Resolved options of the later training.
        resuming: It goes on where it was interrupted, and so needs no start.
        distributed: It is one of several processes, none of which can start the other training for all.

    Returns:
        Its file below ``experiments/`` in the current folder; ``None`` if the options name no other training, give
        quantized weights themselves, or need no start.

    Raises:
        OptionsError: If there is no such network, and it cannot be made here.
    """
    source, path = options.get("starts_from"), options.get("path") or {}
    if not source or path.get("pretrain_network_quantized") or path.get("pretrain_network_g"):
        return None
    first = load_options(source)
    network = Path("experiments", first["name"], "models", "net_g_latest.safetensors")
    if network.is_file():
        return network
    if resuming:
        return None
    command = [sys.executable, "-m", "qsr_plugin.train", "-opt", source, "--auto_resume"]
    weights = path.get("pretrain_network_float")
    if weights and not first["path"].get("pretrain_network_float"):
        command += ["--force_yml", f"path:pretrain_network_float={weights}"]
    if distributed:
        raise OptionsError(
            f"starts_from: {network} does not exist yet, and several processes cannot train it: first run\n  "
            + " ".join(command)
        )
    logger.warning("%s starts from %s, which is trained first: %s", options["name"], network, " ".join(command))
    done = subprocess.run(command, check=False)
    if done.returncode or not network.is_file():
        raise OptionsError(
            f"starts_from: the training that makes {network} ended with code {done.returncode}, see above: mend what "
            "it says, or give quantized weights as path.pretrain_network_quantized, or set starts_from to null to "
            "start from float weights"
        )
    return network
