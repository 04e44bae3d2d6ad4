"""Option files: inheritance, safety, and that every shipped file is complete and valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qsr_plugin.options_file import OptionsError, load_options, options_folder
from qsr_plugin.quant.recipe import RecipeError

TRAIN = sorted((options_folder() / "train").glob("*/*.yml"))
TEST = sorted((options_folder() / "test").glob("pams_*.yml"))


@pytest.mark.parametrize("path", TRAIN + TEST, ids=lambda p: str(p.relative_to(options_folder())))
def test_shipped_files_resolve_to_complete_options(path: Path) -> None:
    options = load_options(path)
    assert {"name", "model_type", "num_gpu", "datasets", "network_g", "path", "val", "scale"} <= set(options)
    assert "_base_" not in options and "recipe" not in options
    assert yaml.safe_load(yaml.safe_dump(options)) == options  # plain data only
    if "train" in path.relative_to(options_folder()).parts:
        assert {"optim_g", "scheduler", "total_iter", "pixel_opt"} <= set(options["train"])
        assert options["datasets"]["train"]["io_backend"]["type"] == "lmdb"
    if options["network_g"]["type"] == "QuantNet":
        assert options["name"].startswith(options["network_g"]["recipe"]["method"] + "_")
        assert options["network_g"]["recipe"]["stages"]


def test_only_a_base_line_changes_the_backbone() -> None:
    folder = options_folder() / "train/pams"
    a, b = ((folder / f"{name}_x4_w4a4.yml").read_text().splitlines() for name in ("srresnet", "edsr_baseline"))
    different = [(x, y) for x, y in zip(a, b) if x != y and not x.startswith("name:")]
    assert different == [("  - ../../backbones/srresnet_x4.yml", "  - ../../backbones/edsr_baseline_x4.yml")]


def write(path: Path, text: str) -> Path:
    path.write_text(text)
    return path


def test_later_bases_and_the_file_itself_win(tmp_path: Path) -> None:
    write(tmp_path / "a.yml", "x: 1\nnested: {a: 1, b: 1}\nlist: [1, 2]\n")
    write(tmp_path / "b.yml", "x: 2\nnested: {b: 2}\n")
    file = write(tmp_path / "c.yml", "_base_: [a.yml, b.yml]\nnested: {c: 3}\nlist: [3]\n")
    assert load_options(file) == {"x": 2, "nested": {"a": 1, "b": 2, "c": 3}, "list": [3]}


def test_forced_values_and_shipped_weights(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yml", '_base_: ["qsr:train/pams/edsr_small_x4_w4a4.yml"]\n')
    options = load_options(file, ["recipe:bits:act=3", "datasets:train:gt_size=64"])
    assert options["network_g"]["recipe"]["bits"] == {"weight": 4, "act": 3}
    assert options["datasets"]["train"]["gt_size"] == 64
    assert Path(options["path"]["pretrain_network_float"]).is_file()
    with pytest.raises(OptionsError, match="no option 'datasets:train:gtsize'. Did you mean 'gt_size'"):
        load_options(file, ["datasets:train:gtsize=64"])


def test_values_that_do_not_merge_are_an_error(tmp_path: Path) -> None:
    write(tmp_path / "a.yml", "x: 1\n")
    with pytest.raises(OptionsError, match="does not merge with its _base_"):
        load_options(write(tmp_path / "b.yml", "_base_: a.yml\nx: {y: 2}\n"))


def test_a_base_recipe_does_not_hide_behind_another(tmp_path: Path) -> None:
    text = '_base_: ["qsr:train/pams/edsr_small_x4_w4a4.yml"]\nrecipe: {base: minmax}\n'
    with pytest.raises(RecipeError, match="base 'minmax' meets method 'pams'"):
        load_options(write(tmp_path / "a.yml", text))


def test_delete_drops_what_a_base_says(tmp_path: Path) -> None:
    write(tmp_path / "a.yml", "scheduler: {type: MultiStepLR, milestones: [1]}\n")
    file = write(tmp_path / "b.yml", "_base_: a.yml\nscheduler: {_delete_: true, type: Cosine, periods: [9]}\n")
    assert load_options(file) == {"scheduler": {"type": "Cosine", "periods": [9]}}


def test_shipped_bases_are_found_from_anywhere(tmp_path: Path) -> None:
    file = write(tmp_path / "mine.yml", '_base_: ["qsr:train/pams/edsr_baseline_x4_w4a4.yml"]\nname: mine\n')
    options = load_options(file)
    assert options["name"] == "mine" and options["network_g"]["backbone"]["num_block"] == 16


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("a: !!python/object/apply:os.system ['touch owned']", "Python object tags are refused"),
        ("a: [1", "not plain YAML"),
        ("- 1", "expected a mapping"),
        ("_base_: missing.yml", "missing.yml does not exist"),
        ("_base_: self.yml", "leads back to"),
        ("_base_: config.py", "only .yml and .yaml"),
        ("recipe: {base: pams}\nnetwork_g: {type: EDSR}", "needs network_g.type QuantNet, got 'EDSR'"),
        ("network_g: {type: QuantNet}", "no recipe block"),
    ],
)
def test_bad_files_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, says: str) -> None:
    monkeypatch.chdir(tmp_path)
    write(tmp_path / "config.py", "raise SystemExit('executed')")
    with pytest.raises(OptionsError, match=says):
        load_options(write(tmp_path / "self.yml", text))
    assert not (tmp_path / "owned").exists()


def test_python_tag_in_a_base_is_refused(tmp_path: Path) -> None:
    write(tmp_path / "base.yml", f"a: !!python/object/apply:os.mkdir ['{tmp_path / 'owned'}']")
    with pytest.raises(OptionsError, match="Python object tags"):
        load_options(write(tmp_path / "top.yml", "_base_: base.yml"))
    assert not (tmp_path / "owned").exists()


def test_recipe_errors_name_the_key(tmp_path: Path) -> None:
    text = "network_g: {type: QuantNet, backbone: {type: EDSR}}\nrecipe: {base: pams, bits: {weigth: 4}}"
    with pytest.raises(RecipeError, match=r"recipe\.bits\.weigth: unknown key\. Did you mean 'weight'"):
        load_options(write(tmp_path / "a.yml", text))
