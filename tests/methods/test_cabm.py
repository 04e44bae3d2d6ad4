"""CABM: its look-up against the published figures, and networks that carry a table."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from qsr_plugin import compat
from qsr_plugin.checkpoint import load_quantized, save_quantized
from qsr_plugin.methods.cabm import BitTable, EdgeTable, EdgeTablePolicy, as_characters, score_keys
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.image_stats import edge_scores
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import quantize_model
from qsr_plugin.report.fab import feature_average_bits
from tests.host import harness
from tests.methods.bit_tables import CANDIDATES, content, places_of, rows_for, varied

compat.import_host()


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


@pytest.fixture
def places(tiny_net) -> list[str]:
    """Places of the tiny EDSR, from the recipe that tables are made with."""
    return places_of(quantize_model(tiny_net(), "cadyq"))


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
