"""Validation of a network whose bits depend on the image, in the host's loop."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from basicsr.models.sr_model import SRModel
from torch import nn

from qsr_plugin.models import validation, validation_results
from qsr_plugin.models.validation import Validation
from qsr_plugin.options_file import OptionsError
from qsr_plugin.report.result_io import read_results
from tests.quant.choosers import quantized

PLACES = [f"body.{block}.conv{conv}.input" for block in (0, 1) for conv in (1, 2)]


class Host(SRModel):
    """The host's model without its training."""

    def __init__(self, opt: dict) -> None:
        self.opt, self.device = opt, torch.device("cpu")


class Model(Validation, Host):
    """What is under test, with a network put in by hand."""


class Lines(list):
    """A logger and a TensorBoard writer in one."""

    def info(self, message: str) -> None:
        self.append(message)

    def add_scalar(self, name: str, value: float, step: int) -> None:
        self.append((name, round(float(value), 4), step))


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """Where results are written."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture
def adaptive(choosers: None, images: list[torch.Tensor]) -> nn.Module:
    """Dark images get 4 bits, medium ones 6, bright ones 8."""
    return quantized("toy_brightness", images)


def model_of(net: nn.Module, **val: object) -> Model:
    metrics = {"psnr": {"type": "calculate_psnr", "crop_border": 0}}
    run = {"dist": False, "rank": 0, "scale": 1, "is_train": True, "name": "x", "manual_seed": 3}
    model = Model({"val": {"metrics": metrics, **val}, **run, "path": {"experiments_root": "runs"}})
    model.net = net
    return model


def validate(model: Model, monkeypatch: pytest.MonkeyPatch) -> Lines:
    """Validate on a dark image, and on one that is dark on the left and bright on the right."""
    dark, half = torch.full((1, 3, 16, 16), 0.1), torch.full((1, 3, 16, 32), 0.1)
    half[..., 16:] = 0.9
    items = [{"lq": x, "gt": x.clone(), "lq_path": [f"{index}.png"]} for index, x in enumerate((dark, half))]
    dataset = type("Images", (list,), {"opt": {"name": "Set2"}})(items)
    told = Lines()
    monkeypatch.setattr(validation, "get_root_logger", lambda: told)
    model.validation(torch.utils.data.DataLoader(dataset, batch_size=None), 7, told)
    return told


def test_bits_are_told_once_per_validation(adaptive: nn.Module, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(adaptive)
    for _ in range(2):  # the second one starts anew
        told = validate(model, monkeypatch)
        assert "\t # FAB Set2: 5.000" in told
        (bits,) = (line for line in told if isinstance(line, str) and line.startswith("bits "))
        shares, *places = bits.splitlines()
        assert shares == "bits Set2: 4: 50 %, 6: 50 %; image FAB 4.00 to 6.00"
        assert " ".join(places).replace("\t", "") == ", ".join(f"{place}: 5.00" for place in PLACES)
        assert ("metrics/Set2/fab", 5.0, 7) in told
        assert ("metrics/Set2/share_of_4_bits", 0.5, 7) in told and ("metrics/Set2/share_of_6_bits", 0.5, 7) in told


def test_results_are_written(adaptive: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The last validation of a training, with costs at the bits that were chosen; a test beside its pictures."""
    model = model_of(adaptive)
    for _ in range(2):
        validate(model, monkeypatch)
    (result,) = read_results(folder / "runs" / "results.json")
    quality = result.quality["Set2"]
    assert (quality.fab, quality.images, quality.colour, quality.border) == (5.0, 2, "RGB", 0)
    assert quality.psnr == pytest.approx(model.metric_results["psnr"]) and quality.ssim is None
    assert result.costs.fab == pytest.approx(5.0) and result.costs.bitops > 0
    assert result.training.iterations == 7 and result.seed == 3 and result.details == {"run": "x"}
    assert result.recipe == adaptive.recipe.to_dict()
    cut = {"size": 10, "overlap": 2, "last": "enlarge"}
    model = model_of(adaptive, patches=cut)
    model.opt.update(is_train=False, path={"results_root": "results", "pretrain_network_g": "net.pth"})
    validate(model, monkeypatch)
    (result,) = read_results(folder / "results" / "results.json")
    assert result.quality["Set2"].patches == result.costs.patches == cut
    assert result.model == "net.pth" and result.training is None


def test_a_file_that_cannot_be_written_ends_nothing(
    adaptive: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The log names the file and the reason."""
    (folder / "runs").write_text("a file where a folder should be")
    warnings = Lines()
    monkeypatch.setattr(warnings, "warning", warnings.append, raising=False)
    monkeypatch.setattr(validation_results, "get_root_logger", lambda: warnings)
    assert "\t # FAB Set2: 5.000" in validate(model_of(adaptive), monkeypatch)
    (said,) = warnings
    assert said.startswith(f"{Path('runs') / 'results.json'} was not written") and "runs is a file" in said


def test_no_psnr_no_results(adaptive: nn.Module, folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = model_of(adaptive)
    model.opt["val"]["metrics"] = {"alike": {"type": "calculate_ssim", "crop_border": 0}}
    validate(model, monkeypatch)
    assert not (folder / "runs").exists()


@pytest.mark.parametrize("batch", [1, 16])
def test_patches_weigh_alike_in_batches_of_any_size(
    adaptive: nn.Module, monkeypatch: pytest.MonkeyPatch, batch: int
) -> None:
    """Columns start at 0, 8 and 16: dark, dark with two bright columns, bright; the last is 16 pixels wide, not 10."""
    model = model_of(adaptive, patches={"size": 10, "overlap": 2, "last": "enlarge", "batch": batch})
    validate(model, monkeypatch)
    found = model._tally.statistics()
    assert (found.lowest, found.highest) == (4.0, pytest.approx((4 + 4 + 8) / 3))
    assert found.shares == {"4": pytest.approx((1 + 2 / 3) / 2), "8": pytest.approx(1 / 6)}


def test_patches_shrink_only_where_bits_are_fixed(
    adaptive: nn.Module, images: list[torch.Tensor], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Other patches choose other bits, and the log would not say so."""

    def scarce(net: nn.Module, side: int) -> Model:
        def check(module: nn.Module, args: tuple[torch.Tensor]) -> None:
            if args[0].shape[0] * args[0].shape[-1] > side:
                raise torch.OutOfMemoryError("out of memory")

        net.register_forward_pre_hook(check)
        return model_of(net, patches={"size": 32, "overlap": 0, "last": "shift", "batch": 2})

    validate(scarce(quantized("toy_brightness", images, bits={"weight": 8, "act": 4}), 16), monkeypatch)
    validate(model := scarce(adaptive, 32), monkeypatch)
    assert model._tally.statistics().highest == 6.0  # one patch, not a dark and a bright one
    with pytest.raises(torch.OutOfMemoryError):
        validate(scarce(adaptive, 16), monkeypatch)


def test_fixed_bits_need_no_shares(images, choosers: None, monkeypatch: pytest.MonkeyPatch) -> None:
    told = validate(model_of(quantized("toy_brightness", images, bits={"weight": 8, "act": 4})), monkeypatch)
    assert "\t # FAB Set2: 4.000" in told
    assert not any("bits" in str(line) for line in told)


def test_modes_and_a_batch_of_whole_images(adaptive: nn.Module) -> None:
    model = model_of(adaptive)
    adaptive.train()
    adaptive.body[0].eval()
    model.lq = torch.stack([torch.full((3, 8, 8), value) for value in (0.1, 0.9)])
    model.test()
    assert adaptive.training and not adaptive.body[0].training and not model.output.requires_grad
    assert model._tally.statistics().shares == {"4": 0.5, "8": 0.5}


@pytest.mark.parametrize("patches", [{"size": 8, "stride": 4}, {"size": 8, "overlap": 8}])
def test_wrong_patches_are_told_before_anything_is_built(patches: dict) -> None:
    with pytest.raises(OptionsError, match=r"val\.patches"):
        model_of(nn.Identity(), patches=patches)


@pytest.mark.parametrize(("key", "meant"), [("patchs", "patches"), ("detph", "depth"), ("Patches", "patches")])
def test_slips_of_our_keys_are_told(key: str, meant: str) -> None:
    with pytest.raises(
        OptionsError, match=rf"val\.{key}: unknown key\. Did you mean '{meant}'\? Allowed: depth, patches"
    ):
        model_of(nn.Identity(), **{key: 2})


def test_keys_of_the_host_are_free() -> None:
    model_of(nn.Identity(), val_freq=5, save_img=False, suffix=None, use_pbar=True, pbar=False, grids=False, depth=2)
