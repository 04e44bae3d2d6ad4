"""Networks with constant grids against the ones that quantize: places exactly, whole networks as far as rounding goes."""

from __future__ import annotations

from copy import deepcopy

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import calibrate, load_recipe, quantize_model, set_depth
from qsr_plugin.deploy.grids import Grid, weight_codes
from qsr_plugin.deploy.lowering import LoweredConv2d, LoweredLinear, LoweringError, lower
from qsr_plugin.errors import UserError
from qsr_plugin.quant.quantizer import QParams, Quantizer
from qsr_plugin.quant.record import RecordingRoot
from tests.backbones import FITTING, TRANSFORMERS
from tests.recipes import shipped

#: Recipes that no constant grid expresses, with the words of the message.
REFUSED = {"daq": "not uniform", "linq": "not uniform"}


def grid(scale: float, zero: float, qmin: int, qmax: int) -> QParams:
    return QParams(torch.tensor(scale), torch.tensor(zero), qmin, qmax)


@pytest.mark.parametrize(
    ("params", "bits"),
    [
        (grid(0.1, 3.0, 0, 15), 4),
        (grid(0.1, 3.25, 0, 15), 4),
        (grid(0.1, 7.5, 0, 15), 4),
        (grid(0.02, -4.0, 0, 3), 2),
        (grid(0.02, 300.7, 0, 255), 8),
        (grid(0.5, 0.0, -8, 7), 4),
        (grid(1e-4, 1234.5, 0, 2**16 - 1), 16),
    ],
)
@pytest.mark.parametrize("signed", [False, True])
def test_a_grid_is_that_of_the_quantizer(params: QParams, bits: int, signed: bool) -> None:
    x = 3 * torch.randn(2000, generator=torch.Generator().manual_seed(0))
    codes = torch.clamp(torch.round(x / params.scale + params.zero_point), params.qmin, params.qmax)
    made = Grid(params, signed=signed)
    apart = (made(x) - (codes - params.zero_point) * params.scale).abs() / params.scale
    assert apart.max() < 1.01 and (apart > 0.01).float().mean() < 0.01  # float32 resolves 16 bits hardly
    if signed:
        assert made.zero.dtype == torch.int8 and made.zero == 0 and made.carried == (bits <= 8)
        assert not made.carried or (made.low / made.scale >= -128.01 and made.high / made.scale <= 127.01)
    else:
        assert made.zero.dtype == (torch.uint8 if bits <= 8 else torch.uint16)
    zero = float(params.zero_point) - params.qmin
    assert made.has_zero == (zero == round(zero) and 0 <= zero <= params.qmax - params.qmin)
    assert not made.has_zero or float(made(torch.zeros(()))) == pytest.approx(0, abs=1e-6)
    assert torch.unique(made.unshifted(x)).numel() <= 2**bits


@pytest.mark.parametrize(
    ("zero", "qmin", "qmax", "rest"),
    [(0.0, -8, 7, False), (7.5, 0, 15, False), (3.3, 0, 15, True), (127.5, 0, 255, True), (0.0, -128, 127, False)],
)
@pytest.mark.parametrize("channels", [1, 3])
def test_codes_of_a_weight(zero: float, qmin: int, qmax: int, rest: bool, channels: int) -> None:
    generator = torch.Generator().manual_seed(1)
    scale = torch.rand(channels, generator=generator).squeeze() + 0.1
    codes = torch.randint(qmin, qmax + 1, (3, 4, 3, 3), generator=generator)
    codes[0, 0, 0, :2] = torch.tensor([qmin, qmax])
    weight = (codes - zero) * (scale if channels == 1 else scale.view(-1, 1, 1, 1))
    found = weight_codes(weight, QParams(scale, torch.full_like(scale, zero), qmin, qmax), 0)
    made = found.codes * found.scale.view(-1, 1, 1, 1) + (0 if found.rest is None else found.rest.view(-1, 1, 1, 1))
    assert found.codes.dtype == torch.int8 and (found.rest is not None) == rest
    assert torch.allclose(made, weight, atol=1e-5)


def test_weights_that_are_on_no_grid_or_need_more_than_a_byte() -> None:
    weight = torch.tensor([[0.0, 0.5, 1.0]])
    assert weight_codes(weight + 0.2, grid(0.5, 0.0, 0, 15), 0) is None
    assert weight_codes(weight, grid(0.5, 0.0, 0, 1023), 0) is None


class OneLayer(nn.Module):
    """A layer by itself, so that nothing comes before its quantizer."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


LAYERS = {
    "padded": lambda: nn.Conv2d(4, 6, 3, padding=1),
    "same, strided, no bias": lambda: nn.Conv2d(4, 6, (3, 5), padding=(1, 2), stride=2, bias=False),
    "dilated, reflected": lambda: nn.Conv2d(4, 6, 3, padding=2, dilation=2, padding_mode="reflect"),
    "depthwise": lambda: nn.Conv2d(4, 4, 3, padding=1, groups=4),
    "grouped": lambda: nn.Conv2d(4, 6, 3, padding=1, groups=2),
    "unpadded": lambda: nn.Conv2d(4, 6, 3),
    "text": lambda: nn.Conv2d(4, 6, 3, padding="same"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 4, stride=2, padding=1),
    "linear": lambda: nn.Linear(4, 6),
    "linear without bias": lambda: nn.Linear(4, 6, bias=False),
}


#: Each layer, and with its padding quantized those that pad.
PADDED = [(layer, False) for layer in LAYERS] + [
    (layer, True) for layer in LAYERS if "linear" not in layer and layer != "transposed"
]


@pytest.mark.parametrize(("layer", "pad_first"), PADDED)
@pytest.mark.parametrize("quantizers", [("asymmetric", "symmetric"), ("zero_level", "per_channel"), ("rlq", "rlq")])
@pytest.mark.parametrize("bits", [3, 8])
@pytest.mark.parametrize("signed", [False, True])
def test_one_layer(layer: str, quantizers: tuple[str, str], bits: int, signed: bool, pad_first: bool) -> None:
    """On the same input the same result, also where the grid has no zero and the layer pads with zeros."""
    torch.manual_seed(0)
    float_net = OneLayer(LAYERS[layer]())
    linear = "linear" in layer
    rules = [
        {"match": "layer", "port": "input", "quantizer": quantizers[0], "pad_first": pad_first},
        {"match": "layer", "port": "weight", "quantizer": quantizers[1]},
    ]
    recipe = load_recipe("minmax", weight_bits=bits, act_bits=bits, placement="x", placements={"x": rules})
    x = torch.randn(2, 9, 4) if linear else torch.randn(2, 4, 9, 7)
    net = calibrate(quantize_model(float_net, recipe), [x]) if not linear else calibrated(float_net, recipe, x)
    lowered = lower(net, signed=signed)
    with torch.no_grad():
        want, got = net(x), lowered(x)
    assert (want - got).abs().max() < 2e-5 * want.abs().max()
    assert not any(isinstance(module, (Quantizer, RecordingRoot)) for module in lowered.modules())


def calibrated(float_net: nn.Module, recipe: object, x: Tensor) -> nn.Module:
    """Calibration takes images; a linear layer gets what it reads by itself."""
    net = quantize_model(float_net, recipe)
    parts = [part for part in net.modules() if isinstance(part, Quantizer)]
    for part in parts:
        part.begin_calibration()
        part.observe(net.layer.weight if part.role == "weight" else x)
        part.end_calibration()
    return net.eval()


#: Every pair; on transformers, which take longer, the recipes of each kind of grid that there is.
KINDS = ("auto", "percentile", "2dquant", "quantsr")
PAIRS = [(method, backbone) for method, backbone in FITTING if backbone not in TRANSFORMERS or method in KINDS]


@pytest.mark.parametrize(("method", "backbone"), PAIRS)
def test_every_method_on_every_backbone(method: str, backbone: str, tiny_net, images) -> None:
    """Lowered places give what quantizers give for the same input; whole outputs differ by single rounding steps."""
    float_net = tiny_net(backbone)
    net = calibrate(quantize_model(deepcopy(float_net), shipped(method, float_net)), images).eval()
    if method in REFUSED:
        with pytest.raises(LoweringError, match=REFUSED[method]):
            lower(net)
        return
    widths = [part.candidates for part in net.modules() if isinstance(part, Quantizer) and len(part.candidates) > 1]
    bits = max(widths[0]) if widths else None
    if widths:  # bits by content
        with pytest.raises(LoweringError, match=f"depend on the image.*--bits {bits}"):
            lower(net)
    try:
        lowered = lower(net, bits=bits)
    except LoweringError as error:  # a gate at some places
        assert method == "ddtb" and "gate" in str(error)
        return
    with torch.no_grad():
        want, got, plain = net(images[0]), lowered(images[0]), float_net(images[0])
    assert got.shape == want.shape and torch.isfinite(got).all()
    if bits is None:
        assert (want - got).abs().mean() < 0.5 * (want - plain).abs().mean() + 1e-5
    assert not any(isinstance(module, (Quantizer, RecordingRoot)) for module in lowered.modules())
    assert all(not isinstance(lowered.get_submodule(name), (nn.Conv2d, nn.Linear)) for name in lowered.float_weights)


def test_what_has_no_constant_grid_is_refused(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net(), load_recipe("adabm")), images)
    with pytest.raises(LoweringError, match=r"one of \[.*\] \(bits=5 is none of them\)|bits=9"):
        lower(net, bits=9)
    with pytest.raises(UserError, match="not calibrated: body.0.conv1"):
        lower(quantize_model(tiny_net(), load_recipe("percentile")))


def test_bits_are_asked_for_where_there_is_a_choice(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net(), load_recipe("auto")), images)
    with pytest.raises(LoweringError, match=r"bits=8 \(--bits 8\) is for networks whose bits depend on the image"):
        lower(net, bits=8)


def test_nothing_that_goes_in_is_changed(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net(), load_recipe("auto")), images).train()
    state = deepcopy(net.state_dict())
    lower(net)
    assert net.training and all(torch.equal(value, state[key]) for key, value in net.state_dict().items())
    float_net = tiny_net()
    copy = lower(float_net)
    assert copy is not float_net and torch.equal(copy(images[0]), float_net(images[0])) and copy.float_weights == ()


def test_the_depth_chosen_is_the_one_that_is_lowered(tiny_net, images) -> None:
    net = calibrate(quantize_model(tiny_net("EDSR", num_block=4), load_recipe("quantsr")), images).eval()
    set_depth(net, 2)
    with torch.no_grad():
        assert (net(images[0]) - lower(net)(images[0])).abs().max() < 1e-5


def test_kinds_of_layers(tiny_net, images) -> None:
    net = lower(calibrate(quantize_model(tiny_net("SwinIR"), load_recipe("auto")), images))
    kinds = {type(module) for module in net.modules()}
    assert LoweredLinear in kinds and LoweredConv2d in kinds
