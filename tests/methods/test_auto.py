"""The method ``auto``: its parts, and that each brings the network closer to the float one on photos it has not seen."""

from __future__ import annotations

from copy import deepcopy
from pathlib import Path

import pytest
import torch
from skimage import data as photos
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.surgery import quantize_model

compat.import_host()

from qsr_plugin.archs.quant_net_arch import build_backbone  # noqa: E402

from qsr_plugin.checkpoint import load_float_weights  # noqa: E402
from qsr_plugin.models.tuning import tune  # noqa: E402
from qsr_plugin.options_file import backbone_options  # noqa: E402
from tests.host import harness  # noqa: E402

ABLATIONS = Path(__file__).parents[2] / "options/ablations"
WEIGHTS = Path(__file__).parents[2] / "assets/edsr_small_x4.safetensors"


@pytest.fixture(scope="module")
def float_net() -> nn.Module:
    net = build_backbone(backbone_options("edsr_small_x4"))
    load_float_weights(net, WEIGHTS)
    return net.eval()


def crops(name: str, count: int, side: int, seed: int) -> Tensor:
    """Random pieces of a photo, a quarter of its size, ``(count, 3, side, side)``."""
    image = torch.from_numpy(getattr(photos, name)()[..., :3].copy()).movedim(-1, 0)[None].float() / 255
    small = nn.functional.interpolate(image, scale_factor=0.25, mode="bicubic", antialias=True).clamp(0, 1)[0]
    generator = torch.Generator().manual_seed(seed)
    tops, lefts = (torch.randint(0, length - side, (count,), generator=generator) for length in small.shape[1:])
    return torch.stack([small[:, y : y + side, x : x + side] for y, x in zip(tops.tolist(), lefts.tolist())])


def error(float_net: nn.Module, recipe: Recipe) -> float:
    """Mean squared distance from the float network on a photo that was not used, after calibration and tuning."""
    images = list(torch.cat([crops(name, 12, 32, 0) for name in ("astronaut", "coffee", "chelsea")]).split(4))
    net = calibrate(quantize_model(deepcopy(float_net), recipe), images)
    if recipe.tuning is not None:
        tune(net, float_net, images)
    with torch.no_grad():
        test = crops("rocket", 8, 24, 1)
        return float((net(test) - float_net(test)).square().mean())


def shortened(recipe: Recipe, iters: int = 100) -> Recipe:
    stages = [stage.model_dump(mode="json", exclude_none=True) | {"iters": iters} for stage in recipe.stages]
    return load_recipe(recipe, stages=stages, weight_bits=4, act_bits=4)


@pytest.fixture(scope="module")
def best(float_net) -> float:
    return error(float_net, shortened(load_recipe("auto")))


@pytest.fixture(scope="module")
def untuned(float_net) -> float:
    return error(float_net, load_recipe(ABLATIONS / "auto_untuned.yml", weight_bits=4, act_bits=4))


def test_tuning_brings_the_network_closer(best: float, untuned: float) -> None:
    assert best < 0.95 * untuned


def test_a_range_for_each_channel_brings_it_closer(float_net, untuned: float) -> None:
    recipe = load_recipe(ABLATIONS / "auto_tensor.yml", weight_bits=4, act_bits=4, tuning=None)
    assert untuned < 0.95 * error(float_net, recipe)


@pytest.mark.parametrize("method", ["minmax", "percentile", "omse"])
def test_it_is_closer_than_ranges_of_the_baselines(float_net, best: float, method: str) -> None:
    assert best < 0.85 * error(float_net, load_recipe(method, weight_bits=4, act_bits=4))


@pytest.mark.parametrize("path", sorted(ABLATIONS.glob("auto_*.yml")), ids=lambda path: path.stem)
def test_ablations_are_the_method_without_a_part(path: Path) -> None:
    recipe, whole = load_recipe(path), load_recipe("auto")
    assert recipe.method == "auto" and recipe != whole
    assert recipe.placements == whole.placements


def test_without_a_budget_outer_layers_keep_their_bits() -> None:
    fragile = load_recipe(ABLATIONS / "auto_outer.yml").fragile
    assert fragile == load_recipe("auto").fragile.model_copy(update={"outer_budget": 0.0})


def test_the_host_does_not_train_it(data: Path, tmp_path: Path) -> None:
    from basicsr.models import build_model

    from tests.host import every_method

    opt = every_method.options(data, tmp_path, "auto", "EDSR")
    with pytest.raises(RecipeError, match="tuning.relative.*use 'qsr quantize'"):
        build_model(opt)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return harness.write_data(tmp_path / "data")
