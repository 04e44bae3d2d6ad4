"""Options of the trainings that compare methods: what they share, and what follows from a recipe.

Schedules are fitted to the length by :mod:`qsr_plugin.report.shortening`; optimiser and decay are the same for all; the
losses stay those of the recipes.
"""

from __future__ import annotations

import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from qsr_plugin.archs.quant_net_arch import build_backbone
from qsr_plugin.errors import UserError, suggest
from qsr_plugin.options_file import assemble, backbone_options, options_folder, parse_bits, scale_of, write_options
from qsr_plugin.quant.recipe import list_methods, load_recipe
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.report.shortening import Budget, shortened

#: Placement of ``same``: which every recipe has, and which quantizes the same places in all of them.
COMMON_PLACEMENT = "body"
_DATABASES = {"dataroot_gt": "GT", "dataroot_lq": "LQ"}


class ComparisonError(UserError, ValueError):
    """Runs that cannot be compared with each other."""


@dataclass(frozen=True)
class Settings:
    """What all trainings of a comparison share.

    Attributes:
        backbone: Shipped backbone, or a YAML file with a ``network_g`` block.
        weights: Float weights: the start of every training, and the teacher.
        data: Folder with ``GT.lmdb`` and ``LQ.lmdb``.
        tests: Name of a test set to its folders, high and low resolution.
        iters: Length of every training.
        batch: Images per batch.
        lq_size: Side of the low-resolution crops.
        placement: ``published``, or ``same`` for :data:`COMMON_PLACEMENT` in all of them.
        weights_lr: Learning rate of the weights; the published ones if ``None``.
        milestones: Shares of the length after which all learning rates are halved.
        seed: Of data order and random numbers.
        freeze_batch_norm: In all stages of all methods, see :class:`~qsr_plugin.quant.schema.Stage`.
    """

    backbone: str
    weights: Path
    data: Path
    tests: Mapping[str, tuple[Path, Path]]
    iters: int
    batch: int = 16
    lq_size: int = 48
    placement: str = "published"
    weights_lr: float | None = None
    milestones: tuple[float, ...] = (0.5, 0.75)
    seed: int = 0
    freeze_batch_norm: bool = False

    def to_dict(self) -> dict[str, Any]:
        """Plain data for JSON."""
        return json.loads(json.dumps(asdict(self), default=str))


def static_methods() -> list[str]:
    """Shipped recipes with which the host trains weights at one fixed bit width."""
    recipes = {name: load_recipe(name) for name in list_methods()}
    return [name for name, recipe in recipes.items() if _trains(recipe) and isinstance(recipe.act_widths, int)]


def _trains(recipe: Recipe) -> bool:
    return recipe.tuning is None and any("weights" in stage.train for stage in recipe.stages)


def check_jobs(jobs: Sequence[tuple[str, str]]) -> None:
    """Refuse methods there are none of, and trainings that would write over each other.

    Args:
        jobs: Method (shipped recipe, or a recipe file) and bits of every training.

    Raises:
        ComparisonError: If a method is unknown, or two trainings have one name.
    """
    for method, _ in jobs:
        if Path(method).suffix in (".yml", ".yaml"):
            if not Path(method).is_file():
                raise ComparisonError(f"recipe file {method} does not exist")
        elif method not in list_methods():
            raise ComparisonError(f"unknown method '{method}'. {suggest(method, list_methods())}")
    taken: dict[str, tuple[str, str]] = {}
    for job in jobs:
        other = taken.setdefault(run_name(*job), job)
        if other != job:
            raise ComparisonError(
                f"{' '.join(other)} and {' '.join(job)} would both be kept as {run_name(*job)}: give one recipe file "
                "another name, or compare them in folders of their own"
            )


def published_iterations(method: str, backbone: str) -> int:
    """Length of a method's published run: of its option files for the backbone, of any of its, or the shared one."""
    folder = options_folder() / "train"
    for pattern in (f"{method}/{backbone}*.yml", f"{method}/*.yml"):
        # The longest, because there are short runs as well.
        if found := [assemble(path).get("train", {}).get("total_iter", 0) for path in folder.glob(pattern)]:
            return max(found)
    return assemble(folder / "qat.yml")["train"]["total_iter"]


def published_recipe(method: str, backbone: str, bits: str) -> str | Mapping[str, Any]:
    """The recipe as a method's option file for a backbone has it, of these bits or of 4; else the recipe itself."""
    for width in (bits.lower(), "w4a4"):
        path = options_folder() / "train" / method / f"{backbone}_{width}.yml"
        if path.is_file():
            return assemble(path)["recipe"]
    return method


def shared_options(settings: Settings) -> dict[str, Any]:
    """Options of a training without its recipe, in the host's layout; ``network_g`` holds the backbone.

    Raises:
        UserError: For a backbone that cannot be used.
    """
    files = [options_folder() / name for name in ("data/photos_x4.yml", "train/qat.yml", "runtime.yml")]
    with tempfile.TemporaryDirectory(prefix="qsr_") as folder:
        path = Path(folder) / "composed.yml"
        write_options({"_base_": [str(file) for file in files]}, path)
        options = assemble(path)
    backbone, training = backbone_options(settings.backbone), options["train"]
    scale = scale_of(backbone)
    training["total_iter"] = settings.iters
    steps = [max(1, round(share * settings.iters)) for share in settings.milestones]
    training["scheduler"] = {"type": "MultiStepLR", "milestones": steps, "gamma": 0.5}
    options.update(network_g={"type": "QuantNet", "backbone": backbone}, scale=scale, manual_seed=settings.seed)
    options["path"]["pretrain_network_float"] = _absolute(settings.weights)
    data = options["datasets"]["train"]
    data.update({key: _absolute(settings.data / f"{name}.lmdb") for key, name in _DATABASES.items()})
    data.update(gt_size=settings.lq_size * scale, batch_size_per_gpu=settings.batch)
    data.update(num_worker_per_gpu=1, dataset_enlarge_ratio=100)
    options["datasets"] = {"train": data}  # scores come from the evaluator, after the training
    del options["val"]
    frequent = {"print_freq": max(1, min(settings.iters // 50, 100)), "save_checkpoint_freq": settings.iters + 1}
    options["logger"].update(frequent, use_tb_logger=False)
    return options


def training_options(settings: Settings, method: str, bits: str, span: float) -> dict[str, Any]:
    """Complete options of one training.

    Args:
        settings: What is shared.
        method: Shipped recipe, or a recipe file.
        bits: Like ``W4A4``.
        span: Median width of the activations' ranges, see :func:`~qsr_plugin.report.shortening.median_span`.

    Raises:
        UserError: For a backbone, recipe, placement or length that cannot be used.
    """
    weight_bits, act_bits = parse_bits(bits)
    chosen = {"placement": COMMON_PLACEMENT} if settings.placement == "same" else {}
    source = published_recipe(method, Path(settings.backbone).stem, bits)
    recipe = load_recipe(source, weight_bits=weight_bits, act_bits=act_bits, **chosen)
    options = shared_options(settings)
    network = options["network_g"]
    budget = Budget(
        iters=settings.iters,
        published=published_iterations(recipe.method, Path(settings.backbone).stem),
        base_lr=options["train"]["optim_g"]["lr"],
        pixel_range=float(getattr(build_backbone(network["backbone"]), "img_range", 1.0)),
        span=span,
        weights_lr=settings.weights_lr,
    )
    frozen = {"freeze_batch_norm": True} if settings.freeze_batch_norm else {}
    stages = [{**stage, **frozen} for stage in shortened(recipe.stages, budget)]
    network["recipe"] = load_recipe(recipe, stages=stages).to_dict()
    options["name"] = run_name(method, bits)
    return options


def _absolute(path: Path) -> str:
    return str(path.expanduser().resolve())


def run_name(method: str, bits: str) -> str:
    """Name of a training, of its folder and of its files."""
    return f"{Path(method).stem}_{bits.lower()}"
