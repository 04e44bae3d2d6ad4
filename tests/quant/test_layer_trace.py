"""What a network executes, found by running a copy of it once."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.quant.layer_trace import LayerTraceError, trace_layers
from tests.quant.toy_networks import Deconvolution, ShuffleEnd, Transformer, conv


def test_layers_are_listed_in_order_of_execution_with_their_shapes() -> None:
    class Backwards(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.last, self.unused, self.middle, self.first = conv(4, 3), conv(4, 4), nn.Linear(4, 4), conv(3, 4)

        def forward(self, x: Tensor) -> Tensor:
            return self.last(self.middle(self.first(x).movedim(1, -1)).movedim(-1, 1))

    trace = trace_layers(Backwards())
    assert [(call.name, call.input_shape, call.output_shape) for call in trace.layers] == [
        ("first", (1, 3, 16, 16), (1, 4, 16, 16)),
        ("middle", (1, 16, 16, 4), (1, 16, 16, 4)),
        ("last", (1, 4, 16, 16), (1, 3, 16, 16)),
    ]
    assert trace.image_shape == trace.output_shape == (1, 3, 16, 16)
    assert [call.positions for call in trace.layers] == [256] * 3
    assert [call.reads_layers for call in trace.layers] == [frozenset(), {"first"}, {"middle"}]


def test_a_shared_layer_has_a_call_for_each_use_and_one_entry() -> None:
    layer = conv(3, 3)
    trace = trace_layers(nn.Sequential(layer, nn.ReLU(), layer))
    assert [call.name for call in trace.calls if call.is_layer] == ["0", "0"]
    assert [call.name for call in trace.layers] == ["0"]


def test_sizes_and_channels_are_tried_until_the_network_takes_one() -> None:
    assert trace_layers(Transformer()).image_shape == (1, 3, 32, 32)
    assert trace_layers(Deconvolution()).image_shape == (1, 1, 16, 16)


def test_what_is_made_from_a_table_does_not_read_the_image() -> None:
    reads = {call.name: call.reads_image for call in trace_layers(Transformer()).layers}
    assert {name for name, image in reads.items() if not image} == {f"layers.{index}.bias" for index in range(3)}


def test_a_skip_adds_to_what_a_layer_reads() -> None:
    layers = {call.name: call for call in trace_layers(ShuffleEnd()).layers}
    assert layers["upsampler.0"].reads_layers == {"enter", "after"}
    assert layers["block_1.first"].source == layers["block_1.first"].source != layers["block_1.second"].source


@pytest.mark.parametrize("decorate", [torch.no_grad(), torch.inference_mode()])
def test_networks_and_callers_without_gradients(decorate) -> None:
    class NoGradient(ShuffleEnd):
        forward = torch.no_grad()(ShuffleEnd.forward)

    for make in (NoGradient, ShuffleEnd):
        net = make()
        with decorate:
            layers = trace_layers(net).layers
        assert [call.name for call in layers if not call.reads_layers] == ["enter"]
        assert all(call.reads_image for call in layers)


def test_the_network_is_left_as_it_was() -> None:
    class Counting(nn.Sequential):
        runs = 0

        def forward(self, x: Tensor) -> Tensor:
            self.runs += 1
            return super().forward(x)

    net = Counting(conv(3, 4), nn.BatchNorm2d(4), nn.Dropout(), conv(4, 3)).train()
    net[1].eval()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    state = torch.get_rng_state()
    trace_layers(net)
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert net.runs == 0 and [one.training for one in net] == [True, False, True, True] and net.training
    assert not any(one._forward_hooks or one._forward_pre_hooks for one in net.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in net.parameters())


def test_half_precision_and_other_devices_are_followed() -> None:
    assert trace_layers(ShuffleEnd().to(torch.bfloat16)).output_shape == (1, 3, 32, 32)
    assert trace_layers(ShuffleEnd().to("meta")).output_shape == (1, 3, 32, 32)


def test_networks_that_cannot_be_run_say_what_was_tried() -> None:
    with pytest.raises(
        LayerTraceError,
        match=r"(?s)Sequential takes no small test image.*3x16x16: RuntimeError.*expected input.*\nMake its forward take",
    ):
        trace_layers(nn.Sequential(conv(5, 3)))
    with pytest.raises(LayerTraceError, match="it returned a tuple, not an image tensor"):
        trace_layers(type("Pair", (nn.Identity,), {"forward": lambda self, x: (x, x)})())
    with pytest.raises(LayerTraceError, match=r"it returned a tensor of shape \(1, 768\)"):
        trace_layers(nn.Flatten())


def test_networks_that_cannot_be_copied_say_why() -> None:
    net = nn.Sequential(conv(3, 3))
    net.kept = net(torch.rand(1, 3, 4, 4))
    with pytest.raises(LayerTraceError, match="cannot be copied to look at its layers .*Remove weight norm"):
        trace_layers(net)
