"""The forward record: opened by the outermost forward, keyed by place, private to each thread."""

from __future__ import annotations

import copy
import threading
from functools import lru_cache

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.record import ForwardRecord, current_record, float_mode, float_mode_on, record_root
from qsr_plugin.quant.surgery import quantize_model, quantizers, tap

RECIPE = {
    "method": "mine",
    "bits": {"weight": 4, "act": 4},
    "quantizers": {"act": "pams", "weight": "maxabs"},
    "placement": "all",
    "placements": {"all": [{"match": "**conv?", "port": "input"}, {"match": "**conv?", "port": "weight"}]},
}


class Net(nn.Module):
    """Two convolutions, the second one under activation checkpointing if asked."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.checkpointing = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv1(x)
        return checkpoint(self.conv2, x, use_reentrant=False) if self.checkpointing else self.conv2(x)


@pytest.fixture
def net(images) -> nn.Module:
    torch.manual_seed(0)
    return calibrate(quantize_model(Net(), RECIPE), images)


def test_record_holds_bits_by_place_and_the_number_of_images(net, images) -> None:
    net(images[0])
    record = net.last_record()
    assert record.images == 2 and record.bits == {"conv1.input": 4, "conv2.input": 4}
    assert current_record() is None


def test_asking_before_the_first_forward_says_what_to_do() -> None:
    with pytest.raises(RuntimeError, match="run the network once"):
        record_root(Net()).last_record()


def test_a_failing_forward_leaves_nothing_open_and_keeps_the_last_record(net, images) -> None:
    net(images[0])
    before = net.last_record()
    with pytest.raises(RuntimeError):
        net(torch.zeros(1, 5, 8, 8))
    assert net.last_record() is before and current_record() is None and not float_mode_on()


def test_checkpointed_blocks_count_once_and_give_the_same_gradients(net, images) -> None:
    results = []
    for checkpointing in (False, True):
        net.checkpointing = checkpointing
        net.zero_grad()
        net(images[0]).square().mean().backward()
        results.append((len(net.last_record().bits), [p.grad.clone() for p in net.parameters()]))
    assert results[0][0] == results[1][0] == 2
    for a, b in zip(results[0][1], results[1][1]):
        assert torch.allclose(a, b, atol=1e-7)


def test_taps_carry_the_graph_and_are_replaced_by_the_next_forward(net, images) -> None:
    tap(net, "conv2:input", "features")
    net(images[0])
    features = net.last_record().taps["features"]
    assert features.shape == (2, 4, 8, 8) and features.requires_grad
    net(images[1])
    assert net.last_record().taps["features"] is not features


def test_an_inner_quantized_network_writes_into_the_outer_record(net, images) -> None:
    outer, own = record_root(nn.Sequential(net, nn.Identity())), net.last_record()
    outer(images[0])
    assert set(outer.last_record().bits) == {"conv1.input", "conv2.input"}
    assert net.last_record() is own and own is not outer.last_record()


def test_a_copied_network_has_no_graph_of_the_original(net, images) -> None:
    tap(net, "conv2:output", "out")
    net(images[0])
    twin = copy.deepcopy(net)
    assert twin.last_record().taps == {} and net.last_record().taps
    twin(images[1])
    assert torch.equal(twin(images[0]), net(images[0]))


def test_threads_do_not_see_each_other(images) -> None:
    torch.manual_seed(0)
    nets = [calibrate(quantize_model(Net(), {**RECIPE, "bits": {"weight": 4, "act": b}}), images) for b in (3, 8)]
    barrier, seen, failures = threading.Barrier(2), {}, []

    def run(index: int) -> None:
        def pause(module: nn.Module, args: tuple) -> None:
            barrier.wait(timeout=30)  # both threads are in the middle of their forward
            seen[index, "record"] = current_record()

        nets[index].conv2.register_forward_pre_hook(pause)
        try:
            nets[index](images[0])
        except Exception as error:  # noqa: BLE001 - reported by the assertion below
            failures.append(error)

    threads = [threading.Thread(target=run, args=(i,)) for i in range(2)]
    [thread.start() for thread in threads]
    [thread.join(timeout=60) for thread in threads]
    assert not failures
    assert seen[0, "record"] is nets[0].last_record() and seen[1, "record"] is nets[1].last_record()
    assert set(nets[0].last_record().bits.values()) == {3} and set(nets[1].last_record().bits.values()) == {8}


def test_float_mode_switches_every_quantizer_off_and_back_on(net, images) -> None:
    torch.manual_seed(0)
    plain = Net()
    with float_mode():
        assert torch.equal(net(images[0]), plain(images[0]))
    assert net.last_record().bits == {}
    with pytest.raises(KeyError), float_mode():
        assert float_mode_on()
        raise KeyError
    assert not float_mode_on()
    assert not torch.equal(net(images[0]), plain(images[0]))


def test_per_image_bits_reach_the_record(net, images) -> None:
    from qsr_plugin.quant.policy import BitDecision

    widths = torch.tensor([4, 4])
    net.conv1.input_policy.decide = lambda features, record: BitDecision(widths)
    out = net(images[0])
    assert net.last_record().bits["conv1.input"] is widths
    del net.conv1.input_policy.decide
    assert torch.equal(out, net(images[0])) and len(dict(quantizers(net))) == 4


def test_a_result_is_made_once_per_forward_whoever_asks() -> None:
    record, calls = ForwardRecord(images=2), []

    class Part:
        def make(self, given: ForwardRecord) -> object:
            calls.append(given)
            return object()

    one, other = Part(), Part()
    first = record.once(one.make)
    assert record.once(one.make) is first and calls == [record]
    assert record.once(other.make) is not first and len(calls) == 2
    assert ForwardRecord(images=2).once(one.make) is not first
    twin = copy.deepcopy(record)
    assert twin.once(one.make) is not first, "a copy starts empty"


def test_a_result_that_is_made_keeps_its_graph_for_several_uses() -> None:
    weight, record = torch.ones(3, requires_grad=True), ForwardRecord(images=1)
    total = sum(record.once(lambda_of(weight)) for _ in range(2)).sum()
    total.backward()
    assert weight.grad.tolist() == [4.0, 4.0, 4.0]


@lru_cache
def lambda_of(weight: Tensor):
    return lambda record: weight.square()


def test_taps_of_several_modules_are_listed_in_module_order(net, images) -> None:
    tap(net, "conv?:output", "out")
    tap(net, "conv1:output", "single")
    tap(net, "conv1:output", "single")
    net(images[0])
    record = net.last_record()
    assert set(record.taps) == {"out[0]", "out[1]", "single"}
    assert [x.shape[1] for x in record.tapped("out")] == [4, 3]
    assert record.tapped("out")[0] is record.taps["single"] and record.tapped("single") == [record.taps["single"]]
    assert record.tapped("none") == []


def test_the_image_is_in_the_record(net, images) -> None:
    net(images[0])
    assert torch.equal(net.last_record().image, images[0]) and net.last_record().policy is None
