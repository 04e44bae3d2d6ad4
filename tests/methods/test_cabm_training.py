"""CABM in the host's model: a run resumes in its second stage, and the shipped files ask for their table."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from qsr_plugin.checkpoint import load_quantized, save_quantized
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import quantize_model
from tests.host import every_method, harness
from tests.methods.bit_tables import CANDIDATES, content, places_of, rows_for, varied


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return harness.write_data(tmp_path_factory.mktemp("data"), count=4)


def run_options(data: Path, root: Path, backbone: str) -> dict[str, Any]:
    """Options of a short training with a table for its batches, from a network with selectors."""
    from qsr_plugin.archs.quant_net_arch import QuantNet

    opt = every_method.options(data, root, "cabm", backbone)
    kind = opt["network_g"]["backbone"]
    start = root / "start.safetensors"
    if not start.exists():
        with torch.random.fork_rng():
            torch.manual_seed(5)
            save_quantized(calibrate(QuantNet(kind, "cadyq"), [varied(2)]), start)
    places = places_of(load_quantized(start))
    batches = torch.cat([every_method.batch(iteration)["lq"] for iteration in range(1, 8)])
    rows = [
        (score, ("4" * len(places), "46" * (len(places) // 2))[i % 2])
        for i, (score, _) in enumerate(rows_for(batches, places))
    ]
    changes = {"policy": {"table": content(places, rows)}, "bits": {"weight": 8, "act": list(CANDIDATES)}}
    opt["network_g"]["recipe"] = load_recipe(opt["network_g"]["recipe"], **changes).to_dict()
    opt["path"]["pretrain_network_quantized"] = str(start)
    opt["path"]["pretrain_network_float"] = None
    return opt


@pytest.mark.parametrize("backbone", every_method.BACKBONES)
def test_a_training_resumed_in_its_second_stage_equals_the_uninterrupted(
    data: Path, tmp_path: Path, backbone: str
) -> None:
    from basicsr.models import build_model

    whole = build_model(run_options(data, tmp_path, backbone))
    every_method.iterate(whole, range(1, 6))
    bits = whole.net.last_record().bits[places_of(whole.net)[1]]
    assert bits.shape == (2,) and {"l_pix", "l_sktloss", "l_blocksktloss"} <= set(whole.log_dict)

    first = build_model(run_options(data, tmp_path, backbone))
    every_method.iterate(first, range(1, 4))
    first.save(0, 3)
    opt = run_options(data, tmp_path, backbone)
    opt["path"].update(
        pretrain_network_g=str(tmp_path / "models/net_g_3.pth"),
        param_key_g="params",
        resume_state=str(tmp_path / "states/3.state"),
    )
    second = build_model(opt)
    second.resume_training(harness.read(tmp_path / "states/3.state"))
    every_method.iterate(second, range(4, 6))
    assert harness.differences(whole.net.state_dict(), second.net.state_dict()) == []
    assert harness.differences(whole.net_g_ema.state_dict(), second.net_g_ema.state_dict()) == []
    assert whole.log_dict == second.log_dict


def test_shipped_files_ask_for_the_table_that_is_not_there_yet(tiny_net, tmp_path: Path, monkeypatch) -> None:
    from qsr_plugin.options_file import load_options, options_folder

    monkeypatch.chdir(tmp_path)
    for file in sorted((options_folder() / "train/cabm").glob("*.yml")):
        recipe = load_options(file)["network_g"]["recipe"]
        named = recipe["policy"]["table"]
        assert named == load_options(file)["path"]["pretrain_network_quantized"].split("/models/")[0] + "/table.json"
        with pytest.raises(RecipeError, match=f"policy.table: {named} did not exist .* 'qsr table MODEL --images"):
            quantize_model(tiny_net(), load_recipe(recipe))
        forced = load_options(file, ["recipe:policy:table=other.json"])["network_g"]["recipe"]
        assert forced == {**recipe, "policy": {**recipe["policy"], "table": "other.json"}}
    with pytest.raises(RecipeError, match="policy 'edge_table' needs policy.table, a file: make one with 'qsr table"):
        quantize_model(tiny_net(), "cabm")
    assert quantize_model(tiny_net(), load_recipe("cabm", act_bits=4)).recipe.bits.act == 4
