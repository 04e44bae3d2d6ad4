"""Networks of the optional package spandrel (MIT), known from their weights and rebuilt from plain options.

spandrel finds the architecture and its hyperparameters in the keys and shapes of a state dict. Both are kept as plain
options, so that a quantized file needs no weights beside its own.
"""

from __future__ import annotations

import logging
import math
import warnings
from collections import Counter
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from importlib import import_module
from types import ModuleType
from typing import Any

import torch
from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.padding import pad_input
from torch import Tensor, nn
from torch.nn.modules.module import register_module_buffer_registration_hook

from qsr_plugin.compat import import_host
from qsr_plugin.errors import UserError, suggest

logger = logging.getLogger("qsr_plugin")

#: Starts of the names of buffers that a constructor computes from the hyperparameters alone.
_INDEX_BUFFERS = ("attn_mask", "relative_position_index", "relative_coords_table", "rpe_biases", "biases_")
_TRIAL_SIDE = 24


class SpandrelError(UserError, ValueError):
    """A network of spandrel that cannot be used here; the message says why and what to do."""


@ARCH_REGISTRY.register(suffix="qsr")
def SpandrelNet(
    architecture: str,
    network: str,
    hyperparameters: Mapping[str, Any],
    upscale: int,
    size: Mapping[str, Any] | None = None,
) -> nn.Module:
    """Build a network of spandrel with fresh weights.

    Args:
        architecture: Name in spandrel's registry, e.g. ``DAT``.
        network: Name of its class, as ``spandrel.architectures.<architecture>`` exports it.
        hyperparameters: Plain values for its constructor.
        upscale: Factor between input and result.
        size: Sizes it takes: ``multiple``, ``minimum`` and ``square`` of :func:`~qsr_plugin.archs.padding.pad_input`.

    Returns:
        The network; it takes and returns (N, 3, H, W), RGB in [0, 1], and pads its input if it must. Its
        ``rebuilt_buffers`` names the buffers that a file of weights may lack.

    Raises:
        SpandrelError: If spandrel is not installed or has no such network.
        TypeError: If the network does not take the hyperparameters.
    """
    net = _network_class(architecture, network)(**hyperparameters)
    if size:
        pad_input(net, upscale, **size)
    net.rebuilt_buffers = frozenset(key for key in net.state_dict() if _is_index(key))
    return net


def recognise_with_spandrel(state: Mapping[str, Tensor]) -> dict[str, Any] | None:
    """Options of the network that a float state dict belongs to.

    Index buffers that the state dict lacks are taken from the constructor. Window sizes can only be read from such
    buffers in some architectures; the usual ones are taken then (DAT and RGT 8x32, CRAFT 4x16), which a log line says.

    Args:
        state: Key names and tensors, without outer level (:func:`qsr_plugin.checkpoint.state_dict_in`).

    Returns:
        ``{"type": "SpandrelNet", ...}`` for :func:`~qsr_plugin.archs.quant_net_arch.build_backbone`, or ``None`` if
        spandrel does not know the network either.

    Raises:
        SpandrelError: If spandrel is not installed, or the network is none for enlarging one RGB image, or its options
            do not rebuild it.
    """
    spandrel = _spandrel()
    state = dict(state)
    assumed = {key: value for key, value in _assumed_buffers(state).items() if key not in state}
    seen = {**state, **_derived_buffers(state), **assumed}
    kinds = spandrel.MAIN_REGISTRY.architectures("detection")
    kind = next((kind.architecture for kind in kinds if kind.detect(seen)), None)
    if kind is None:
        return None
    try:
        with _index_buffers_filled(set(seen) - set(state)), torch.random.fork_rng(devices=[]):
            found = kind.load(seen)
    except Exception as error:  # it reads keys and shapes as it needs them
        reason = str(error).splitlines()[0] if str(error) else ""
        raise SpandrelError(
            f"spandrel takes these weights for {kind.id} and cannot load them ({type(error).__name__}: {reason}). "
            "Check that the file is whole, or build the network yourself and use qsr_plugin.quantize_model"
        ) from None
    _check_purpose(found)
    if missing := Counter(key.rpartition(".")[2] for key in set(found.model.state_dict()) - set(state)):
        names = ", ".join(f"{name} ({number})" for name, number in sorted(missing.items()))
        logger.info("%s: these buffers are not in the file and are computed: %s", kind.id, names)
    if assumed:
        logger.warning(
            "%s: the file does not say the size of its windows; the usual one is taken. If results are poor, give "
            "--arch FILE, a YAML file with network_g of this type, and another size in its 'hyperparameters'.",
            kind.id,
        )
    options = _options_of(found)
    _check_rebuilt(options, found, state)
    return options


def _spandrel() -> ModuleType:
    import_host()  # its repairs come before the import of torchvision
    warnings.filterwarnings("ignore", "torch.meshgrid: in an upcoming release")  # constructors of CRAFT, DAT, RGT, HAT
    try:
        return import_module("spandrel")
    except ImportError as error:
        raise SpandrelError(
            f"this network needs the package spandrel, which does not import ({error}): pip install 'spandrel>=0.4'"
        ) from None


def _network_class(architecture: str, network: str) -> type[nn.Module]:
    """A class that spandrel itself exports; names come from files, so nothing else is ever imported."""
    known = [kind.architecture.id for kind in _spandrel().MAIN_REGISTRY]
    if architecture not in known:
        raise SpandrelError(f"spandrel has no architecture '{architecture}'. {suggest(architecture, known)}")
    classes = _classes(architecture)
    if network not in classes:
        raise SpandrelError(f"spandrel's {architecture} has no network '{network}'. {suggest(network, classes)}")
    return classes[network]


def _classes(architecture: str) -> dict[str, type[nn.Module]]:
    module = import_module(f"spandrel.architectures.{architecture}")
    exported = {name: getattr(module, name) for name in module.__all__}
    return {name: one for name, one in exported.items() if isinstance(one, type) and issubclass(one, nn.Module)}


# -- files without index buffers -------------------------------------------------------------------------------------


def _is_index(key: str) -> bool:
    return key.rpartition(".")[2].startswith(_INDEX_BUFFERS)


def _assumed_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stand-ins for the index buffers that spandrel reads window sizes from; their values are replaced at loading."""
    if "layers.0.blocks.0.attn.attns.0.pos.pos_proj.weight" in state:  # DAT, RGT: windows of 8x32
        biases = torch.zeros((2 * 8 - 1) * (2 * 32 - 1), 2)
        biases[-1] = torch.tensor((8 - 1, 32 - 1))
        index = torch.zeros(8 * 32, 8 * 32)
        attention = "layers.0.blocks.0.attn.attns.0"
        return {f"{attention}.rpe_biases": biases, f"{attention}.relative_position_index": index}
    if "layers.0.residual_group.hf_blocks.0.attn.temperature" in state:  # CRAFT: windows of 4x16
        biases = torch.zeros((2 * 4 - 1) * (2 * 16 - 1), 2)
        return {"relative_position_index_h": torch.zeros(4 * 16, 4 * 16), "biases_v": biases}
    return {}


def _derived_buffers(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Stand-ins whose sizes follow from tables of biases, which every file has: those of SwinIR and HAT."""
    group = "layers.0.residual_group"
    table = state.get(f"{group}.blocks.0.attn.relative_position_bias_table")
    if table is None:
        return {}
    window = (math.isqrt(len(table)) + 1) // 2  # the table has (2 window - 1)^2 rows
    inner, overlap = torch.zeros(window**2, window**2), state.get(f"{group}.overlap_attn.relative_position_bias_table")
    found = {f"{group}.blocks.0.attn.relative_position_index": inner}
    if overlap is not None:  # (window + outer window - 1)^2 rows
        outer = math.isqrt(len(overlap)) + 1 - window
        found = {"relative_position_index_SA": inner, "relative_position_index_OCA": torch.zeros(window**2, outer**2)}
    return {key: value for key, value in found.items() if key not in state}


@contextmanager
def _index_buffers_filled(stand_ins: set[str]) -> Iterator[None]:
    """Networks built inside the ``with`` block take missing index buffers, and ``stand_ins``, from themselves."""

    def fill(module: nn.Module, state: dict[str, Tensor], prefix: str, *_: Any) -> None:
        for name, buffer in module.named_buffers(prefix.rstrip("."), recurse=False):
            if _is_index(name) and (name in stand_ins or name not in state):
                state[name] = buffer

    def watch(module: nn.Module, name: str, buffer: Tensor | None) -> None:
        if _is_index(name):
            module.register_load_state_dict_pre_hook(fill)

    handle = register_module_buffer_registration_hook(watch)
    try:
        yield
    finally:
        handle.remove()


# -- what spandrel found ---------------------------------------------------------------------------------------------


def _check_purpose(found: Any) -> None:
    kind, channels = found.architecture.id, (found.input_channels, found.output_channels)
    if found.purpose != "SR" or channels != (3, 3):
        raise SpandrelError(
            f"spandrel knows this network as {kind}, for {found.purpose} with {channels[0]} channels in and "
            f"{channels[1]} out; only networks that enlarge one RGB image can be quantized here"
        )


def _options_of(found: Any) -> dict[str, Any]:
    kind, model, needs = found.architecture.id, found.model, found.size_requirements
    network = next((name for name, one in _classes(kind).items() if one is type(model)), None)
    if network is None or not hasattr(model, "hyperparameters"):
        raise SpandrelError(
            f"spandrel does not say how its {kind} ({type(model).__name__}) is built: build the network yourself and "
            "use qsr_plugin.quantize_model"
        )
    size = {"multiple": needs.multiple_of, "minimum": max(1, needs.minimum), "square": needs.square}
    options = {
        "type": "SpandrelNet",
        "architecture": str(kind),
        "network": network,
        "hyperparameters": {key: _plain(value) for key, value in model.hyperparameters.items() if _is_plain(value)},
        "upscale": int(found.scale),
    }
    return options if size == {"multiple": 1, "minimum": 1, "square": False} else {**options, "size": size}


def _is_plain(value: Any) -> bool:
    """Whether a value can stand in a file; what cannot, such as a class of layers, is left to the default."""
    if isinstance(value, (list, tuple)):
        return all(_is_plain(one) for one in value)
    return value is None or isinstance(value, (bool, int, float, str))


def _plain(value: Any) -> Any:
    return [_plain(one) for one in value] if isinstance(value, (list, tuple)) else value


def _check_rebuilt(options: Mapping[str, Any], found: Any, state: Mapping[str, Tensor]) -> None:
    """Build the network from its options, load the weights, and compare the results on a small image."""
    kind, run = options["architecture"], {key: value for key, value in options.items() if key != "type"}
    with torch.random.fork_rng(devices=[]):
        net = SpandrelNet(**run).eval()
    expected = net.state_dict()
    strange = sorted(set(state) ^ (set(expected) - (net.rebuilt_buffers - set(state))))
    if strange:
        raise SpandrelError(
            f"spandrel renames keys of these weights ({', '.join(strange[:3])}, ...) to fit its {kind}. Load them "
            "there (spandrel.ModelLoader().load_from_file), save model.state_dict() and use that file"
        )
    net.load_state_dict({**expected, **state})
    image = torch.rand(1, 3, _TRIAL_SIDE, _TRIAL_SIDE, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        out, want = net(image), found(image)
    if not isinstance(out, Tensor) or out.shape != want.shape or not torch.allclose(out.clamp(0, 1), want, atol=1e-5):
        raise SpandrelError(
            f"spandrel's {kind} cannot be rebuilt from its hyperparameters, or its forward does not return the image "
            "alone: build the network yourself and use qsr_plugin.quantize_model"
        )
