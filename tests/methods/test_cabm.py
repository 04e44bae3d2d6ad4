"""CABM: its look-up against the published figures, and tables made from, given to and carried by networks."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.checkpoint import load_quantized, save_quantized
from qsr_plugin.methods.cabm import BitTable, EdgeTable, EdgeTablePolicy, as_characters, read_table, score_keys
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.image_stats import edge_scores
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import policies, quantize_model
from qsr_plugin.report.fab import feature_average_bits
from tests.host import every_method, harness

compat.import_host()

CANDIDATES = (4, 6, 8)


def content(places: list[str], rows: list[tuple[float, str]], **changes: Any) -> dict[str, Any]:
    """A table as plain data, from (score, one character per place)."""
    scores, bits = [score for score, _ in rows], [row for _, row in rows]
    made = {"places": places, "candidates": list(CANDIDATES), "scores": scores, "bits": bits, "patch": 96, "step": 94}
    return {**made, **changes}


def look_up(table: dict[str, Any], *, training: bool, **options: float) -> Callable[[float], str]:
    """Score to bits, as a network with this table has them."""
    part = EdgeTable(EdgeTablePolicy.Options(table=table, **options), CANDIDATES, tuple(table["places"]), ())
    part.train(training)
    return lambda score: as_characters(map(int, part.look_up(torch.tensor([score]))[:, 0].tolist()))


# -- the published figures -------------------------------------------------------------------------------------------

#: 40 places, so that bits of 4, 6 and 8 have the mean bits of the example.
FABS = {4.25: "6" * 5 + "4" * 35, 4.75: "6" * 15 + "4" * 25, 6.10: "8" * 2 + "6" * 38, 5.00: "6" * 20 + "4" * 20}
EXAMPLE = content(
    [f"p{number}" for number in range(40)],
    [(0.5, FABS[4.25]), (0.5, FABS[4.75]), (1.2, FABS[6.10]), (2.0, FABS[5.00])],
)


@pytest.mark.parametrize(
    ("score", "limited", "unlimited"),
    [(2.31, 5.00, 5.00), (1.57, 4.25, 6.10), (0.31, 4.25, 4.25), (0.5, 4.25, 4.25), (1.19, 4.25, 4.25), (255, 5, 5)],
)
def test_the_cheapest_row_of_the_nearest_score_below(score: float, limited: float, unlimited: float) -> None:
    """Training passes over rows with 6 mean bits or more; a score below all of them takes the first."""
    assert look_up(EXAMPLE, training=True)(score) == FABS[limited]
    assert look_up(EXAMPLE, training=False)(score) == FABS[unlimited]
    assert look_up(EXAMPLE, training=True, max_bits_train=100)(score) == FABS[unlimited]
    assert look_up(EXAMPLE, training=False, max_bits_test=6)(score) == FABS[limited]


def test_mean_bits_of_a_row_are_a_plain_mean() -> None:
    table = BitTable.model_validate(content(["a", "b", "c", "d"], [(0.0, "4468")]))
    assert table.fabs() == [5.5] and table.rows() == [[4, 4, 6, 8]]
    assert BitTable.model_validate(EXAMPLE).fabs() == [4.25, 4.75, 6.10, 5.00]


def test_scores_of_the_published_images() -> None:
    """Cross-check of the scores that keys are made from: half black, half 200; a row of a table must be found by it."""
    half = torch.zeros(1, 3, 4, 4)
    half[..., 2:] = 200 / 255
    assert score_keys(edge_scores(half)).tolist() == [12750]
    table = content(["a"], [(0.0, "4"), (127.49, "6"), (127.5, "8"), (127.51, "4")])
    assert look_up(table, training=False)(edge_scores(half).item()) == "8"


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_every_step_of_a_hundredth_is_its_own_key(dtype: torch.dtype) -> None:
    """0.01 has no exact binary form; steps of it must not drift."""
    every = torch.arange(25501, dtype=torch.float64)
    assert score_keys((every / 100).to(dtype)).tolist() == every.long().tolist()
    assert score_keys(torch.tensor([1.566, 1.574, 0.004, 0.006], dtype=dtype)).tolist() == [157, 157, 0, 1]


def published_look_up(rows: list[tuple[float, str]], score: float, limit: float) -> str:
    """The release's loop down the scores, ended where it would go on below zero."""
    best = {}
    for key, bits in rows:
        fab = sum(map(int, bits)) / len(bits)
        if f"{key:.2f}" not in best or fab < best[f"{key:.2f}"][0]:
            best[f"{key:.2f}"] = fab, bits
    step = round(score * 100)
    while step >= 0:
        fab, bits = best.get(f"{step / 100:.2f}", (limit, ""))
        if fab < limit:
            return bits
        step -= 1
    return min((float(key), bits) for key, (fab, bits) in best.items() if fab < limit)[1]


@pytest.mark.parametrize("seed", range(4))
def test_the_search_equals_the_published_loop(seed: int) -> None:
    rng = random.Random(seed)
    rows = {(rng.randrange(40) / 100, "".join(rng.choice("468") for _ in range(3))) for _ in range(30)}
    rows |= {(0.11, "444"), (0.12, "444"), (0.13, "888"), (0.14, "888")}  # repeated rows, which a recipe leaves out
    rows = sorted(rows, key=lambda row: (row[0], sum(map(int, row[1])), row[1]))
    table = content(["a", "b", "c"], rows)
    for limit in (5.0, 6.0, 7.0):
        found = look_up(table, training=True, max_bits_train=limit)
        for step in range(45):
            assert found(step / 100) == published_look_up(rows, step / 100, limit), step


def test_a_recipe_takes_in_only_what_can_be_looked_up() -> None:
    rows = [(0.1, "44"), (0.1, "48"), (0.2, "44"), (0.3, "66"), (0.3, "68"), (0.4, "44"), (0.5, "44")]
    kept = BitTable.model_validate(content(["a", "b"], rows)).cheapest()
    assert list(zip(kept.scores, kept.bits)) == [(0.1, "44"), (0.3, "66"), (0.4, "44")]
    assert kept.cheapest() == kept


# -- in a network ----------------------------------------------------------------------------------------------------


def places_of(net: nn.Module) -> list[str]:
    """Places with a choice."""
    return [place for place, policy in policies(net) if len(policy.candidates) > 1]


@pytest.fixture
def places(tiny_net) -> list[str]:
    """Places of the tiny EDSR, from the recipe that tables are made with."""
    return places_of(quantize_model(tiny_net(), "cadyq"))


def varied(count: int, side: int = 12) -> Tensor:
    """``(count, 3, side, side)`` images from flat to rough, in a mixed order."""
    noise = torch.rand(count, 3, side, side, generator=torch.Generator().manual_seed(1)) - 0.5
    strength = torch.linspace(0, 1, count)[torch.randperm(count, generator=torch.Generator().manual_seed(2))]
    return 0.5 + strength.view(-1, 1, 1, 1) * noise


def rows_for(images: Tensor, places: list[str]) -> list[tuple[float, str]]:
    """One row per image at its own score; the rougher, the more bits: 4.5, 5.5 and 8 for four places."""
    scores = sorted({round(float(score), 2) for score in edge_scores(images)})
    rest = len(places) - 1
    levels = ["6" + "4" * rest, "4" + "6" * rest, "8" + "8" * rest]
    return [(score, levels[3 * index // len(scores)]) for index, score in enumerate(scores)]


@pytest.fixture
def table(places: list[str]) -> dict[str, Any]:
    return content(places, rows_for(varied(6), places))


@pytest.mark.parametrize("training", [False, True])
def test_images_of_a_batch_have_the_bits_they_have_alone(tiny_net, images, table, training: bool) -> None:
    net = calibrate(quantize_model(tiny_net(), load_recipe("cabm", policy={"table": table})), images).train(training)
    batch, columns = varied(6), {place: number for number, place in enumerate(table["places"])}
    together = net(batch)
    bits = {place: widths for place, widths in net.last_record().bits.items() if place in columns}
    assert set(bits) == set(columns) and all(len(widths.unique()) > 1 for widths in bits.values())
    for index, image in enumerate(batch.split(1)):
        alone = net(image)
        assert {place: net.last_record().bits[place].tolist() for place in bits} == {
            place: [widths[index].item()] for place, widths in bits.items()
        }
        assert torch.allclose(alone, together[index : index + 1], atol=1e-6)
    find = look_up(table, training=training)
    rows = [find(score) for score in edge_scores(batch).tolist()]
    assert all([int(row[columns[place]]) for row in rows] == widths.tolist() for place, widths in bits.items())
    want = sum(sum(map(int, row)) / len(row) for row in rows) / len(rows)
    net(batch)
    assert feature_average_bits(net, net.last_record()) == pytest.approx(want)
    assert net.last_record().bits["body.0.conv2.output"] == 8, "what the branch adds has bits of its own"


def test_training_passes_over_rows_of_many_bits_and_evaluation_does_not(tiny_net, images, table) -> None:
    net = calibrate(quantize_model(tiny_net(), load_recipe("cabm", policy={"table": table})), images)
    net.eval()(varied(6))
    free = feature_average_bits(net, net.last_record())
    net.train()(varied(6))
    per_image = torch.stack([net.last_record().bits[place].float() for place in table["places"]]).mean(0)
    assert per_image.max() < 6 and feature_average_bits(net, net.last_record()) < free
    assert not any("bit_policy" in key for key in net.state_dict()), "the table is in the recipe, not in the weights"


def test_only_chosen_ranges_and_the_weights_learn(tiny_net, images, places) -> None:
    net = quantize_model(tiny_net(), load_recipe("cabm", policy={"table": content(places, [(0.0, "6" * 3 + "4")])}))
    calibrate(net, images).train()
    net(varied(2)).square().mean().backward()
    gradients = {name: p.grad for name, p in net.named_parameters()}
    assert all(gradient is not None for gradient in gradients.values())
    used = {place: gradients[f"{place}_quantizer.alpha"].ne(0).tolist() for place in places}
    assert list(used.values()) == [[False, True, False]] * 3 + [[True, False, False]]


def test_the_order_of_places_in_a_table_does_not_matter(tiny_net, images, table) -> None:
    turned = {**table, "places": table["places"][::-1], "bits": [row[::-1] for row in table["bits"]]}
    found = []
    for one in (table, turned):
        net = calibrate(quantize_model(tiny_net(), load_recipe("cabm", policy={"table": one})), images)
        net(varied(6))
        found.append({place: net.last_record().bits[place].tolist() for place in places_of(net)})
    assert found[0] == found[1]


def test_a_part_of_the_network_has_no_bits_of_its_own(tiny_net, images, table) -> None:
    net = calibrate(quantize_model(tiny_net(), load_recipe("cabm", policy={"table": table})), images)
    with pytest.raises(RuntimeError, match="run the whole network"):
        net.body[0](torch.rand(1, 8, 6, 6))


def test_a_saved_network_needs_the_file_no_more(tiny_net, images, table, tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    recipe = load_recipe("cabm", policy={"table": str(file)})
    assert recipe.policy.extras()["table"] == BitTable.model_validate(table).cheapest().model_dump(mode="json")
    net = calibrate(quantize_model(tiny_net(), recipe), images)
    save_quantized(net, tmp_path / "net.safetensors")
    file.unlink()
    again = load_quantized(tmp_path / "net.safetensors")
    assert torch.equal(again(varied(6)), net(varied(6))) and again.recipe == net.recipe
    assert load_recipe(recipe.to_dict()) == recipe and json.loads(json.dumps(recipe.to_dict())) == recipe.to_dict()
    other = calibrate(quantize_model(tiny_net(), load_recipe("cabm", policy={"table": table})), [varied(2)])
    other.load_state_dict(net.state_dict())
    assert torch.equal(other(varied(6)), net(varied(6)))


def test_a_start_from_a_network_with_selectors_leaves_them_behind(tiny_net, images, table, tmp_path: Path) -> None:
    from qsr_plugin.models.loading import adopt

    start = calibrate(quantize_model(tiny_net(), "cadyq"), images)
    with torch.no_grad():
        for parameter in start.parameters():
            parameter.mul_(1.5)
    save_quantized(start, tmp_path / "start.safetensors")
    net = quantize_model(tiny_net(), load_recipe("cabm", policy={"table": table}))
    adopt(net, str(tmp_path / "start.safetensors"))
    kept = {key: value for key, value in start.state_dict().items() if "_policy." not in key}
    assert len(kept) < len(start.state_dict())
    assert harness.differences(kept, net.state_dict()) == [] and net(varied(2)).isfinite().all()


# -- making a table --------------------------------------------------------------------------------------------------


def choosing(tiny_net, images: list[Tensor], **changes: object) -> nn.Module:
    """A network whose selectors choose more bits for stronger gradients, each from another strength on."""
    net = calibrate(quantize_model(tiny_net(**changes), "cadyq"), images)
    with torch.no_grad():
        for number, (_, policy) in enumerate(one for one in policies(net) if len(one[1].candidates) > 1):
            policy.linear.weight.zero_()[:, 0] = torch.tensor([0.0, 0.5, 1.0])
            policy.linear.bias.copy_(torch.tensor([20.0, 0.0, -30.0]) + number * torch.tensor([0.0, -1.0, -4.0]))
    return net


def test_a_table_holds_what_each_patch_was_given(tiny_net, images) -> None:
    from qsr_plugin.data.spans import spans
    from qsr_plugin.report.edge_table import build_table

    net = choosing(tiny_net, images).train()
    photos = [torch.cat(varied(4, 20).split(1), 3)[..., :33], varied(1, 9), varied(2, 24)[1:]]
    want, count = set(), 0
    for photo in photos:
        for y in spans(photo.shape[2], 12, 2, last="enlarge"):
            for x in spans(photo.shape[3], 12, 2, last="enlarge"):
                patch = photo[:, :, y.start : y.stop, x.start : x.stop]
                net.eval()(patch)
                bits = net.last_record().bits
                row = "".join(str(round(bits[place].item())) for place in places_of(net))
                want.add((round(edge_scores(patch).item(), 2), row))
                count += 1
    net.train()
    reports = [build_table(net, photos, patch=12, step=10, batch=batch) for batch in (1, 3)]
    assert reports[0] == reports[1] and net.training
    made = reports[0].table
    assert set(zip(made.scores, made.bits)) == want and reports[0].patches == count == 8
    assert list(zip(made.scores, made.fabs())) == sorted(zip(made.scores, made.fabs()))
    assert (
        made.places == tuple(places_of(net)) and made.candidates == CANDIDATES and (made.patch, made.step) == (12, 10)
    )
    assert len(set("".join(made.bits))) == 3, "all widths are used, else this test says little"
    assert reports[0].bits.lowest == min(made.fabs()) and reports[0].bits.highest == max(made.fabs())


def test_a_table_needs_a_choosing_network_and_patches_that_meet(tiny_net, images) -> None:
    from qsr_plugin.report.edge_table import build_table

    fixed = calibrate(quantize_model(tiny_net(), "pams"), images)
    with pytest.raises(ValueError, match="the same bits for every image"):
        build_table(fixed, images)
    for step in (0, 13):
        with pytest.raises(ValueError, match=f"step {step} with patches of 12 pixels: allowed are 1 to 12"):
            build_table(choosing(tiny_net, images), images, patch=12, step=step)
    with pytest.raises(ValueError, match="no images"):
        build_table(choosing(tiny_net, images), [])


def test_command_line_from_selectors_to_a_network_without(tiny_net, images, tmp_path: Path) -> None:
    """Patches that the table was made from get the very bits that the selectors chose for them."""
    from qsr_plugin.data.images import list_images
    from qsr_plugin.report.edge_table import low_resolution

    net = choosing(tiny_net, images).eval()
    save_quantized(net, tmp_path / "cadyq.safetensors")
    folder = harness.write_photos(tmp_path / "photos", 3, side=48)
    command = ["-m", "qsr_plugin.cli", "table", "cadyq.safetensors", "-o", "out/table.json"]
    sizes = ["--patch", "16", "--step", "14", "--batch", "2"]
    done = harness.run([*command, "--photos", str(folder), *sizes], tmp_path, COLUMNS="120")
    assert done.returncode == 0, done.stderr[-3000:]
    assert "of 16 pixels, 14 apart" in done.stdout and "recipe.policy.table: out/table.json" in done.stdout
    made = read_table(tmp_path / "out/table.json")
    assert len(set(made.scores)) == len(made.scores) > 1

    recipe = load_recipe("cabm", policy={"table": str(tmp_path / "out/table.json"), "max_bits_train": 9})
    mapped = calibrate(quantize_model(tiny_net(), recipe), images)
    seen = set()
    for path in list_images(folder):
        image = low_resolution(path, scale=2)
        assert image.shape == (1, 3, 24, 24)
        with torch.no_grad():
            net(image), mapped(image)  # at this size an image is one patch
        rows = [[round(float(one.last_record().bits[place])) for place in places_of(net)] for one in (net, mapped)]
        assert rows[0] == rows[1]
        seen.add(tuple(rows[0]))
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--images", "a", "--photos", "b"], "give one of --images"),
        ([], "give one of --images"),
        (["--images", ".", "-o", "table.txt"], "tables are saved as .json"),
        (["--images", "none"], "looked for a folder of images"),
    ],
)
def test_command_line_says_what_is_missing(arguments: list[str], says: str, tmp_path: Path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from qsr_plugin.cli import app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["table", "net.safetensors", "-o", "table.json", *arguments], env={"COLUMNS": "160"})
    assert done.exit_code != 0 and says in done.output + str(done.exception)


# -- training --------------------------------------------------------------------------------------------------------


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
