"""Surgery: which places rules choose, what stays untouched, and networks that describe themselves."""

from __future__ import annotations

import copy
import logging
import re

import pytest
import torch
from qsr_plugin.archs.roles import list_backbones
from torch import nn

from qsr_plugin.models.stages import bit_policies
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.places import ROLE_TABLES, find_places, places_named, roles_of
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.surgery import plugin_keys, quantize_model, quantizers, sites, tap
from tests.backbones import FITTING
from tests.recipes import custom_recipe, shipped


def placed(net: nn.Module, *rules: dict, bits: dict | None = None) -> dict[str, int]:
    """Places chosen by rules, with their bits."""
    return {f"{p.name}:{p.port}": p.bits for p in find_places(net, recipe(*rules, bits=bits))}


def recipe(*rules: dict, bits: dict | None = None):
    return load_recipe({"base": "pams", "placement": "mine", "placements": {"mine": list(rules)}, "bits": bits or {}})


def test_placement_of_pams_on_edsr(tiny_net) -> None:
    got = [f"{place.name}.{place.port}" for place in find_places(tiny_net(num_block=1), load_recipe("pams"))]
    want = ["body.0.input", "body.0.conv1.weight", "body.0.conv2.weight", "body.0.conv2.input", "body.0.conv2.output"]
    assert sorted(got) == sorted(want)


def test_wildcards_stay_within_a_part_or_span_parts(tiny_net) -> None:
    net = tiny_net()
    one = placed(net, {"match": "body.?.conv*", "port": "input"})
    assert set(one) == {f"body.{b}.conv{c}:input" for b in (0, 1) for c in (1, 2)}
    assert placed(net, {"match": "**conv?", "port": "input"}).keys() == one.keys()
    with pytest.raises(RecipeError, match=r"'\*conv1' matches no module"):
        placed(net, {"match": "*conv1", "port": "input"})
    dots = nn.ModuleDict({"axb": nn.Conv2d(3, 3, 1)})
    with pytest.raises(RecipeError, match="matches no module"):
        placed(dots, {"match": "a.b", "port": "input"})


def test_a_rule_may_ask_for_a_type_of_module(tiny_net) -> None:
    net = tiny_net()
    got = placed(net, {"match": "upsample.*", "type": "Conv2d", "port": "weight"})
    assert got == {"upsample.0:weight": 4}
    with pytest.raises(RecipeError, match="of type Linear matches no module of EDSR"):
        placed(net, {"match": "upsample.*", "type": "Linear", "port": "weight"})


def test_later_rules_win_and_that_is_logged_unless_they_name_the_place(
    tiny_net, caplog: pytest.LogCaptureFixture
) -> None:
    for later, told in (("body.1.*", True), ("body.1.conv1", False)):
        rules = [{"match": "body.*.conv1", "port": "input"}, {"match": later, "port": "input", "bits": 8}]
        caplog.clear()
        with caplog.at_level(logging.INFO, "qsr_plugin"):
            got = placed(tiny_net(), *rules)
        assert (got["body.0.conv1:input"], got["body.1.conv1:input"]) == (4, 8)
        said = "1 place(s) are decided by a later rule: body.1.conv1.input (rule 1 instead of 0)"
        assert (said in caplog.text) == told


def test_keep_float_removes_one_port_or_all_ports(tiny_net) -> None:
    both = [{"match": "body.*.conv1", "port": "input"}, {"match": "body.*.conv1", "port": "weight"}]
    shortcut = {"match": "body.*", "port": "shortcut"}
    one = placed(tiny_net(), *both, {"match": "body.0.conv1", "port": "input", "keep_float": True})
    assert set(one) == {"body.0.conv1:weight", "body.1.conv1:input", "body.1.conv1:weight"}
    assert set(placed(tiny_net(), *both, {"match": "body.0.conv1", "keep_float": True})) == {
        "body.1.conv1:input", "body.1.conv1:weight"
    }  # fmt: skip
    assert set(placed(tiny_net(), shortcut, {"match": "body.0", "keep_float": True})) == {"body.1:shortcut"}
    back = placed(tiny_net(), *both, {"match": "body.*.conv1", "keep_float": True}, both[0])
    assert set(back) == {"body.0.conv1:input", "body.1.conv1:input"}


def test_bits_of_32_leave_a_place_float(tiny_net) -> None:
    rules = [{"match": "body.*.conv1", "port": "input"}, {"match": "body.0.conv1", "port": "input", "bits": 32}]
    assert set(placed(tiny_net(), *rules)) == {"body.1.conv1:input"}
    weights = [{"match": "conv_last", "port": "weight"}, {"match": "conv_last", "port": "input"}]
    assert set(placed(tiny_net(), *weights, bits={"weight": 4, "act": 32})) == {"conv_last:weight"}


def test_places_with_bits_of_their_own_do_not_count_in_fab(tiny_net) -> None:
    net = quantize_model(tiny_net(), load_recipe("minmax", placement="full", weight_bits=4, act_bits=4))
    counted = {place for place, q in quantizers(net) if q.counts_in_fab}
    convs = {f"body.{b}.conv{c}.input" for b in (0, 1) for c in (1, 2)}
    assert counted == convs | {"conv_after_body.input"}
    assert {q.candidates for place, q in quantizers(net) if not q.counts_in_fab and q.role == "act"} == {(8,)}


@pytest.mark.parametrize(("method", "backbone"), FITTING)
def test_float_keys_stay_and_plugin_keys_are_the_rest(tiny_net, method: str, backbone: str) -> None:
    net = tiny_net(backbone)
    before = {key: value.clone() for key, value in net.state_dict().items()}
    names = [name for name, _ in net.named_parameters()]
    quantize_model(net, shipped(method, net))
    after = net.state_dict()
    stateful = any(part.state_dict() for part in (*(q for _, q in quantizers(net)), *bit_policies(net)))
    assert set(after) - set(before) == plugin_keys(net) and bool(plugin_keys(net)) == stateful
    assert all(torch.equal(after[key], value) for key, value in before.items())
    assert [name for name, _ in net.named_parameters() if name not in plugin_keys(net)] == names


def test_quantizers_follow_the_network_to_its_device_and_precision(tiny_net) -> None:
    net = quantize_model(tiny_net().to("meta"), load_recipe("pams", placement="shortcut_only"))
    assert {value.device.type for value in net.state_dict().values()} == {"meta"}


def test_deepcopy_gives_an_independent_network(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net(), "pams"), images)
    twin, want = copy.deepcopy(net), net(images[0])
    assert torch.equal(twin(images[0]), want)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(0.5)
    assert torch.equal(net(images[0]), want) and not torch.equal(twin(images[0]), want)
    ours = {id(module) for module in net.modules()}
    assert not ours & {id(module) for module in twin.modules()}


def test_sites_and_quantizers_are_listed_with_their_names(tiny_net) -> None:
    net = quantize_model(tiny_net(num_block=1), "minmax")
    assert [name for name, _ in sites(net)] == ["body.0.conv1", "body.0.conv2"]
    assert [place for place, _ in quantizers(net)] == [
        "body.0.conv1.input", "body.0.conv1.weight", "body.0.conv2.input", "body.0.conv2.weight"
    ]  # fmt: skip


def test_roles_are_found_for_subclasses_of_a_backbone(tiny_net) -> None:
    net = tiny_net()

    class Mine(type(net)):
        """A user's own variant."""

    net.__class__ = Mine
    assert roles_of(net)["head"] == ("conv_first",)
    assert list(quantizers(quantize_model(net, "pams")))
    assert roles_of(nn.Sequential()) == {}


@pytest.mark.parametrize("backbone", list_backbones())
def test_features_can_be_tapped_by_role_on_float_and_quantized_networks(tiny_net, images, backbone: str) -> None:
    plain = tap(tiny_net(backbone), "features", "f")
    want = tiny_net(backbone)(images[0])
    assert torch.equal(plain(images[0]), want)
    seen = plain.last_record().taps["f"]
    options = plain.backbone_options
    assert seen.shape[:2] == (2, options.get("num_feat") or options["embed_dim"])
    net = tap(
        calibrate(quantize_model(tiny_net(backbone), load_recipe("pams", weight_bits=32, act_bits=32)), images),
        "features",
        "f",
    )
    net(images[0])
    assert torch.equal(net.last_record().taps["f"], seen)


@pytest.mark.parametrize("backbone", list_backbones())
def test_what_works_in_place_behind_an_output_does_not_reach_its_tap(tiny_net, images, backbone: str) -> None:
    net, seen = tap(tiny_net(backbone), "head:output", "f"), []
    for _, head, _ in places_named(net, "head:output"):
        head.register_forward_hook(lambda module, inputs, output: seen.append(output.clone()))
    net(images[0])
    tapped = net.last_record().tapped("f")
    assert len(tapped) == len(seen) > 0 and all(map(torch.equal, tapped, seen))


def test_a_tap_that_does_not_exist_suggests_one(tiny_net) -> None:
    with pytest.raises(RecipeError, match="cannot tap 'featurs' of EDSR.*Near: features"):
        tap(tiny_net(), "featurs", "f")
    with pytest.raises(RecipeError, match="cannot tap 'conv_last:weight'"):
        tap(tiny_net(), "conv_last:weight", "f")


@pytest.mark.parametrize(
    ("place", "names"),
    [
        ("head:output", ["conv_first"]),
        ("block:output", ["body.0", "body.1"]),
        ("block.conv:input", ["body.0.conv1", "body.0.conv2", "body.1.conv1", "body.1.conv2"]),
        ("body.*.conv1:output", ["body.0.conv1", "body.1.conv1"]),
        ("features", ["upsample"]),
        ("block.residual", ["body.0.conv2", "body.1.conv2"]),
        ("block.residual:input", ["body.0.conv2", "body.1.conv2"]),
    ],
)
def test_places_are_named_by_role_pattern_or_role_and_port(tiny_net, place: str, names: list[str]) -> None:
    found = places_named(tiny_net(), place)
    assert [name for name, _, _ in found] == names
    port = place.partition(":")[2] or {"features": "input", "block.residual": "output"}[place]
    assert {spot for _, _, spot in found} == {port}


def test_places_of_a_role_with_several_patterns_are_in_module_order(tiny_net, monkeypatch) -> None:
    net = tiny_net()
    monkeypatch.setitem(ROLE_TABLES, "EDSR", {"pair": ("body.*.conv2", "body.*.conv1", "body.0.conv?")})
    assert [name for name, _, _ in places_named(net, "pair:input")] == [
        f"body.{block}.conv{conv}" for block in (0, 1) for conv in (1, 2)
    ]


@pytest.mark.parametrize(
    "place", ["head", "head:weight", "haed:output", "body.9:output", "conv_first", "block.shortcut"]
)
def test_places_that_cannot_be_tapped_say_what_can(tiny_net, place: str) -> None:
    with pytest.raises(RecipeError, match=f"cannot tap '{re.escape(place)}' of EDSR: give 'module:input'.*Near: "):
        places_named(tiny_net(), place)


def test_a_sequential_cannot_be_a_place() -> None:
    """Its quantizer would run as its last layer."""
    net = nn.Sequential(nn.Sequential(nn.Conv2d(3, 3, 1)))
    with pytest.raises(RecipeError, match="0 is a Sequential, .* match a module in it, e.g. '0.0'"):
        quantize_model(net, custom_recipe({"match": "0", "port": "input"}))
    assert type(net[0]) is nn.Sequential and getattr(net, "recipe", None) is None
