"""What the bit policies of a network share: built once, asked once per forward, learned, stored beside the weights."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.models.stages import bit_policies, parameter_groups, project
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.quantizer import StrictOptions
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.record import float_mode, record_root
from qsr_plugin.quant.surgery import plugin_keys, policies, quantize_model
from qsr_plugin.report.complexity import complexity
from qsr_plugin.report.fab import feature_average_bits
from qsr_plugin.report.storage import storage_bits
from tests.quant.choosers import CANDIDATES, Gate, Net, bright_to_dark, quantized, recipe, trained

pytestmark = pytest.mark.usefixtures("choosers")

PLACES = tuple(f"body.{block}.conv{conv}.input" for block in (0, 1) for conv in (1, 2))


def test_one_part_is_built_for_all_places_and_knows_them(images) -> None:
    net = quantized("toy_gate", images)
    assert [name for name, _ in policies(net)] == list(PLACES)
    assert isinstance(net.bit_policy, Gate) and net.bit_policy.places == PLACES
    assert net.bit_policy.linear.in_features == 4, "as many as the head makes"
    assert [part for part in bit_policies(net) if part is net.bit_policy] == [net.bit_policy]
    assert net.bit_policy.options == StrictOptions() and net.bit_policy.candidates == CANDIDATES


def test_places_with_one_width_do_not_ask(images) -> None:
    rules = [*recipe("toy_gate")["placements"]["all"], {"match": "**conv2", "port": "input", "bits": 8}]
    net = quantized("toy_gate", images, placements={"all": rules})
    assert net.bit_policy.places == ("body.0.conv1.input", "body.1.conv1.input")
    net(images[0])
    assert net.last_record().bits["body.0.conv2.input"] == 8
    fixed = quantized("toy_gate", images, bits={"weight": 8, "act": 4})
    assert not hasattr(fixed, "bit_policy") and fixed.recipe.policy.type == "toy_gate"


def test_it_follows_device_and_mode_of_the_network() -> None:
    net = quantize_model(Net().to("meta").eval(), recipe("toy_gate"))
    assert {value.device.type for value in net.state_dict().values()} == {"meta"}
    assert not net.bit_policy.training and quantize_model(Net(), recipe("toy_gate")).bit_policy.training


def test_its_keys_are_added_ones_and_float_weights_still_fit(images) -> None:
    plain, net = Net(), quantized("toy_gate", images)
    shared = {"bit_policy.linear.weight", "bit_policy.linear.bias", "bit_policy.limit"}
    assert shared <= plugin_keys(net) == net.state_dict().keys() - plain.state_dict().keys()
    own = {key for key in plugin_keys(quantized("toy_selector", images)) if "_policy." in key}
    assert own == {f"{place}_policy.linear.{part}" for place in PLACES for part in ("weight", "bias")}


def test_parameters_are_in_the_groups_of_policies_and_come_back_into_range(images) -> None:
    net = quantized("toy_gate", images)
    groups, shared = parameter_groups(net), net.bit_policy
    assert {id(p) for p in groups["bits"]} == {id(shared.linear.weight), id(shared.linear.bias)}
    assert [id(p) for p in groups["thresholds"]] == [id(shared.limit)] and not groups["others"]
    assert sum(map(len, groups.values())) == len(list(net.parameters()))
    assert shared.limit.item() == 2.0
    project(net)
    assert shared.limit.item() == 1.0
    assert len(parameter_groups(quantized("toy_selector", images))["bits"]) == 2 * len(PLACES)


def test_a_copy_has_its_own(images) -> None:
    net = quantized("toy_gate", images)
    batch = bright_to_dark(4)
    want = net(batch)
    twin = copy.deepcopy(net)
    with torch.no_grad():
        twin.bit_policy.linear.weight.neg_()
    assert torch.equal(net(batch), want) and not torch.equal(twin(batch), want)
    assert twin.last_record().policy is twin.bit_policy and net.last_record().policy is net.bit_policy


def test_it_is_asked_once_per_forward_and_sees_the_image_without_graph(images) -> None:
    net = quantized("toy_brightness", images)
    asked = net.bit_policy.asked
    batch = bright_to_dark(3).requires_grad_()
    net(batch)
    record = net.last_record()
    assert net.bit_policy.asked == asked + 1
    assert torch.equal(record.image, batch) and not record.image.requires_grad
    assert len({id(bits) for bits in record.bits.values()}) == 1 and tuple(record.bits) == PLACES
    net(batch)
    assert net.bit_policy.asked == asked + 2
    with float_mode():
        net(batch)
    assert net.bit_policy.asked == asked + 2, "a float network has no bits to choose"


@pytest.mark.parametrize("policy", ["toy_brightness", "toy_gate", "toy_selector"])
def test_an_image_is_treated_the_same_in_any_batch(images, policy: str) -> None:
    batch = bright_to_dark(16)
    net = trained(quantized(policy, images), batch)
    together = net(batch)
    bits = net.last_record().bits
    assert all(set(chosen.tolist()) == set(map(float, CANDIDATES)) for chosen in bits.values())
    for first, last in ((0, 1), (5, 6), (15, 16), (11, 16)):
        assert torch.allclose(net(batch[first:last]), together[first:last], atol=1e-6)
        for place, chosen in net.last_record().bits.items():
            assert torch.equal(chosen, bits[place][first:last])
    mean = torch.stack(list(net.last_record().bits.values())).mean().item()
    assert feature_average_bits(net, net.last_record()) == pytest.approx(mean)


class Windows(nn.Module):
    """Folds the four quarters of each image into the batch, image after image, before its layer."""

    def __init__(self) -> None:
        super().__init__()
        self.head, self.conv1 = nn.Conv2d(3, 4, 1), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        images, channels, height, width = x.shape
        x = x.reshape(images, channels, 2, height // 2, 2, width // 2).permute(0, 2, 4, 3, 5, 1)
        return self.conv1(x.reshape(4 * images, -1, channels))


@pytest.mark.parametrize("policy", ["toy_brightness", "toy_gate", "toy_selector"])
def test_windows_have_the_bits_of_their_image(images, policy: str) -> None:
    batch = bright_to_dark(6)
    torch.manual_seed(0)
    net = trained(calibrate(quantize_model(Windows(), recipe(policy)), images), batch)
    out = net(batch)
    bits = net.last_record().bits["conv1.input"]
    assert out.shape[0] == 24 and bits.shape == (6,) and bits.unique().numel() > 1
    for index in range(6):
        assert torch.allclose(net(batch[index : index + 1]), out[4 * index : 4 * index + 4], atol=1e-6)
    out.square().mean().backward()
    assert all(p.grad is not None for name, p in net.named_parameters() if "limit" not in name)


#: (policy, reentrant): reentrant checkpoints cannot share a graph between blocks, whatever is in it.
CHECKPOINTS = [(name, False) for name in ("toy_brightness", "toy_gate", "toy_selector")]
CHECKPOINTS += [("toy_brightness", True), ("toy_selector", True)]


@pytest.mark.parametrize(("policy", "reentrant"), CHECKPOINTS)
def test_checkpointed_blocks_decide_the_same_and_count_once(images, policy: str, reentrant: bool) -> None:
    batch, found = bright_to_dark(6), []
    net = trained(quantized(policy, images), batch).train()
    for kind in (None, reentrant):
        net.reentrant = kind
        net.zero_grad()
        out = net(batch)
        bits = {place: chosen.detach().clone() for place, chosen in net.last_record().bits.items()}
        out.square().mean().backward()
        assert net.last_record().bits.keys() == bits.keys() == set(PLACES)
        assert all(torch.equal(net.last_record().bits[place], bits[place]) for place in PLACES)
        found.append((out, bits, {name: p.grad for name, p in net.named_parameters()}))
    (out, bits, gradients), (again, bits_again, gradients_again) = found
    assert torch.equal(out, again) and all(torch.equal(bits[place], bits_again[place]) for place in PLACES)
    for name, gradient in gradients.items():
        if gradient is None:
            assert gradients_again[name] is None
        else:
            assert torch.allclose(gradient, gradients_again[name], atol=1e-6), name


@pytest.mark.parametrize("policy", ["toy_gate", "toy_selector"])
def test_a_bit_loss_reaches_checkpointed_policies(images, policy: str) -> None:
    net, batch, found = quantized(policy, images).train(), bright_to_dark(4), []
    for kind in (None, False):
        net.reentrant = kind
        net.zero_grad()
        (net(batch).mean() + torch.stack(list(net.last_record().bits.values())).mean()).backward()
        found.append({name: p.grad for name, p in net.named_parameters() if "_policy." in name})
    assert found[0] and all(gradient is not None and bool(gradient.abs().sum() > 0) for gradient in found[0].values())
    assert all(torch.allclose(found[0][name], found[1][name], atol=1e-6) for name in found[0])


def test_policies_cost_storage_in_the_quantized_network_only_and_no_macs(images) -> None:
    batch = bright_to_dark(4)
    nets = {name: quantized(name, images) for name in ("toy_brightness", "toy_gate", "toy_selector")}
    fixed = quantized("toy_gate", images, bits={"weight": 8, "act": 8})
    reports = {name: complexity((net.eval(), net(batch))[0], (8, 8)) for name, net in nets.items()}
    (want,) = {complexity(fixed, (8, 8)).macs}
    assert {report.macs for report in reports.values()} == {want}
    assert {report.parameters for report in reports.values()} == {sum(p.numel() for p in Net().parameters())}
    assert all(not row.name.startswith("bit_policy") for report in reports.values() for row in report.sites)
    float_bits = 32 * sum(p.numel() for p in Net().parameters())
    assert all(storage_bits(net, as_float=True) == float_bits for net in nets.values())
    added = 32 * sum(p.numel() for p in nets["toy_gate"].bit_policy.parameters())
    ranges_only = quantized("toy_brightness", images)
    limits = 32 * ranges_only.bit_policy.limits.numel()
    assert storage_bits(nets["toy_gate"]) - added == storage_bits(ranges_only) - limits


def test_taps_that_do_not_exist_leave_the_network_as_it_was(monkeypatch) -> None:
    monkeypatch.setattr(Gate, "taps", ("heat:output",))
    net = Net()
    with pytest.raises(RecipeError, match="cannot tap 'heat:output' of Net.*Near: head"):
        quantize_model(net, recipe("toy_gate"))
    assert type(net) is Net and type(net.body[0].conv1) is nn.Conv2d and not list(policies(net))


def test_a_shared_part_that_cannot_be_built_leaves_the_network_as_it_was(monkeypatch) -> None:
    def refuse(self, *args: object) -> None:
        raise ValueError("no table was given")

    monkeypatch.setattr(Gate, "__init__", refuse)
    net = Net()
    with pytest.raises(ValueError, match="no table was given"):
        quantize_model(net, recipe("toy_gate"))
    assert type(net) is Net and type(net.body[0].conv1) is nn.Conv2d and not list(policies(net))


def test_a_policy_per_channel_refuses_places_without_a_number(monkeypatch) -> None:
    rules = [*recipe("toy_selector")["placements"]["all"], {"match": "act", "port": "output"}]
    net = Net()
    net.act = nn.ReLU()
    with pytest.raises(
        RecipeError, match="act.output: policy 'toy_selector' has a number per channel, and ReLU does not"
    ):
        quantize_model(net, recipe("toy_selector", placements={"all": rules}))
    assert type(net) is Net


def test_an_inner_network_keeps_its_policy(images) -> None:
    inner, batch = quantized("toy_brightness", images), bright_to_dark(3)
    want = inner(batch)
    outer = record_root(nn.Sequential(inner))
    assert torch.equal(outer(batch), want)
    assert tuple(outer.last_record().bits) == PLACES


def test_a_recipe_goes_around_its_bits_as_far_as_the_policy_reaches(images) -> None:
    around = load_recipe(recipe("toy_offset"))
    assert around.bits.act == 5 and around.act_widths == (4, 5, 6)
    assert load_recipe(around.to_dict()) == around
    assert load_recipe(recipe("toy_offset"), act_bits=32).act_widths == 32
    assert load_recipe(recipe("toy_offset"), act_bits=(3, 5, 8)).act_widths == (3, 5, 8)
    assert load_recipe(recipe("toy_selector")).act_widths == CANDIDATES
    with pytest.raises(
        RecipeError, match="policy 'toy_offset' goes 1 below and above .*, which are 2: give 3 or more$"
    ):
        load_recipe(recipe("toy_offset"), act_bits=2)
    net = quantized("toy_offset", images)
    assert {policy.candidates for _, policy in policies(net)} == {(4, 5, 6)}
    net(images[0])
    assert {bits.item() for bits in net.last_record().bits.values()} == {5.0}
