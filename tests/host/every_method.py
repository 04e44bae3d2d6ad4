"""Short runs of any shipped recipe in the host's model; also a script for several processes: ``every_method.py DATA``."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Any

import torch
from torch import distributed as dist

from qsr_plugin import compat
from tests import recipes
from tests.backbones import tiny_options
from tests.host import harness

compat.import_host()

from basicsr.models import build_model  # noqa: E402
from qsr_plugin.archs.quant_net_arch import build_backbone  # noqa: E402

from qsr_plugin.train import leave_process_group  # noqa: E402

BACKBONES = {
    "EDSR": tiny_options("EDSR", 4, upscale=4, img_range=255.0),
    "SRResNet": tiny_options("SRResNet", 4, upscale=4),
    "SwinIR": tiny_options("SwinIR", upscale=4, drop_path_rate=0.1),
}
#: Iterations of every stage but the last.
STAGE = 2
#: Every recipe with 3 bits, and adaptive ones with their own widths as well.
RUNS = [
    (method, own) for method in recipes.TRAINED for own in ((False, True) if recipes.is_adaptive(method) else (False,))
]


def name_of(method: str, own: bool, backbone: str) -> str:
    """How a run is called in the output."""
    return f"{method}{' adaptive' * own} {backbone}"


def short_recipe(method: str, backbone: dict[str, Any], own: bool) -> dict[str, Any]:
    """A shipped recipe with stages of a few iterations and a small calibration.

    Args:
        method: Name of the recipe.
        backbone: Options of the network it is for.
        own: With the bit widths of the recipe instead of 3 (or as few as its policy can do).
    """
    recipe = (recipes.shipped(method, build_backbone(backbone)) if own else recipes.equal(method, 3)).to_dict()
    recipe["calibration"] = {"images": 4, "batch": 2}
    for stage in recipe["stages"]:
        if "iters" in stage:
            stage["iters"] = STAGE
    return recipe


def options(data: Path, root: Path, method: str, backbone: str, *, own: bool = False, **changes: Any) -> dict[str, Any]:
    """Options as the host's parser leaves them, with float weights that are the same in every call."""
    opt = harness.options(data, train={"ema_decay": 0.9})
    kind = BACKBONES[backbone]
    with torch.random.fork_rng():
        torch.manual_seed(4)
        weights = root / f"{backbone}{changes.get('rank', 0)}.pth"
        torch.save({"params": build_backbone(kind).state_dict()}, weights)
        recipe = short_recipe(method, kind, own)
    opt["network_g"] = {"type": "QuantNet", "backbone": kind, "recipe": recipe}
    opt.update(is_train=True, dist=False, rank=0, world_size=1, auto_resume=False, root_path=str(root))
    for phase, dataset in opt["datasets"].items():
        dataset.update(phase=phase, scale=4)
    opt["path"] = {
        "pretrain_network_float": str(weights),
        "models": str(root / "models"),
        "training_states": str(root / "states"),
        "visualization": str(root),
    }
    return {**opt, **changes}


def batch(iteration: int, rank: int = 0) -> dict[str, Any]:
    """Two image pairs that depend on iteration and process only."""
    generator = torch.Generator().manual_seed(100 * rank + iteration)
    lq, gt = torch.rand(2, 3, 8, 8, generator=generator), torch.rand(2, 3, 32, 32, generator=generator)
    return {"lq": lq, "gt": gt, "lq_path": ["a.png", "b.png"], "gt_path": ["a.png", "b.png"]}


def iterate(model: Any, iterations: range, rank: int = 0) -> None:
    """Training steps as the host's loop takes them."""
    for iteration in iterations:
        model.update_learning_rate(iteration)
        model.feed_data(batch(iteration, rank))
        model.optimize_parameters(iteration)


def stay_the_same(data: Path, method: str, own: bool, backbone: str) -> None:
    """Train on this process and fail if it does not end up with the same network as the first one."""
    rank, world = dist.get_rank(), dist.get_world_size()
    changes = {"dist": True, "rank": rank, "world_size": world}
    model = build_model(options(data, Path.cwd(), method, backbone, own=own, **changes))
    run = name_of(method, own, backbone)
    for iteration in range(1, 3 * STAGE + 2):
        iterate(model, range(iteration, iteration + 1), rank)
        trained = [p for p in model.net.parameters() if p.requires_grad]
        assert all(p.grad is not None for p in trained), f"{run}: a parameter got no gradient"
        state = torch.cat([value.detach().double().flatten() for value in model.net.state_dict().values()])
        first = state.clone()
        dist.broadcast(first, src=0)
        assert bool(torch.isfinite(state).all()), f"{run}: not finite at iteration {iteration}"
        names = [key for key, value in model.net.state_dict().items() for _ in range(value.numel())]
        apart = sorted({name for name, same in zip(names, (first == state).tolist()) if not same})
        # Batch norm statistics are those of each process, as in the host.
        apart = [name for name in apart if "running_" not in name]
        assert not apart, f"{run}: processes differ at iteration {iteration}: {apart[:5]}"
    print(f"same on {world} processes: {run}", flush=True)


def main() -> None:
    """Every recipe on every backbone."""
    dist.init_process_group("gloo")
    for backbone in BACKBONES:
        for method, own in RUNS:
            stay_the_same(Path(sys.argv[1]), method, own, backbone)
    leave_process_group()


if __name__ == "__main__":
    main()
