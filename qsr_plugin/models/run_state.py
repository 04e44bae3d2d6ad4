"""Saving and resuming a run: nothing half written, nothing forgotten, nothing mixed up."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from basicsr.utils.dist_util import master_only

from qsr_plugin import checkpoint
from qsr_plugin.options_file import OptionsError
from qsr_plugin.quant.recipe import RecipeError, load_recipe

_LONGEST = 80  # letters of a value in a message; tables of bits are longer than a screen


class RunState:
    """Mixin of the model: checkpoints in the host's layout beside ``.safetensors``, and exact training states."""

    @master_only
    def save_network(self, net, net_label: str, current_iter: int, param_key="params") -> None:
        """Write ``.pth`` in the host's layout and ``.safetensors`` with the recipe (EMA if there is one), atomically.

        Raises:
            OSError: If a file cannot be written.
        """
        nets, keys = (net, param_key) if isinstance(net, list) else ([net], [param_key])
        name = "latest" if current_iter == -1 else current_iter
        path = Path(self.opt["path"]["models"]) / f"{net_label}_{name}.pth"
        states = {key: self.get_bare_model(one).state_dict() for key, one in zip(keys, nets)}
        checkpoint.save_quantized(self.get_bare_model(nets[-1]), path.with_suffix(".safetensors"))
        checkpoint.save_torch({key: {k: v.cpu() for k, v in state.items()} for key, state in states.items()}, path)

    @master_only
    def save_training_state(self, epoch: int, current_iter: int) -> None:
        """Write optimiser, schedulers, stage, seed, recipe and best scores, atomically.

        Raises:
            OSError: If the file cannot be written.
        """
        if current_iter == -1:
            return
        state = {
            "epoch": epoch,
            "iter": current_iter,
            "optimizers": [optimizer.state_dict() for optimizer in self.optimizers],
            "schedulers": [scheduler.state_dict() for scheduler in self.schedulers],
            "stage": self.stage_index,
            "manual_seed": self.opt["manual_seed"],
            "world_size": self.opt["world_size"],
            "recipe": self.recipe.to_dict(),
            "best_metric_results": self._best_scores(),
        }
        checkpoint.save_torch(state, Path(self.opt["path"]["training_states"]) / f"{current_iter}.state")

    def _best_scores(self) -> dict[str, Any]:
        """Best validation scores as plain numbers; the host's are NumPy scalars, which no safe reader takes."""
        best = getattr(self, "best_metric_results", {})
        return {
            name: {metric: {**entry, "val": float(entry["val"])} for metric, entry in metrics.items()}
            for name, metrics in best.items()
        }

    def resume_training(self, resume_state: dict[str, Any]) -> None:
        """Continue a run exactly where its state was saved.

        Raises:
            OptionsError: If recipe or number of processes differ from those of the saved run.
        """
        self._check_same_run(resume_state)
        super().resume_training(resume_state)
        self._enter_stage(self.schedule.index_at(resume_state["iter"]), set_learning_rates=False)
        if resume_state.get("best_metric_results"):
            self.best_metric_results = resume_state["best_metric_results"]

    def _check_same_run(self, state: dict[str, Any]) -> None:
        if state.get("world_size", self.opt["world_size"]) != self.opt["world_size"]:
            raise OptionsError(
                f"the run was saved with {state['world_size']} process(es), this is {self.opt['world_size']}: start it "
                "with the same number"
            )
        if "recipe" not in state or self.opt.get("allow_recipe_change"):
            return
        changed = changed_keys(completed(state["recipe"]), self.recipe.to_dict())
        if changed:
            raise OptionsError(
                "the recipe differs from that of the saved run:\n  " + "\n  ".join(changed) + "\nUse the saved recipe, "
                "another name for a new run, or --allow-recipe-change"
            )


def completed(recipe: dict[str, Any]) -> dict[str, Any]:
    """A saved recipe with today's defaults for what it does not say; one that cannot be read any more as it is."""
    try:
        return load_recipe(recipe).to_dict()
    except RecipeError:
        return recipe


def changed_keys(old: Any, new: Any, path: str = "recipe") -> list[str]:
    """Dotted keys in which two plain structures differ, with both values, long ones cut."""
    if isinstance(old, dict) and isinstance(new, dict):
        keys = [*old, *(key for key in new if key not in old)]
        return [line for key in keys for line in changed_keys(old.get(key), new.get(key), f"{path}.{key}")]
    if isinstance(old, list) and isinstance(new, list) and len(old) == len(new):
        return [line for i, pair in enumerate(zip(old, new)) for line in changed_keys(*pair, f"{path}[{i}]")]
    return [] if old == new else [f"{path}: saved {_short(old)}, now {_short(new)}"]


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= _LONGEST else f"{text[: _LONGEST - 3]}..."
