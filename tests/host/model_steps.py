"""A QuantSRModel with a tiny EDSR in this process, and its training steps without the host's loop."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch

from qsr_plugin import compat
from tests.host import harness

compat.import_host()

from basicsr.models import build_model  # noqa: E402

#: Recipe of a network that can leave blocks out.
DEPTHS = {"base": "percentile", "depth": {"role": "block"}, "losses": []}


def options(data: Path, root: Path, **changes: Any) -> dict[str, Any]:
    """Options as the host's parser leaves them."""
    opt = harness.options(data, **changes)
    opt["network_g"] = {**opt["network_g"], "recipe": opt.pop("recipe")}
    opt.update(is_train=True, dist=False, rank=0, world_size=1, auto_resume=False, root_path=str(root))
    for phase, dataset in opt["datasets"].items():
        dataset.update(phase=phase, scale=4)
    opt["path"].update(models=str(root / "models"), training_states=str(root / "states"), visualization=str(root))
    return opt


def model_of(data: Path, root: Path, **changes: Any):
    """The model with these options."""
    return build_model(options(data, root, **changes))


def batch(seed: int = 0) -> dict[str, Any]:
    """Two image pairs, named a.png and b.png."""
    generator = torch.Generator().manual_seed(seed)
    lq, gt = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
    return {"lq": lq, "gt": gt, "lq_path": ["a.png", "b.png"], "gt_path": ["a.png", "b.png"]}


def step(model, iteration: int, data: dict[str, Any] | None = None) -> None:
    """One training step as the host's loop takes it, on a batch of its own if none is given."""
    model.update_learning_rate(iteration)
    model.feed_data(data or batch(iteration))
    model.optimize_parameters(iteration)
