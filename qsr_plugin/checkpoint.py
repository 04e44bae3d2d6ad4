"""Reading and writing weights: safe, strict and atomic.

Nothing here ever runs code from a file: ``.safetensors`` holds only tensors and text, and other files go through
PyTorch's weights-only reader.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Union

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save as safetensors_bytes
from torch import Tensor, nn

from qsr_plugin import __version__
from qsr_plugin.atomic import check_writable, write_atomically
from qsr_plugin.errors import UserError
from qsr_plugin.foreign_files import foreign_kind
from qsr_plugin.quant.recipe import RecipeError
from qsr_plugin.quant.surgery import persistent_state, plugin_keys, rebuilt_buffers, with_rebuilt

logger = logging.getLogger("qsr_plugin")

#: Of files with quantized networks.
ENDING = ".safetensors"
#: Layouts of our files, of plain and of packed weights; raised when an older reader could misread a newer file.
FORMAT, PACKED_FORMAT = 1, 2
_SUFFIX_HELP = "expected a state dict saved as .pth (torch.save of tensors) or .safetensors"


class CheckpointError(UserError, RuntimeError):
    """A file that cannot be used as weights; the message names the file, what is wrong and what to do."""


# -- writing ---------------------------------------------------------------------------------------------------------


def save_torch(data: Mapping[str, Any], path: Union[str, Path]) -> None:
    """``torch.save``, atomically."""
    write_atomically(path, lambda temporary: torch.save(dict(data), temporary))


def save_quantized(net: nn.Module, path: Union[str, Path]) -> None:
    """Save a quantized network as one ``.safetensors`` file that :func:`load_quantized` rebuilds without any YAML.

    The state dict is stored as it is (float master weights and ranges); the metadata holds backbone options, recipe,
    scale and plugin version.

    Args:
        net: Network from :func:`qsr_plugin.quantize_model` or ``QuantNet``.
        path: Ends in ``.safetensors``.

    Raises:
        CheckpointError: If the network is not quantized or its constructor's arguments are not known.
        OSError: If the file cannot be written.
    """
    check_quantized_path(path)
    if getattr(net, "recipe", None) is None:
        raise CheckpointError(f"{type(net).__name__} is not quantized: call quantize_model(net, recipe) first")
    if getattr(net, "folded", False):
        raise CheckpointError(
            "the weights of this network are folded (qsr_plugin.fold, or a packed file), it has no float ones to save. "
            "Use qsr_plugin.deploy.packed.save_packed, or the network it was folded from"
        )
    data = serialized(net)
    write_atomically(path, lambda temporary: temporary.write_bytes(data))
    from qsr_plugin.archs.quant_net_arch import registered_name

    kind = str(backbone_of(net).get("type"))
    if registered_name(kind) is None:
        told = "%s can be read only where '%s' is registered: put @ARCH_REGISTRY.register() above that class"
        logger.warning(told, path, kind)


def serialized(net: nn.Module) -> bytes:
    """What :func:`save_quantized` writes of a quantized network."""
    tensors = {key: value.detach().cpu().contiguous().clone() for key, value in persistent_state(net).items()}
    return safetensors_bytes(tensors, metadata=metadata_of(net))


def check_quantized_path(path: Union[str, Path]) -> None:
    """Refuse a path that :func:`save_quantized` could not write, before work is done for it.

    Raises:
        CheckpointError: For another ending.
        OSError: If the folder cannot be made or written.
    """
    if Path(path).suffix != ENDING:
        raise CheckpointError(f"'{path}': quantized networks are saved as {ENDING}; change the ending")
    check_writable(path)


def backbone_of(net: nn.Module) -> dict[str, Any]:
    """Type and constructor arguments of a network: what it was built from, or what its layers tell.

    Raises:
        CheckpointError: If neither says it.
    """
    known = getattr(net, "backbone_options", None)
    if known is not None:
        return known
    from qsr_plugin.archs.describe import describe_backbone

    return describe_backbone(net)


def metadata_of(net: nn.Module) -> dict[str, str]:
    """Text that goes with a quantized network's tensors."""
    backbone = backbone_of(net)
    return {
        "format": str(FORMAT),
        "qsr_plugin": __version__,
        "backbone": json.dumps(backbone),
        "recipe": json.dumps(net.recipe.to_dict()),
        "scale": str(backbone.get("upscale", backbone.get("scale", ""))),
    }


# -- reading ---------------------------------------------------------------------------------------------------------


def read_file(path: Union[str, Path]) -> tuple[dict[str, Any], dict[str, str]]:
    """Read a checkpoint without running any code from it.

    Returns:
        The file's content (tensors, possibly nested under ``params``) and its metadata (empty for ``.pth``).

    Raises:
        CheckpointError: For a missing, damaged, foreign or unsafe file.
    """
    path = Path(path).expanduser()
    if not path.is_file():
        raise CheckpointError(f"{path} does not exist; {_SUFFIX_HELP}")
    if path.suffix == ".safetensors":
        try:
            with safe_open(path, framework="pt") as file:
                return {key: file.get_tensor(key) for key in file.keys()}, dict(file.metadata() or {})
        except (SafetensorError, OSError) as error:
            raise CheckpointError(f"{path} is not a readable safetensors file ({error}): get it again") from None
    kind = foreign_kind(path)
    if kind:
        raise CheckpointError(f"{path} is {kind}; {_SUFFIX_HELP}")
    try:
        content = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # the reader raises many kinds for damaged files
        if "Weights only load failed" in str(error) and "Unsupported operand" not in str(error):
            raise CheckpointError(
                f"{path} holds Python objects, not only tensors, and was not opened: they could run code. In the "
                "program that made it, save net.state_dict() instead of the network itself."
            ) from None
        kind = type(error).__name__
        raise CheckpointError(
            f"{path} is no PyTorch file, or damaged or cut short ({kind}): get or save it again"
        ) from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}; {_SUFFIX_HELP}")
    return dict(content), {}


def state_dict_in(content: Mapping[str, Any], path: Union[str, Path], prefer: str = "params_ema") -> dict[str, Tensor]:
    """Find the state dict in a checkpoint: under ``params_ema`` or ``params``, or bare; ``module.`` is stripped.

    Args:
        content: What :func:`read_file` returned.
        path: For messages.
        prefer: Which of the two keys to take when both are there.

    Raises:
        CheckpointError: If there are no tensors in it, or it is a packed file.
    """
    keys = [prefer, "params_ema", "params"]
    state = next((content[key] for key in keys if isinstance(content.get(key), Mapping)), content)
    tensors = {key: value for key, value in state.items() if isinstance(value, Tensor) and isinstance(key, str)}
    if any(key.endswith(".weight.codes") for key in tensors):
        raise CheckpointError(
            f"{path} is a packed file, its weights are quantized for good: use qsr_plugin.load_quantized(path), or "
            "give the file it was packed from"
        )
    if not tensors or len(tensors) != len(state):
        odd = ", ".join(sorted({str(key) for key in state if key not in tensors})[:3]) or "none, it is empty"
        raise CheckpointError(f"{path} is not a state dict (entries: {odd}); {_SUFFIX_HELP}")
    return {key[7:] if key.startswith("module.") else key: value for key, value in tensors.items()}


def float_state(path: Union[str, Path], prefer: str = "params_ema") -> dict[str, Tensor]:
    """The state dict of a float checkpoint, see :func:`state_dict_in`.

    Raises:
        CheckpointError: If there is none in it, or that of a quantized network.
    """
    content, metadata = read_file(path)
    state = state_dict_in(content, path, prefer)
    if "recipe" in metadata or any("_quantizer." in key for key in state):
        raise CheckpointError(
            f"{path} is a quantized checkpoint, a float one is wanted here. Use it as path.pretrain_network_g in an "
            "option file, or qsr_plugin.load_quantized(path)."
        )
    return state


def load_float_weights(net: nn.Module, path: Union[str, Path], prefer: str = "params_ema") -> int:
    """Load a float checkpoint into a float or quantized network; every float key must be there, none may be left over.

    Args:
        net: Network; keys of its quantizers and bit policies are left alone.
        path: ``.pth`` or ``.safetensors`` of the float network.
        prefer: See :func:`state_dict_in`.

    Returns:
        Number of keys loaded, all of them.

    Raises:
        CheckpointError: On any missing, unexpected or differently shaped key; nothing is changed then.
    """
    state, own = float_state(path, prefer), net.state_dict()
    added = plugin_keys(net) | (rebuilt_buffers(net) - set(state))  # index tables that files may leave out
    expected = {key: value for key, value in own.items() if key not in added}
    problems = key_differences(expected, state)
    if problems:
        kind = getattr(net, "float_class", type(net))
        raise CheckpointError(
            f"{path} does not fit {kind.__name__} ({len(problems)} differences, the network has {len(expected)} keys); "
            "nothing was loaded. Check backbone type, sizes and scale. First differences:\n  "
            + "\n  ".join(_some_of_each(problems))
        )
    net.load_state_dict({**own, **state})
    logger.info("loaded %d of %d keys of the float network from %s", len(state), len(expected), path)
    return len(state)


def _some_of_each(problems: Sequence[str], most: int = 4) -> list[str]:
    """The first of every kind: what is missing, what is unexpected, what has another shape."""
    kinds: dict[str, list[str]] = {}
    for line in problems:
        kinds.setdefault(line.partition(":")[0], []).append(line)
    shown = [line for lines in kinds.values() for line in lines[: most if len(kinds) > 1 else 2 * most]]
    return [*shown, *([f"and {len(problems) - len(shown)} more"] if len(problems) > len(shown) else [])]


def key_differences(expected: Mapping[str, Tensor], found: Mapping[str, Tensor]) -> list[str]:
    """Readable list of missing, unexpected and differently shaped keys."""
    lines = [f"missing: {key} {tuple(expected[key].shape)}" for key in expected if key not in found]
    lines += [f"unexpected: {key} {tuple(found[key].shape)}" for key in found if key not in expected]
    for key in expected:
        if key in found and expected[key].shape != found[key].shape:
            lines.append(f"shape: {key} is {tuple(found[key].shape)}, the network wants {tuple(expected[key].shape)}")
    return lines


def load_quantized(path: Union[str, Path]) -> nn.Module:
    """Rebuild a quantized network from a file, in evaluation mode on the CPU.

    Args:
        path: ``.safetensors`` of :func:`save_quantized`, or of :func:`qsr_plugin.deploy.packed.save_packed`: then its
            weights are quantized for good (:func:`qsr_plugin.fold`).

    Raises:
        CheckpointError: If the file is no such file, is damaged, or was written by a newer version.
    """
    content, metadata = read_file(path)
    if not {"backbone", "recipe", "format"} <= set(metadata):
        raise CheckpointError(
            f"{path} has no recipe in it: it was not written by save_quantized. Of float weights 'qsr quantize FILE' "
            "makes a quantized file (in Python: load_float_weights, quantize_model); a training's net_g_*.pth needs "
            "its option file."
        )
    if metadata["format"] not in (str(FORMAT), str(PACKED_FORMAT)):
        raise CheckpointError(
            f"{path} was written by qsr_plugin {metadata.get('qsr_plugin')} in format {metadata['format']}, this is "
            f"{__version__} (formats up to {PACKED_FORMAT}): use that version, or update qsr_plugin"
        )
    from qsr_plugin.compat import import_host

    import_host()
    from qsr_plugin.archs.quant_net_arch import QuantNet
    from qsr_plugin.options_file import path_in

    try:
        described = [json.loads(metadata[key]) for key in ("backbone", "recipe")]
        if other := path_in(described):
            raise ValueError(f"it names another file, '{other}', which a checkpoint never needs: do not trust it")
        net = QuantNet(*described)
    except (RecipeError, ValueError, TypeError) as error:
        raise CheckpointError(f"{path} cannot be rebuilt: {error}") from None
    if metadata["format"] == str(PACKED_FORMAT):
        from qsr_plugin.deploy.packed import unpacked

        content = unpacked(net, content, metadata, path)
    problems = key_differences(net.state_dict(), state := with_rebuilt(net, content))
    if problems:
        raise CheckpointError(f"{path} does not hold the network it describes:\n  " + "\n  ".join(problems[:8]))
    net.load_state_dict(state)
    return net.eval()
