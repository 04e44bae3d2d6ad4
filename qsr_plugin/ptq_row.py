"""One row of a table of post-training methods, made in a process of its own: ``python -m qsr_plugin.ptq_row JOB ROW``.

A crash there costs one row, and the peak of its memory is that of one method. The table is in
:mod:`qsr_plugin.ptq_table`.
"""

from __future__ import annotations

import hashlib
import json
import sys
import traceback
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Optional

from qsr_plugin import compat
from qsr_plugin.data.images import list_images
from qsr_plugin.own_modules import import_own
from qsr_plugin.report.result_schema import (
    FLOAT,
    CalibrationImages,
    Costs,
    Quality,
    Result,
    of_backbone,
    package_versions,
)


@dataclass(frozen=True)
class Crops:
    """Calibration images, the same for all methods.

    Attributes:
        folder: Images of any sizes.
        reduce: Factor they are reduced by first: the network's scale for HR photos, 1 for LR images.
        side: Side of a crop in LR pixels.
        images: How many files are drawn.
        seed: Of the draw.
    """

    folder: str
    reduce: int
    side: int
    images: int
    seed: int


@dataclass(frozen=True)
class Job:
    """All that a row depends on.

    Attributes:
        network: What the float network is called.
        backbone: Its type and arguments.
        weights: File of its float weights.
        scale: Its up-sampling factor.
        tests: Name of a test set to its folders, high and low resolution.
        threads: CPU threads.
        device: Where networks run, as PyTorch names it.
        method: What the recipe is called; empty for the float network itself, as all that follows.
        recipe: As plain data, before bits and placement are chosen.
        bits: Like ``W4A4``.
        placement: Key of the recipe's placements.
        crops: What the ranges are found on.
        imports: Files or modules of the user that register the network.
    """

    network: str
    backbone: Mapping[str, Any]
    weights: str
    scale: int
    tests: Mapping[str, tuple[str, str]]
    threads: int = 1
    device: str = "cpu"
    method: str = ""
    recipe: Optional[Mapping[str, Any]] = None
    bits: str = ""
    placement: str = ""
    crops: Optional[Crops] = None
    imports: Sequence[str] = ()

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON; :meth:`read` reads it back."""
        return asdict(self)

    @classmethod
    def read(cls, data: Mapping[str, Any]) -> Job:
        """A job from plain data."""
        return cls(**{**data, "crops": data["crops"] and Crops(**data["crops"])})

    def origin(self) -> dict[str, Any]:
        """What its row is made from, as plain data: contents instead of names and paths.

        Folders are told by names and sizes of their images, weights and files of the user by their content.

        Raises:
            ValueError: For a folder without images.
            OSError: If the weights cannot be read.
        """
        data = self.to_dict()
        del data["network"], data["method"], data["imports"]
        if self.imports:
            data["imports"] = [_digest_of_file(one) if Path(one).is_file() else one for one in self.imports]
        data["weights"] = _digest_of_file(self.weights)
        data["tests"] = {name: [_digest_of_folder(one) for one in pair] for name, pair in self.tests.items()}
        if self.crops is not None:
            data["crops"]["folder"] = _digest_of_folder(self.crops.folder)
        return json.loads(json.dumps(data))

    def key(self) -> str:
        """Short name of the origin."""
        return key_of(self.origin())

    @property
    def label(self) -> str:
        """Everything that tells its row from others."""
        return " ".join(part for part in (self.network, self.method or FLOAT, self.bits, self.placement) if part)

    def result(self) -> Result:
        """The row as it is before anything is known."""
        method = self.method or FLOAT
        told = {"bits": self.bits, "placement": self.placement, "weights": self.weights}
        label = f"{method} {self.bits}" if self.bits else method
        made = {**of_backbone(self.backbone), "scale": self.scale}
        return Result(label=label, method=method, network=self.network, **told, **made)


def key_of(origin: Mapping[str, Any]) -> str:
    """Short name of what a row is made from. Of the placements of its recipe only its own counts."""
    if recipe := origin.get("recipe"):
        recipe = _with_defaults(recipe)
        own = recipe["placements"].get(origin["placement"])
        origin = {**origin, "recipe": {**recipe, "placement": None, "placements": own}}
    return hashlib.sha256(json.dumps(origin, sort_keys=True).encode()).hexdigest()[:16]


def _with_defaults(recipe: Mapping[str, Any]) -> Mapping[str, Any]:
    """The recipe of an older version with the keys that are new since then; as it is where it is none any more."""
    from qsr_plugin.quant.recipe import RecipeError, load_recipe

    try:
        return load_recipe(recipe).to_dict()
    except RecipeError:
        return recipe


@lru_cache
def _digest_of_file(path: str) -> str:
    return hashlib.sha256(Path(path).read_bytes()).hexdigest()[:16]


@lru_cache
def _digest_of_folder(path: str) -> str:
    images = [(image.name, image.stat().st_size) for image in list_images(path)]
    return hashlib.sha256(json.dumps(images).encode()).hexdigest()[:16]


def make_row(job: Job) -> Result:
    """Quantize, calibrate and tune as the job says, then score and count. Call it in a process of its own.

    Args:
        job: What to do.

    Raises:
        UserError: For anything in it that cannot be used, and whatever else a method raises.
    """
    import torch

    from qsr_plugin.memory import keep_freed_memory, peak_memory
    from qsr_plugin.report.complexity import complexity
    from qsr_plugin.report.evaluate import check_pairs, evaluate, find_pairs

    torch.set_num_threads(job.threads)
    for hr, lr in job.tests.values():
        check_pairs(find_pairs(hr, lr, job.scale), job.scale)  # before work is done for them
    device = torch.device(job.device)
    if job.recipe is None:
        net, made = _float_network(job).to(device), {}
    else:
        torch.manual_seed(job.crops.seed)
        keep_freed_memory()  # as the command line does
        net, made = _post_trained(job, device)
        made["peak_memory"] = peak_memory(device)
    results = {name: evaluate(net, hr, lr, job.scale) for name, (hr, lr) in job.tests.items()}
    costs = complexity(net, bits=next(iter(results.values())).place_bits)
    figures = {
        "quality": {name: Quality.of(one, by_image=False) for name, one in results.items()},
        "costs": Costs.of(costs, sites=False),
        "versions": package_versions(),
    }
    return job.result().model_copy(update={**figures, **made})


def _float_network(job: Job) -> Any:
    from qsr_plugin.archs.quant_net_arch import build_backbone
    from qsr_plugin.checkpoint import load_float_weights

    net = build_backbone(dict(job.backbone))
    load_float_weights(net, job.weights)
    return net.eval()


def _post_trained(job: Job, device: Any) -> tuple[Any, dict[str, Any]]:
    """The network, and how it was made, as keywords of a result."""
    from qsr_plugin.data.calibration_set import crops_from_folder
    from qsr_plugin.options_file import parse_bits
    from qsr_plugin.post_training import post_train
    from qsr_plugin.quant.recipe import load_recipe
    from qsr_plugin.report.complexity import method_label

    weight_bits, act_bits = parse_bits(job.bits)
    recipe = load_recipe(job.recipe, weight_bits=weight_bits, act_bits=act_bits, placement=job.placement)
    given, used = job.crops, []
    drawn = {"images": given.images, "scale": given.reduce, "side": given.side, "seed": given.seed, "used": used}
    crops = crops_from_folder(given.folder, batch=recipe.calibration.batch, **drawn)
    made = post_train(_float_network(job).to(device), recipe, [batch.to(device) for batch in crops])
    images = {"reduced": given.reduce, "images": len(used), "names": tuple(used), "side": given.side}
    return made.net, {
        "label": job.method + method_label(made.recipe).removeprefix(made.recipe.method),
        "recipe": made.recipe.to_dict(),
        "tuned": recipe.tuning is not None,
        "seed": given.seed,
        "calibration": CalibrationImages(folder=given.folder, seed=given.seed, **images),
        "seconds": dict(made.seconds),
        "details": {"fragile": list(made.fragile)},
    }


def main(job_file: str, row_file: str) -> None:
    """Read a job, write its row; one that fails says why, and its traceback goes to the standard error."""
    from qsr_plugin.report.result_io import write_results

    compat.import_host()
    job = Job.read(json.loads(Path(job_file).read_text("utf-8")))
    try:
        for name in job.imports:
            import_own(name)
        row = make_row(job)
    except Exception as error:  # whatever it is, the table says it
        traceback.print_exc()
        row = job.result().model_copy(update={"note": f"{type(error).__name__}: {error}"})
    write_results(row, row_file)


if __name__ == "__main__":
    main(*sys.argv[1:])
