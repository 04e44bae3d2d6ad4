"""Chains of trainings: one that starts from what another option file trains.

The key ``starts_from`` of an option file names the other one, ``qsr:...`` or relative to the file it is written in.
"""

from __future__ import annotations

import logging
import re
import shlex
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Optional

from qsr_plugin.options_file import OptionsError, load_options

logger = logging.getLogger("qsr_plugin")

#: What ``--force_yml`` says about data and devices holds for the whole chain.
_SHARED = ("datasets", "num_gpu", "dist_params")


def start_of(
    options: Mapping[str, Any], *, resuming: bool, distributed: bool, forced: Sequence[str] = ()
) -> Optional[Path]:
    """The quantized network that a training starts from; it is trained first if it has not been.

    That training runs as its own option file says, from the same float weights if it names none, with the same values
    forced for data and devices; an interrupted one goes on.

    Args:
        options: Resolved options of the later training.
        resuming: It goes on where it was interrupted, and so needs no start.
        distributed: It is one of several processes, none of which can start the other training for all.
        forced: Its ``key:key=value`` entries of the command line.

    Returns:
        Its file below ``experiments/`` in the current folder; ``None`` if the options name no other training, give
        quantized weights themselves, or need no start.

    Raises:
        OptionsError: If there is no such network, and it cannot be made here or would not fit.
    """
    source, first = _source(options), _first_of(options)
    if first is None:
        return None
    network = Path("experiments", first["name"], "models", "net_g_latest.safetensors")
    if network.is_file():
        return network
    if resuming:
        return None
    refuse_misfit(first, options)
    command = [sys.executable, "-m", "qsr_plugin.train", "-opt", source, "--auto_resume"]
    passed = _passed_on(options, first, forced)
    try:
        load_options(source, passed)
    except OptionsError as error:
        raise OptionsError(f"starts_from: {source} cannot take over what this training says: {error}") from None
    command += ["--force_yml", *passed] if passed else []
    shown = shlex.join(command)
    if distributed:
        raise OptionsError(
            f"starts_from: {network} does not exist yet, and several processes cannot train it: first run\n  {shown}"
        )
    logger.warning("%s starts from %s, which is trained first: %s", options["name"], network, shown)
    done = subprocess.run(command, check=False)
    if done.returncode or not network.is_file():
        raise OptionsError(
            f"starts_from: the training that makes {network} ended with code {done.returncode}, see above: mend what "
            "it says, or give quantized weights as path.pretrain_network_quantized, or set starts_from to null to "
            "start from float weights"
        )
    return network


def refuse_misfit(first: Mapping[str, Any], later: Mapping[str, Any]) -> None:
    """Refuse a training that could not start from what another one makes, before either has run.

    Args:
        first: Resolved options of the training that makes the start.
        later: Those of the training that starts from it.

    Raises:
        OptionsError: With what differs.
    """
    from qsr_plugin.archs.quant_net_arch import QuantNet
    from qsr_plugin.models.loading import adopted

    kind = (first.get("network_g") or {}).get("type")
    if kind != "QuantNet":
        raise OptionsError(
            f"starts_from: '{first['name']}' trains a {kind}, and a start must be a quantized network (network_g.type "
            "QuantNet); float weights are given as path.pretrain_network_float"
        )
    start, net = (QuantNet(one["network_g"]["backbone"], one["network_g"]["recipe"]) for one in (first, later))
    _, problems = adopted(net, start.state_dict(), start.recipe)
    if problems:
        raise OptionsError(
            f"starts_from: '{later['name']}' cannot start from what '{first['name']}' trains; give both the same "
            "backbone, placement and quantizers. First differences:\n  " + "\n  ".join(problems[:8])
        )


def _source(options: Mapping[str, Any]) -> Optional[str]:
    """The option file of the training that a training starts from, if it starts from one."""
    path = options.get("path") or {}
    given = path.get("pretrain_network_quantized") or path.get("pretrain_network_g")
    return None if given else options.get("starts_from") or None


def _first_of(options: Mapping[str, Any]) -> Optional[dict[str, Any]]:
    """Resolved options of the training that a training starts from, if there is one.

    Raises:
        OptionsError: If one of the whole chain would start from itself, or from another one of its name.
    """
    chain = [options]
    while source := _source(chain[-1]):
        chain.append(load_options(source))
        names = [one["name"] for one in chain]
        if names[-1] in names[:-1]:
            raise OptionsError(
                f"starts_from: {' starts from '.join(names)}, so '{names[-1]}' comes twice: have {source} start from "
                "something else (starts_from), or give it another name"
            )
    return chain[1] if len(chain) > 1 else None


def _passed_on(options: Mapping[str, Any], first: Mapping[str, Any], forced: Sequence[str]) -> list[str]:
    """What the first training is told beside its option file, as entries for ``--force_yml``."""
    passed = [entry for entry in forced if re.split("[:=]", entry.strip())[0] in _SHARED]
    weights = (options.get("path") or {}).get("pretrain_network_float")
    if weights and not (first.get("path") or {}).get("pretrain_network_float"):
        passed.append(f"path:pretrain_network_float={weights}")
    return passed
