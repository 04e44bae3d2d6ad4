"""Recipes: what is read, merged and refused, with the exact place in the message."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml
from pydantic import ValidationError

from qsr_plugin.quant.policy import policy_class
from qsr_plugin.quant.recipe import Recipe, RecipeError, list_methods, load_recipe, recipe_folder, with_steps
from qsr_plugin.quant.schema import Stage

RULE = {"role": "block.conv", "port": "input"}


def refused(change: dict, **overrides: object) -> str:
    with pytest.raises(RecipeError) as error:
        load_recipe({"base": "pams", **change}, **overrides)
    return str(error.value)


def test_methods_are_the_shipped_files() -> None:
    files = {path.stem for path in (Path(__file__).parents[2] / "options" / "recipes").glob("*.yml")}
    assert set(list_methods()) == files >= {"pams", "minmax", "percentile", "omse"}
    assert recipe_folder().is_dir()


@pytest.mark.parametrize("name", list_methods())
def test_shipped_recipes_are_read_and_survive_a_round_trip(name: str) -> None:
    recipe = load_recipe(name)
    assert recipe.method == name
    assert load_recipe(recipe.to_dict()) == recipe == load_recipe(recipe)
    raw = yaml.safe_load((recipe_folder() / f"{name}.yml").read_text("utf-8"))
    assert set(raw) == {"recipe"} and set(raw["recipe"]) <= set(Recipe.model_fields)


def test_a_recipe_cannot_be_changed_afterwards() -> None:
    with pytest.raises(ValidationError, match="frozen"):
        load_recipe("pams").placement = "other"


def test_overrides_merge_mappings_and_replace_lists() -> None:
    recipe = load_recipe("pams", weight_bits=8, act_bits=6, calibration={"images": 3}, stages=[{"train": ["ranges"]}])
    assert (recipe.bits.weight, recipe.bits.act) == (8, 6)
    assert (recipe.calibration.images, recipe.calibration.batch) == (3, 16)
    assert [stage.train for stage in recipe.stages] == [("ranges",)]
    mapping = load_recipe({"base": "pams", "bits": {"act": 8}}, weight_bits=2)
    assert (mapping.bits.weight, mapping.bits.act) == (2, 8)
    spec = load_recipe("minmax", quantizers={"act": {"type": "asymmetric", "observer": "percentile", "alpha": 0.995}})
    assert spec.quantizers.act.extras() == {"observer": "percentile", "alpha": 0.995}
    assert load_recipe("pams", bits={"weight": 3}, act_bits=2).bits.model_dump() == {"weight": 3, "act": 2}


def test_files_with_and_without_the_block_and_with_a_base(tmp_path: Path) -> None:
    bare, block = tmp_path / "bare.yml", tmp_path / "block.yaml"
    bare.write_text("base: pams\nbits: {weight: 8, act: 8}\n", "utf-8")
    block.write_text("recipe: {base: pams, placement: shortcut_only}\n", "utf-8")
    assert load_recipe(bare).bits.weight == 8
    assert load_recipe(str(block)).placement == "shortcut_only"


@pytest.mark.parametrize(
    "bits", [1, 0, -4, 17, 31, 33, 4.5, 4.0, "4", "four", True, [4], [8, 4], [4, 4, 8], [4, 32], []]
)
@pytest.mark.parametrize("which", ["act", "weight"])
def test_impossible_bit_widths(bits: object, which: str) -> None:
    message = refused({"bits": {which: bits}})
    assert message.startswith(f"recipe.bits.{which}: ")
    assert ("2 to 16, or 32" in message) or ("ascending widths below 32" in message)


@pytest.mark.parametrize("bits", [2, 16, 32])
def test_possible_bit_widths(bits: int) -> None:
    assert load_recipe("pams", weight_bits=bits, act_bits=bits).bits.act == bits


def test_bits_of_a_rule_are_checked_too() -> None:
    message = refused({"placements": {"quantized_input": [{**RULE, "bits": 1}]}})
    assert "recipe.placements.quantized_input[0]: the rule's bits is 1; allowed are whole numbers 2 to 16" in message


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (
            {"stages": [{"iters": 5}, {"lr": {"range": 0.1}}]},
            "recipe.stages[1].lr.range: unknown key. Did you mean 'ranges'?",
        ),
        ({"stagess": []}, "recipe.stagess: unknown key. Did you mean 'stages'?"),
        ({"bits": {"weights": 4}}, "recipe.bits.weights: unknown key. Did you mean 'weight'?"),
        ({"calibration": {"image": 4}}, "recipe.calibration.image: unknown key. Did you mean 'images'?"),
        (
            {"placements": {"quantized_input": [{**RULE, "prot": "x"}]}},
            "recipe.placements.quantized_input[0].prot: unknown key. Did you mean 'port'?",
        ),
        (
            {"quantizers": {"act": {"type": "pams", "flor": 0.1}}},
            "recipe.quantizers.act.flor: unknown key. Did you mean 'floor'? Allowed: floor, momentum.",
        ),
        (
            {"placements": {"quantized_input": [{**RULE, "quantizer": {"type": "pams", "flor": 0.1}}]}},
            "recipe.placements.quantized_input[0].quantizer.flor: unknown key. Did you mean 'floor'?",
        ),
        (
            {"quantizers": {"act": {"type": "pams", "floor": -1}}},
            "recipe.quantizers.act.floor: Input should be greater",
        ),
        ({"quantizers": {"act": "pasm"}}, "recipe.quantizers.act: unknown quantizer 'pasm'. Did you mean 'pams'?"),
        ({"policy": "fixxed"}, "recipe.policy: unknown bit policy 'fixxed'. Did you mean 'fixed'?"),
        ({"placement": "bdy"}, "recipe: unknown placement 'bdy'. Did you mean 'body'?"),
        ({"stages": [{"train": ["wieghts"]}]}, "recipe.stages[0].train[0]: Input should be 'weights'"),
        ({"stages": [{"train": ["weights"]}, {}]}, "every stage but the last needs 'iters'"),
        ({"stages": []}, "every stage but the last needs 'iters'"),
        ({"stages": [{"iters": 0}]}, "recipe.stages[0].iters: Input should be greater than or equal to 1"),
        ({"stages": [{"track_ranges": 1.0}]}, "recipe.stages[0].track_ranges: is 1.0; allowed are"),
        ({"stages": [{"lr": {"ranges": -1}}]}, "recipe.stages[0].lr.ranges: Input should be greater than 0"),
        ({"stages": [{"track_ranges": "median"}]}, "recipe.stages[0].track_ranges: is 'median'; allowed are"),
        ({"stages": [{"depths": [1.0, 0.5]}]}, "a stage trains several depths, but the recipe has no 'depth'"),
        (
            {"stages": [{"depths": [0.5]}], "depth": {}, "cooperative": {}},
            "a stage trains several depths, which 'cooperative' cannot",
        ),
        ({"stages": [{"depths": [1.5]}], "depth": {}}, "recipe.stages[0].depths[0]: Input should be less than"),
        ({"cooperative": {"granularity": "block"}}, "recipe.cooperative.granularity: Input should be 'tensor'"),
        (
            {"bits": {"act": 4}, "losses": [{"type": "BitLoss", "target_bits": 3.5}]},
            "losses[0].target_bits is 3.5, below the smallest activation bit width 4",
        ),
        (
            {"bits": {"act": [4, 6, 8]}, "losses": [{"type": "SKTLoss"}, {"type": "BitLoss", "target_bits": 3}]},
            "losses[1].target_bits is 3, below the smallest activation bit width 4",
        ),
        ({"stages": [{"depths": []}], "depth": {}}, "recipe.stages[0].depths: Tuple should have at least 1 item"),
        ({"stages": [{"train": []}]}, "recipe.stages[0].train: Tuple should have at least 1 item"),
        ({"losses": [{"type": "BitLoss", "target_bits": "four"}]}, "losses[0].target_bits is 'four'; give a number"),
        ({"bits": 4}, "recipe.bits: Input should be"),
        ({"teacher": "end"}, "recipe.teacher: Input should be 'float' or 'start'"),
        ({"tuning": {"batch": 0}}, "recipe.tuning.batch: Input should be greater than or equal to 1"),
        ({"tuning": {}, "stages": [{"iters": 2}, {}]}, "a recipe with 'tuning' needs 'iters' in every stage"),
        ({"calibration": {"fit": -1}}, "recipe.calibration.fit: Input should be greater than or equal to 0"),
        (
            {"stages": [{"lr": {"threshold": 0.1}}]},
            "recipe.stages[0].lr.threshold: unknown key. Did you mean 'thresholds'",
        ),
        ({"stages": [{"train": ["bit"]}]}, "recipe.stages[0].train[0]: Input should be"),
        ({"quantizers": None}, "recipe.quantizers: Input should be"),
        ({"placements": {"quantized_input": [{"port": "input"}]}}, "needs exactly one of 'role' and 'match'"),
        ({"placements": {"quantized_input": [{**RULE, "match": "x"}]}}, "needs exactly one of 'role' and 'match'"),
        (
            {"placements": {"quantized_input": [{**RULE, "keep_float": True, "bits": 8}]}},
            "keep_float takes neither 'quantizer' nor 'bits'",
        ),
    ],
)
def test_mistakes_are_named_with_their_path(change: dict, message: str) -> None:
    assert message in refused(change)


def test_missing_keys_are_listed_all_at_once() -> None:
    with pytest.raises(RecipeError) as error:
        load_recipe({"bits": {"weight": 4}})
    assert str(error.value).splitlines() == [
        f"recipe.{key}: required, but not given" for key in ("method", "placement", "placements", "quantizers")
    ]


def test_names_and_files_that_do_not_exist(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="unknown recipe 'pasm'. Did you mean 'pams'"):
        load_recipe("pasm")
    with pytest.raises(RecipeError, match=r"recipe file '.*none.yml' does not exist; .*pams"):
        load_recipe(tmp_path / "none.yml")
    with pytest.raises(RecipeError, match="unknown recipe 'nope'"):
        load_recipe({"base": "nope"})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("- 1\n- 2\n", "holds list, expected a mapping"),
        ("", "holds NoneType, expected a mapping"),
        ("recipe:\n", "holds NoneType, expected a mapping"),
        ("recipe: pams\n", "holds str, expected a mapping"),
        ("recipe: {a: b\n", "not plain YAML"),
    ],
)
def test_files_that_are_no_recipe(tmp_path: Path, text: str, message: str) -> None:
    path = tmp_path / "broken.yml"
    path.write_text(text, "utf-8")
    with pytest.raises(RecipeError, match=message):
        load_recipe(path)


def test_python_objects_in_yaml_are_not_built(tmp_path: Path) -> None:
    path, sentinel = tmp_path / "evil.yml", tmp_path / "sentinel"
    path.write_text(f"recipe: !!python/object/apply:os.mkdir ['{sentinel}']\n", "utf-8")
    with pytest.raises(RecipeError, match="no Python objects allowed"):
        load_recipe(path)
    assert not sentinel.exists()


def test_what_recipes_may_say_about_policies() -> None:
    lr = {"bits": 1e-3, "thresholds": 1e-2}
    recipe = load_recipe(
        {
            "base": "pams", "teacher": "start", "tuning": {"batch": 4}, "calibration": {"fit": 2},
            "stages": [{"iters": 3, "train": ["bits", "thresholds"], "lr": lr, "adapt_thresholds": True}],
        }
    )  # fmt: skip
    (stage,) = recipe.stages
    assert stage.train == ("bits", "thresholds") and stage.adapt_thresholds
    assert (stage.lr.bits, stage.lr.thresholds, stage.lr.ranges) == (1e-3, 1e-2, None)
    assert (recipe.teacher, recipe.tuning.batch, recipe.calibration.fit) == ("start", 4, 2)
    assert load_recipe(recipe.to_dict()) == recipe
    plain = load_recipe("pams")
    assert (plain.teacher, plain.tuning, plain.calibration.fit) == ("float", None, 0)
    assert plain.act_widths == plain.bits.act and {"bits", "thresholds"} <= set(Stage().train)


def test_an_unknown_option_of_a_policy_is_told_with_its_own() -> None:
    with pytest.raises(RecipeError, match=r"recipe\.policy\.threshhold: unknown key") as error:
        load_recipe("granular_dq", policy={"type": "granularity", "threshhold": 1})
    assert all(name in str(error.value) for name in policy_class("granularity").Options.model_fields)
    assert "Allowed: type" not in str(error.value)


@pytest.mark.parametrize("name", [name for name in list_methods() if load_recipe(name).tuning is not None])
@pytest.mark.parametrize("factor", [0.3, 1, 2.5])
def test_stages_keep_their_shares_of_other_steps(name: str, factor: float) -> None:
    recipe = load_recipe(name)
    usual = [stage.iters for stage in recipe.stages]
    steps = round(factor * sum(usual))
    found = [stage.iters for stage in with_steps(recipe, steps).stages]
    assert sum(found) == steps and all(abs(new - factor * old) <= 1.5 for new, old in zip(found, usual))
    assert with_steps(recipe, sum(usual)) == recipe


def test_steps_that_cannot_be_are_refused() -> None:
    with pytest.raises(RecipeError, match="'minmax' only calibrates, so 5 steps"):
        with_steps(load_recipe("minmax"), 5)
    with pytest.raises(RecipeError, match="'percentile_ft' cannot be tuned in 5 steps, its 10 stages usually take 500"):
        with_steps(load_recipe("percentile_ft"), 5)
