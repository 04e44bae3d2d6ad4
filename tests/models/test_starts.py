"""Where quantized networks start from: another quantized network; and what their stages may then adapt."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import checkpoint, compat
from qsr_plugin.checkpoint import CheckpointError, save_quantized, save_torch
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import plugin_keys, quantize_model
from tests.host import harness

compat.import_host()

from qsr_plugin.archs.roles import list_backbones  # noqa: E402

from qsr_plugin.models import loading  # noqa: E402
from qsr_plugin.models.loading import adopt  # noqa: E402
from qsr_plugin.models.run_state import changed_keys  # noqa: E402
from qsr_plugin.models.stages import check_stages, parameter_groups, project  # noqa: E402

pytestmark = pytest.mark.usefixtures("choosers")

CANDIDATES = [4, 6, 8]


def quantized(plain: nn.Module, images: list[Tensor], **changes: Any) -> nn.Module:
    return calibrate(quantize_model(plain, load_recipe("pams", **changes)), images)


def other(plain: nn.Module, policy: str = "toy_selector", act: Any = CANDIDATES, **changes: Any) -> nn.Module:
    """The same places with a policy, not calibrated, with other float weights."""
    bits = {"weight": 4, "act": act}
    net = quantize_model(plain, load_recipe("pams", policy=policy, bits=bits, **changes))
    with torch.no_grad():
        for parameter in parameter_groups(net)["weights"]:
            parameter.add_(1.0)
    return net


@pytest.mark.parametrize("backbone", list_backbones())
def test_a_saved_network_of_every_backbone_is_taken_up(tiny_net, images, tmp_path: Path, backbone: str) -> None:
    """Files lack the tables of transformers; a start and a loaded checkpoint have the numbers of the network saved."""
    saved, path = quantized(tiny_net(backbone), images), str(tmp_path / "net.safetensors")
    save_quantized(saved, path)

    class Model(loading.Loading):
        get_bare_model = staticmethod(lambda net: net)
        is_train = False

    starting, loaded = (quantize_model(tiny_net(backbone), load_recipe("pams")) for _ in range(2))
    for net in (starting, loaded):
        with torch.no_grad():
            for parameter in parameter_groups(net)["weights"]:
                parameter.add_(1.0)
    adopt(starting, path)
    Model().load_network(loaded, path)
    want = saved.state_dict()
    for net in (starting, loaded):
        assert all(torch.equal(value, want[key]) for key, value in net.state_dict().items())


def test_a_file_with_the_tables_of_a_transformer_is_read(tiny_net, images, tmp_path: Path, monkeypatch) -> None:
    saved, path = quantized(tiny_net("SwinIR"), images), tmp_path / "net.safetensors"
    monkeypatch.setattr(checkpoint, "persistent_state", lambda net: net.state_dict())
    save_quantized(saved, path)
    assert any(key.endswith("relative_position_index") for key in checkpoint.read_file(path)[0])
    loaded = checkpoint.load_quantized(path)
    assert all(torch.equal(value, saved.state_dict()[key]) for key, value in loaded.state_dict().items())


def test_a_range_becomes_that_of_every_candidate(tiny_net, images, tmp_path: Path) -> None:
    first, second = quantized(tiny_net(), images), other(tiny_net())
    own = {key: value.clone() for key, value in second.state_dict().items() if "_policy." in key}
    save_quantized(first, tmp_path / "net.safetensors")
    adopt(second, str(tmp_path / "net.safetensors"))
    state = second.state_dict()
    for key, value in first.state_dict().items():
        assert torch.equal(state[key], value.expand_as(state[key])), key
    assert own and all(torch.equal(state[key], value) for key, value in own.items()), "policies keep their start"
    alpha = second.body[0].quantizer("input").alpha
    assert alpha.shape == (3,) and alpha.is_contiguous() and alpha.storage_offset() == 0
    second(images[0])  # is calibrated
    with torch.no_grad():
        alpha[0] += 1.0
    assert alpha[1] != alpha[0], "each candidate has a number of its own"


@pytest.mark.parametrize("kind", ["safetensors", "params", "module"])
def test_policies_of_the_start_are_left_behind(tiny_net, images, tmp_path: Path, kind: str) -> None:
    first, second = calibrate(other(tiny_net(), "toy_gate"), images), other(tiny_net(), "toy_brightness")
    with torch.no_grad():
        for index, quantizer in enumerate(parameter_groups(first)["ranges"]):
            quantizer.copy_(torch.tensor([1.0, 2.0, 3.0]) + index)
    limits = second.bit_policy.limits.clone()
    if kind == "safetensors":
        save_quantized(first, path := tmp_path / "net.safetensors")
    else:
        state = {("module." if kind == "module" else "") + key: value for key, value in first.state_dict().items()}
        save_torch({"params": state}, path := tmp_path / "net.pth")
    adopt(second, str(path))
    state = second.state_dict()
    shared = [key for key in first.state_dict() if "_policy." not in key]
    assert all(torch.equal(state[key], first.state_dict()[key]) for key in shared)
    assert torch.equal(second.bit_policy.limits, limits)
    back = other(tiny_net(), act=4, policy="fixed")
    with pytest.raises(CheckpointError, match=r"shape: .*alpha is \(3,\), the network wants \(\)"):
        adopt(back, str(path))


@pytest.mark.parametrize("case", ["backbone", "depth", "placement", "float"])
def test_a_start_that_does_not_fit_changes_nothing(tiny_net, images, tmp_path: Path, case: str) -> None:
    path = str(tmp_path / "net.safetensors")
    if case == "backbone":
        first = quantized(tiny_net("SRResNet"), images)
    elif case == "depth":
        first = quantized(tiny_net(num_block=3), images)
    else:
        first = quantized(tiny_net(), images, placement="body" if case == "placement" else "quantized_input")
    if case == "float":
        added = plugin_keys(first)
        path = str(tmp_path / "net.pth")
        save_torch({"params": {key: v for key, v in first.state_dict().items() if key not in added}}, path)
    else:
        save_quantized(first, path)
    second = other(tiny_net())
    before = {key: value.clone() for key, value in second.state_dict().items()}
    with pytest.raises(CheckpointError, match="path.pretrain_network_quantized: .* does not fit recipe and backbone"):
        adopt(second, path)
    assert harness.differences(before, second.state_dict()) == []


@pytest.mark.parametrize(
    ("changes", "told"),
    [
        ({"bits": {"weight": 4, "act": [3, 5, 7]}}, r"bits.act: its ranges are for \(4, 6, 8\), .* wants \(3, 5, 7\)"),
        (
            {"quantizers": {"weight": {"type": "dorefa_weight"}}},
            "quantizers.weight: it has 'maxabs', the recipe wants 'dorefa_weight'",
        ),
    ],
)
def test_ranges_made_for_something_else_are_refused(tiny_net, images, tmp_path: Path, changes, told: str) -> None:
    save_quantized(calibrate(other(tiny_net()), images), path := tmp_path / "net.safetensors")
    second = quantize_model(tiny_net(), load_recipe(other(tiny_net()).recipe, **changes))
    assert checkpoint.key_differences(second.state_dict(), other(tiny_net()).state_dict()) == []
    with pytest.raises(CheckpointError, match=told):
        adopt(second, str(path))


def test_other_weight_bits_and_quantizer_options_are_told(tiny_net, images, tmp_path: Path, monkeypatch) -> None:
    told: list[str] = []
    monkeypatch.setattr(loading.logger, "warning", lambda text, *values: told.append(text % values))
    weight = {"type": "dorefa_weight", "rescale": False}
    first = quantized(tiny_net(), images, bits={"weight": 8, "act": 8}, quantizers={"weight": weight})
    save_quantized(first, path := tmp_path / "net.safetensors")
    adopt(other(tiny_net(), quantizers={"weight": {**weight, "rescale": True}}), str(path))
    assert [line.partition("recipe: ")[2] for line in told] == [
        "recipe.bits.weight: saved 8, now 4",
        "recipe.quantizers.weight.rescale: saved False, now True",
    ]


def test_long_values_are_cut_in_messages() -> None:
    (line,) = changed_keys({"table": list(range(99))}, {"table": {"rows": 4}})
    assert (
        line.startswith("recipe.table: saved [0, 1, 2, ") and line.endswith("..., now {'rows': 4}") and len(line) < 130
    )


def test_thresholds_that_follow_nothing_are_warned_about(tiny_net, images, caplog) -> None:
    (stage,) = load_recipe("pams", stages=[{"adapt_thresholds": True}]).stages
    for policy, told in (("toy_brightness", False), ("toy_gate", True)):
        caplog.clear()
        check_stages([stage], calibrate(other(tiny_net(), policy), images))
        assert ("adapt_thresholds has no effect" in caplog.text) == told
    net = other(tiny_net(), "toy_gate")
    project(net)
    assert net.bit_policy.limit.item() == 1.0
