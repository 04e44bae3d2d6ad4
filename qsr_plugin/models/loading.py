"""Where a run's network comes from: a quantized checkpoint, or float weights and a calibration."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn

from qsr_plugin import checkpoint
from qsr_plugin.data.calibration_set import calibration_batches
from qsr_plugin.models.run_state import changed_keys, completed
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.policy import PolicyPart
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import quantizers, with_rebuilt

logger = logging.getLogger("basicsr")


class Loading:
    """Mixin of the model: reads ``path.pretrain_network_g``, or ``path.pretrain_network_float`` and calibrates."""

    def load_network(self, net: nn.Module, load_path: str, strict: bool = True, param_key: str = "params") -> None:
        """Load a quantized checkpoint, ``.pth`` of a training or ``.safetensors``, strictly."""
        net = self.get_bare_model(net)
        content, metadata = checkpoint.read_file(load_path)
        self._compare_recipes(net.recipe, metadata, load_path)
        state = with_rebuilt(net, checkpoint.state_dict_in(content, load_path, prefer=param_key or "params"))
        problems = checkpoint.key_differences(net.state_dict(), state)
        if problems and not any("_quantizer." in key for key in state):
            raise checkpoint.CheckpointError(
                f"path.pretrain_network_g: {load_path} is a float checkpoint. Give it as path.pretrain_network_float."
            )
        if problems:
            raise checkpoint.CheckpointError(
                f"path.pretrain_network_g: {load_path} does not fit recipe and backbone:\n  "
                + "\n  ".join(problems[:8])
                + _slimmed(json.loads(metadata.get("recipe", "{}")))
            )
        net.load_state_dict(state)
        logger.info("Loaded %d of %d keys from %s [%s].", len(state), len(state), load_path, param_key)

    def _compare_recipes(self, own: Recipe, metadata: dict[str, str], load_path: str) -> None:
        """A checkpoint of other bits fits every key, and would give plausible scores of the wrong network."""
        if "recipe" not in metadata:
            return
        saved, wanted = completed(json.loads(metadata["recipe"])), own.to_dict()
        parts = ("method", "bits", "placement", "placements", "quantizers", "policy", "depth")
        changed = changed_keys({key: saved.get(key) for key in parts}, {key: wanted.get(key) for key in parts})
        if changed and not self.is_train:
            raise checkpoint.CheckpointError(
                f"path.pretrain_network_g: {load_path} was made with another recipe:\n  "
                + "\n  ".join(changed[:8])
                + _slimmed(saved)
            )
        for line in changed:
            logger.warning("%s starts from another recipe: %s", load_path, line)

    def _prepare_network(self) -> None:
        """Float weights and ranges, unless a quantized checkpoint brought both."""
        path = self.opt["path"]
        if path.get("pretrain_network_g"):
            return
        if path.get("pretrain_network_quantized"):
            adopt(self.net, path["pretrain_network_quantized"])
            if getattr(getattr(self.net, "bit_policy", None), "needs_calibration", False):
                calibrate(self.net, calibration_batches(self.opt, self.recipe.calibration), ranges=False)
            return
        float_path = path.get("pretrain_network_float")
        if float_path:
            checkpoint.load_float_weights(self.net, float_path)
        else:
            logger.warning("path.pretrain_network_float is not set: the float weights are random.")
        if any(quantizer.needs_calibration for _, quantizer in quantizers(self.net)):
            calibrate(self.net, calibration_batches(self.opt, self.recipe.calibration))


def adopt(net: nn.Module, path: str) -> None:
    """Start a network from one of the same backbone that was quantized otherwise: weights and ranges, not policies.

    A range that served all bit widths, or the only one, becomes that of every candidate. A file that says its recipe
    must have the same quantizers, and ranges of one width or of the same candidates.

    Args:
        net: Network whose quantizers are of the same classes at the same places.
        path: Quantized ``.safetensors`` or ``.pth``.

    Raises:
        CheckpointError: If weights or ranges are missing, left over, of another shape or for other bits or quantizers;
            nothing is changed then.
    """
    content, metadata = checkpoint.read_file(path)
    recipe = _recipe_in(metadata)
    state, problems = adopted(net, checkpoint.state_dict_in(content, path), recipe)
    if problems:
        raise checkpoint.CheckpointError(
            f"path.pretrain_network_quantized: {path} does not fit recipe and backbone:\n  " + "\n  ".join(problems[:8])
        )
    if recipe is not None:
        saved, wanted = recipe.to_dict(), net.recipe.to_dict()
        for line in (
            *changed_keys(saved["bits"]["weight"], wanted["bits"]["weight"], "recipe.bits.weight"),
            *changed_keys(saved["quantizers"], wanted["quantizers"], "recipe.quantizers"),
        ):
            logger.warning("%s starts from another recipe: %s", path, line)
    net.load_state_dict(state)
    logger.info("Start from the weights and ranges of %s.", path)


def adopted(net: nn.Module, found: Mapping[str, Tensor], recipe: Recipe | None) -> tuple[dict[str, Tensor], list[str]]:
    """What a network's state becomes when it starts from another one's; see :func:`adopt`.

    Args:
        net: Network that starts; it is not changed.
        found: State dict of the other one.
        recipe: The other one's recipe, if it is known.

    Returns:
        The state, and what stands against it, line by line.
    """
    own = net.state_dict()
    learned = {name for name, module in net.named_modules() if isinstance(module, PolicyPart)}
    state = {key: own[key] for key in own if any(key.startswith(f"{name}.") for name in learned)}
    for key, value in with_rebuilt(net, found).items():
        if key in own and key not in state:
            state[key] = value.expand_as(own[key]) if value.dim() == 0 else value
        elif key not in own and "_policy." not in key:
            state[key] = value
    problems = [] if recipe is None else _other_meaning(recipe, net.recipe)
    return state, problems + checkpoint.key_differences(own, state)


def _other_meaning(saved: Recipe, wanted: Recipe) -> list[str]:
    """Differences of two recipes that may leave every key and shape as it is and yet make other ranges of them."""
    lines = []
    if isinstance(saved.act_widths, tuple) and saved.act_widths != wanted.act_widths:
        lines.append(f"bits.act: its ranges are for {saved.act_widths}, the recipe wants {wanted.act_widths}")
    for role in ("act", "weight"):
        kinds = [getattr(recipe.quantizers, role).type for recipe in (saved, wanted)]
        if kinds[0] != kinds[1]:
            lines.append(f"quantizers.{role}: it has '{kinds[0]}', the recipe wants '{kinds[1]}'")
    return lines


def _recipe_in(metadata: Mapping[str, str]) -> Recipe | None:
    """The recipe a file says it was made with; none if it says none, or one that cannot be read any more."""
    try:
        return load_recipe(json.loads(metadata["recipe"])) if "recipe" in metadata else None
    except RecipeError:
        return None


def _slimmed(recipe: dict[str, Any]) -> str:
    """What to write into the options for a file of a slimmed network; nothing for others."""
    kept = (recipe.get("depth") or {}).get("kept")
    return f"\nThis file holds a slimmed network: write recipe: {{depth: {{kept: {list(kept)}}}}}" if kept else ""
