"""Calibration: what it reads, what it sets, and what it leaves alone."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from qsr_plugin.archs.roles import list_backbones
from torch import Tensor, nn

from qsr_plugin.quant.calibrate import calibrate, calibrating, image_batches
from qsr_plugin.quant.quantizer import NotCalibratedError
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.backbones import names_of


def ranges(net: nn.Module) -> dict[str, Tensor]:
    return {key: value.clone() for key, value in net.state_dict().items() if "_quantizer." in key}


def same(a: dict[str, Tensor], b: dict[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)


@pytest.fixture
def net(tiny_net) -> nn.Module:
    return quantize_model(tiny_net(), "pams")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    generator = np.random.default_rng(0)
    for name, size in (("b", (8, 8)), ("a", (7, 10)), ("c", (9, 6))):
        Image.fromarray(generator.integers(0, 256, (*size, 3), dtype=np.uint8)).save(tmp_path / f"{name}.png")
    return tmp_path


def test_ranges_are_those_of_the_float_network_joined_in_order(tiny_net, images) -> None:
    seen: list[Tensor] = []
    plain = tiny_net()
    plain.body[0].register_forward_pre_hook(lambda module, args: seen.append(args[0].abs().flatten(1).amax(1).mean()))
    for batch in images:
        plain(batch)
    want = seen[0]
    for value in seen[1:]:
        want = 0.9 * want + 0.1 * value
    net = calibrate(quantize_model(tiny_net(), "pams"), images)
    assert net.body[0].quantizer("input").alpha.item() == pytest.approx(want.item(), rel=1e-6)
    turned = calibrate(quantize_model(tiny_net(), "pams"), images[::-1])
    assert not same(ranges(net), ranges(turned)), "the order of the batches matters"


def test_weight_ranges_come_from_the_weights(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net(), "minmax"), images)
    conv = net.body[0].conv1
    assert conv.quantizer("weight").bound.item() == conv.weight.abs().max().item()


def test_a_folder_a_loader_and_dicts_of_the_host_give_the_same_ranges(tiny_net, folder: Path) -> None:
    batches = list(image_batches(folder))
    assert [tuple(batch.shape) for batch in batches] == [(1, 3, 7, 10), (1, 3, 8, 8), (1, 3, 9, 6)]
    assert all(float(batch.min()) >= 0 and float(batch.max()) <= 1 for batch in batches)
    loader = torch.utils.data.DataLoader([{"lq": batch[0], "lq_path": "x"} for batch in batches], batch_size=1)
    sources = [folder, str(folder), batches, iter(batches), loader, ({"lq": batch} for batch in batches)]
    found = [ranges(calibrate(quantize_model(tiny_net(), "percentile"), source)) for source in sources]
    assert all(same(found[0], other) for other in found[1:])


def test_calibrating_again_replaces_the_first(net, images) -> None:
    first = ranges(calibrate(net, images))
    other = ranges(calibrate(net, [batch * 0.1 for batch in images]))
    assert not same(first, other)
    assert same(first, ranges(calibrate(net, images)))


@pytest.mark.parametrize("backbone", list_backbones())
@pytest.mark.parametrize("training", [True, False])
def test_weights_statistics_modes_and_gradients_are_untouched(tiny_net, images, backbone: str, training: bool) -> None:
    net = quantize_model(tiny_net(backbone), "pams").train(training)
    net.get_submodule(names_of(net, "block")[0]).eval()
    modes = {name: module.training for name, module in net.named_modules()}
    before = {key: value.clone() for key, value in net.state_dict().items() if "_quantizer." not in key}
    calibrate(net, images)
    assert {name: module.training for name, module in net.named_modules()} == modes
    after = net.state_dict()
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert all(parameter.grad is None and parameter.requires_grad for parameter in net.parameters())


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ([], "no calibration images"),
        ([torch.rand(3, 8, 8)], r"batch 0 is \(3, 8, 8\): expected a float tensor"),
        ([torch.zeros(1, 3, 8, 8, dtype=torch.uint8)], "expected a float tensor"),
        ([torch.rand(1, 8, 8, 3)], r"batch 0 is \(1, 8, 8, 3\), with its channels last: .permute\(0, 3, 1, 2\)"),
        (["x.png"], "batch 0 is str"),
        ([{"gt": torch.rand(1, 3, 8, 8)}], "batch 0 is dict.*'lq'"),
        ([torch.rand(1, 3, 8, 8), torch.full((1, 3, 8, 8), float("nan"))], "batch 1 holds NaN or infinity"),
        ([torch.full((1, 3, 8, 8), -float("inf"))], "batch 0 holds NaN or infinity"),
    ],
)
def test_a_failed_calibration_says_why_and_leaves_the_ranges_as_they_were(net, images, source, message: str) -> None:
    calibrate(net, images)
    before = ranges(net)
    with pytest.raises(ValueError, match=message):
        calibrate(net.train(), source)
    assert same(before, ranges(net)) and net.training and net.body[0].training
    net(images[0])


def test_a_failing_forward_leaves_the_ranges_as_they_were(net, images) -> None:
    calibrate(net, images)
    before = ranges(net)
    with pytest.raises(KeyError), calibrating(net):
        net(images[0] * 5)
        raise KeyError
    assert same(before, ranges(net))
    assert same(ranges(calibrate(net, images)), before), "no observer is left over"


def test_a_weight_that_is_not_finite_is_named_before_any_range_changes(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net(), "minmax"), images)
    before = ranges(net)
    with torch.no_grad():
        net.body[1].conv2.weight[0, 0, 0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"body\.1\.conv2\.weight: observed a non-finite value"):
        calibrate(net, images)
    assert same(before, ranges(net))


def test_folders_without_images_say_what_was_looked_for(net, tmp_path: Path) -> None:
    (tmp_path / "notes.txt").write_text("x", "utf-8")
    with pytest.raises(ValueError, match="notes.txt"):
        calibrate(net, tmp_path)
    with pytest.raises(ValueError, match="nowhere"):
        calibrate(net, tmp_path / "nowhere")


def test_float_networks_are_refused(tiny_net, images) -> None:
    with pytest.raises(RuntimeError, match="EDSR is not quantized: call quantize_model"):
        calibrate(tiny_net(), images)


def test_a_single_image_is_warned_about(net, images, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING, "qsr_plugin"):
        calibrate(net, images)
        assert not caplog.records
        calibrate(net, [images[0][:1]])
    assert [record.message for record in caplog.records] == [
        "calibrated on one image only: ranges may not fit others; 16 or more are advised"
    ]


def test_images_are_read_one_at_a_time(net, images) -> None:
    events: list[str] = []
    net.register_forward_pre_hook(lambda *_: events.append("run"))

    def reader():
        for batch in images:
            events.append("read")
            yield batch

    calibrate(net, reader())
    assert events == ["read", "run"] * 3


def test_running_before_calibration_names_the_place_and_the_remedy(net, images) -> None:
    with pytest.raises(NotCalibratedError, match=r"not calibrated: body\.0\.input\. Run qsr_plugin\.calibrate"):
        net(images[0])
    with pytest.raises(NotCalibratedError):
        net.eval()(images[0])


def test_a_float_recipe_needs_no_ranges(tiny_net, images) -> None:
    net = quantize_model(tiny_net(), load_recipe("pams", weight_bits=32, act_bits=32))
    assert torch.equal(calibrate(net, images)(images[0]), tiny_net()(images[0]))


def test_all_places_are_calibrated_afterwards(net, images) -> None:
    assert not all(q.is_calibrated for _, q in quantizers(net))
    calibrate(net, images)
    assert all(q.is_calibrated for _, q in quantizers(net))
