"""Option files: inheritance, safety, and that every shipped file is complete and valid."""

from __future__ import annotations

from pathlib import Path

import pytest
import yaml

from qsr_plugin.options_file import (
    OptionsError,
    arch_options,
    backbone_options,
    load_options,
    options_folder,
    parse_bits,
    scale_of,
)
from qsr_plugin.quant.recipe import RecipeError, load_recipe

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


def test_a_data_set_of_a_base_is_left_out_by_null(tmp_path: Path) -> None:
    (tmp_path / "mine.yml").write_text('_base_: ["qsr:test/benchmarks_x4.yml"]\ndatasets: {test_2: ~, test_3: ~}\n')
    assert [one["name"] for one in load_options(tmp_path / "mine.yml")["datasets"].values()] == ["Set5"]


def test_only_a_base_line_changes_the_backbone() -> None:
    folder = options_folder() / "train/pams"
    a, b = ((folder / f"{name}_x4_w4a4.yml").read_text().splitlines() for name in ("srresnet", "edsr_baseline"))
    different = [(x, y) for x, y in zip(a, b) if x != y and not x.startswith("name:")]
    assert different == [("  - ../../backbones/srresnet_x4.yml", "  - ../../backbones/edsr_baseline_x4.yml")]


@pytest.mark.parametrize("method", ["linq", "dorefa", "fqsr", "pams", "lsq", "daq", "ddtb", "quantsr", "odm"])
@pytest.mark.parametrize("backbone", ["edsr_baseline_x4", "edsr_small_x4", "srresnet_x4"])
def test_every_method_has_files_for_two_and_four_bits(method: str, backbone: str) -> None:
    """They differ in bits and name; and in batch norm, see below."""
    two, four = (
        load_options(options_folder() / "train" / method / f"{backbone}_w{bits}a{bits}.yml") for bits in (2, 4)
    )
    assert two["network_g"]["recipe"]["bits"] == {"weight": 2, "act": 2}
    assert two["name"] == four["name"].replace("w4a4", "w2a2") == f"{method}_{backbone}_w2a2"
    two["network_g"]["recipe"]["bits"], two["name"] = four["network_g"]["recipe"]["bits"], four["name"]
    for stage in two["network_g"]["recipe"]["stages"]:
        stage["freeze_batch_norm"] = False
    assert two == four


@pytest.mark.parametrize("method", ["linq", "pams"])
def test_two_bits_with_ranges_of_the_largest_value_freeze_batch_norm(method: str) -> None:
    """The stages are those of the recipe, with batch norm frozen in all of them."""
    options = load_options(options_folder() / "train" / method / "srresnet_x4_w2a2.yml")
    stages = load_recipe(options["network_g"]["recipe"]).stages
    assert stages == tuple(one.model_copy(update={"freeze_batch_norm": True}) for one in load_recipe(method).stages)


def test_a_backbone_by_name_or_file(tmp_path: Path) -> None:
    """The block of a float network may stand alone or in that of a quantized one."""
    shipped = backbone_options("edsr_small_x4")
    assert shipped["num_feat"] == 32 and scale_of(shipped) == 4
    plain = write(tmp_path / "plain.yml", yaml.safe_dump({"network_g": shipped}))
    assert backbone_options(str(plain)) == shipped
    with pytest.raises(OptionsError, match="unknown backbone 'edsr_smal_x4'. Did you mean 'edsr_small_x4'"):
        backbone_options("edsr_smal_x4")
    with pytest.raises(OptionsError, match=r"none\.yml has no network_g block"):
        arch_options(str(write(tmp_path / "none.yml", "name: mine")))
    assert scale_of({"type": "Mine", "scale": 3}) == 3
    with pytest.raises(OptionsError, match="options of Mine name no scale: add upscale"):
        scale_of({"type": "Mine"})


def test_bits_in_short() -> None:
    """Weights first; anything else is refused with an example."""
    assert parse_bits("W4A6") == parse_bits("w4a6") == (4, 6)
    for wrong in ("4", "W4", "A4W4", "W4A4 "):
        with pytest.raises(OptionsError, match=f"bits are '{wrong}'; expected .* W4A4"):
            parse_bits(wrong)


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
    with pytest.raises(OptionsError, match="no option 'datasets:trian:gt_size'. Did you mean 'train'"):
        load_options(file, ["datasets:trian:gt_size=64"])


def test_what_no_shipped_file_sets_can_be_forced(tmp_path: Path) -> None:
    file = write(tmp_path / "a.yml", '_base_: ["qsr:train/quantsr/edsr_small_x4_w4a4.yml"]\n')
    val = load_options(file, ["val:depth=2", "val:patches:size=48", "val:patches:overlap=4"])["val"]
    assert val["depth"] == 2 and val["patches"] == {"size": 48, "overlap": 4}


@pytest.mark.parametrize(
    ("text", "says"),
    [
        ("recepie: {bits: {act: 4}}", "recepie is in no _base_. Did you mean 'recipe'"),
        ("trian: {total_iter: 40}", "trian is in no _base_. Did you mean 'train'"),
        ("train: {total_iters: 40}", "train.total_iters is in no _base_. Did you mean 'total_iter'"),
        ("datasets: {train: {gtsize: 64}}", "datasets.train.gtsize is in no _base_. Did you mean 'gt_size'"),
        ("val: {val_feq: 20}", "val.val_feq is in no _base_. Did you mean 'val_freq'"),
    ],
)
def test_a_key_that_looks_like_one_of_a_base_is_a_slip(tmp_path: Path, text: str, says: str) -> None:
    base = '_base_: ["qsr:train/lsq/edsr_small_x4_w4a4.yml"]\n'
    with pytest.raises(OptionsError, match=says):
        load_options(write(tmp_path / "a.yml", base + text))


@pytest.mark.parametrize(
    "text",
    [
        "path: {pretrain_network_d: d.pth}",
        "train: {optim_d: {type: Adam, lr: 1.0e-4}, ema_decay: 0.9}",
        "datasets: {val_2: {name: mine, type: PairedImageDataset}}",
        "train: {scheduler: {_delete_: true, type: CosineAnnealingRestartLR, milestone: [5]}}",
    ],
)
def test_other_keys_of_the_host_are_taken(tmp_path: Path, text: str) -> None:
    base = '_base_: ["qsr:train/lsq/edsr_small_x4_w4a4.yml"]\n'
    load_options(write(tmp_path / "a.yml", base + text))


def test_a_key_that_looks_like_a_slip_is_taken_from_a_base_of_its_own(tmp_path: Path) -> None:
    write(tmp_path / "own.yml", "train: {total_iters: 40}")
    text = '_base_: ["qsr:train/lsq/edsr_small_x4_w4a4.yml", own.yml]\n'
    assert load_options(write(tmp_path / "a.yml", text))["train"]["total_iters"] == 40


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


def test_a_cache_that_another_process_is_writing_is_read_again(tmp_path: Path, run_python) -> None:
    """After an installation all processes of a training import yapf, through mmengine, at the same time."""
    said = run_python(
        """
import os, sys, time
from importlib.metadata import version
from pathlib import Path

name = f"Grammar-py{'.'.join(map(str, sys.version_info))}.pickle"
half_written = Path(os.environ["XDG_CACHE_HOME"]) / "YAPF" / version("yapf") / name
half_written.parent.mkdir(parents=True)
half_written.touch()
time.sleep = lambda seconds: half_written.unlink()  # as if the other process had got on

from qsr_plugin.options_file import assemble, options_folder

print(assemble(options_folder() / "backbones/edsr_small_x4.yml")["network_g"]["backbone"]["type"], half_written.is_file())
""",
        env={"XDG_CACHE_HOME": str(tmp_path / "cache")},
    )
    assert said.split() == ["EDSR", "True"]
