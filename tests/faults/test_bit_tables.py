"""Bit tables that are damaged, foreign, malicious, or made for another network."""

from __future__ import annotations

import json
import os
import pickle
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from qsr_plugin.methods.cabm import BitTable, read_table
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import quantize_model

PLACES = ["body.0.conv2.input", "body.0.input", "body.1.conv2.input", "body.1.input"]
GOOD = {
    "places": PLACES,
    "candidates": [4, 6, 8],
    "scores": [0.5, 0.5, 3.25],
    "bits": ["4444", "4468", "6688"],
    "patch": 96,
    "step": 94,
}


class Payload:
    """Creates a folder when it is unpickled without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def refusal(table: Any, **policy: Any) -> str:
    """What is said when a recipe with this table is read."""
    with pytest.raises(RecipeError) as error:
        load_recipe("cabm", policy={"table": table, **policy})
    return str(error.value)


def test_an_unchanged_table_is_taken(tmp_path: Path) -> None:
    file = tmp_path / "table.json"
    file.write_text(json.dumps(GOOD))
    assert load_recipe("cabm", policy={"table": str(file)}) == load_recipe("cabm", policy={"table": file})
    assert read_table(file) == BitTable.model_validate(GOOD)


FAULTS = [
    ({"scores": [0.5, 0.5]}, "2 scores for 3 rows of bits"),
    ({"scores": None}, "scores: required, but not given"),
    ({"bits": None}, "bits: required, but not given"),
    ({"scores": [], "bits": []}, "scores: Tuple should have at least 1 item"),
    ({"scores": [0.5, 3.25, 0.5]}, "score 0.5 with 7 bits comes after score 3.25 with 5.5 bits"),
    ({"bits": ["4468", "4444", "6688"]}, "score 0.5 with 4 bits comes after score 0.5 with 5.5 bits"),
    ({"scores": [0.5, 0.5, float("nan")]}, "score nan. Allowed: 0 to 255 in steps of 0.01"),
    ({"scores": [0.5, 0.5, float("inf")]}, "score inf. Allowed"),
    ({"scores": [-0.5, 0.5, 0.5]}, "score -0.5. Allowed"),
    ({"scores": [0.5, 0.5, 3.255]}, "score 3.255. Allowed"),
    ({"scores": [0.5, 0.5, "high"]}, r"scores[2]: Input should be a valid number"),
    (
        {"bits": ["4444", "446", "6688"]},
        "score 0.5: bits '446' are for 3 places. Allowed: one character for each of the 4",
    ),
    ({"bits": ["4444", "44688", "6688"]}, "bits '44688' are for 5 places"),
    ({"bits": ["4444", "4465", "6688"]}, "score 0.5: bits '4465'. Allowed: 4, 6, 8"),
    ({"bits": ["4444", "44x8", "6688"]}, "bits '44x8'. Allowed: 4, 6, 8"),
    ({"bits": ["4444", "44²8", "6688"]}, "bits '44²8'. Allowed: 4, 6, 8"),
    ({"bits": [[4, 4, 4, 4], "4468", "6688"]}, "bits[0]: Input should be a valid string"),
    ({"candidates": [8, 4]}, "candidates: are [8, 4]. Allowed: ascending bit widths, 2 to 16"),
    ({"candidates": [4, 32]}, "Allowed: ascending bit widths, 2 to 16"),
    ({"places": [PLACES[0], PLACES[0], *PLACES[2:]]}, "'body.0.conv2.input' is there more than once"),
    ({"places": []}, "places: Tuple should have at least 1 item"),
    ({"patch": 0}, "patch: Input should be greater than or equal to 1"),
    ({"rows": 3}, "rows: unknown key."),
]


@pytest.mark.parametrize(("changes", "says"), FAULTS, ids=[says for _, says in FAULTS])
def test_content_that_is_wrong_is_named(tmp_path: Path, changes: dict[str, Any], says: str) -> None:
    """In a file, with its name, and as part of a recipe that a checkpoint carries."""
    table = {key: value for key, value in {**GOOD, **changes}.items() if value is not None}
    file = tmp_path / "table.json"
    file.write_text(json.dumps(table))
    said = refusal(str(file))
    assert says in said and str(file) in said and "qsr table MODEL" in said
    assert len(said) < 600, "the table itself is not printed"
    inside = refusal(table)
    assert says in inside and "recipe.policy.table" in inside and len(inside) < 600


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("", "is not JSON"),
        ('{"places": ["a"', "is not JSON"),
        ("!!python/object/apply:os.system ['touch owned']", "is not JSON"),
        ("[" * 100_000, "is not JSON"),
        ("[1, 2]", "holds list, expected a bit table"),
        ("null", "holds NoneType, expected a bit table"),
        ("{}", "places: required, but not given"),
    ],
)
def test_files_that_are_no_table(tmp_path: Path, text: str, says: str) -> None:
    file = tmp_path / "table.json"
    file.write_text(text)
    said = refusal(str(file))
    assert says in said and str(file) in said and list(tmp_path.iterdir()) == [file]


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("form", ["pickle", "zip"])
def test_a_malicious_pickle_runs_nothing(tmp_path: Path, form: str) -> None:
    sentinel, file = tmp_path / "sentinel", tmp_path / "table.json"
    if form == "pickle":
        file.write_bytes(pickle.dumps({**GOOD, "extra": Payload(sentinel)}))
    else:
        torch.save({**GOOD, "extra": Payload(sentinel)}, file)
    assert "is not JSON" in refusal(str(file)) and not sentinel.exists()


def test_a_folder_is_no_table(tmp_path: Path) -> None:
    assert f"{tmp_path} cannot be read (Is a directory)" in refusal(str(tmp_path))


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(content=st.binary(max_size=200))
def test_any_bytes_give_an_error_with_the_name(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "fuzz.json"
    file.write_bytes(content)
    with pytest.raises(ValueError, match="fuzz.json"):
        read_table(file)


@pytest.mark.parametrize("name", ["max_bits_train", "max_bits_test"])
def test_a_limit_that_leaves_no_row(name: str) -> None:
    said = refusal(GOOD, **{name: 4.0})
    assert (
        f"{name} is 4, and no row of the table has fewer mean bits: the smallest have 4. Allowed: more than 4" in said
    )
    assert load_recipe("cabm", policy={"table": GOOD, name: 4.01}).policy.extras()[name] == 4.01


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({"places": ["body.0.conv1.input", *PLACES[1:]]}, "it has no bits for body.0.conv2.input"),
        (
            {"places": PLACES[:2], "bits": ["44", "46", "68"]},
            "it has 2 places, the network 4; it has no bits for body.1",
        ),
        (
            {"places": [*PLACES, "body.2.input"], "bits": ["44444", "44446", "66668"]},
            "it has 5 places, the network 4; it has bits for body.2.input, which is no place of it",
        ),
        (
            {"candidates": [3, 4, 6, 8], "bits": ["4443", "4448", "6688"]},
            "policy.table has places at 3 bits. Allowed are the recipe's candidates [4, 6, 8]: give bits.act: [3, 4, 6, 8]",
        ),
    ],
)
def test_a_table_of_another_network_is_refused(tiny_net, changes: dict[str, Any], says: str) -> None:
    with pytest.raises(RecipeError) as error:
        quantize_model(tiny_net(), load_recipe("cabm", policy={"table": {**GOOD, **changes}}))
    assert says in str(error.value)


def test_another_placement_is_another_network(tiny_net) -> None:
    recipe = load_recipe("cabm", placement="body", policy={"table": GOOD})
    with pytest.raises(RecipeError, match="no bits for body.0.conv1.input.*same backbone and placement"):
        quantize_model(tiny_net(), recipe)
