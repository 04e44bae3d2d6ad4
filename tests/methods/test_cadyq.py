"""CADyQ against figures computed with the published code (float32), and what its parts do in a network."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin import compat
from qsr_plugin.methods.cadyq import BitSelector, deviations
from qsr_plugin.methods.pams import PAMSQuantizer
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.image_stats import GRADIENT_OPS, gradient_magnitudes
from qsr_plugin.quant.policy import quantize_with
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.surgery import policies, quantize_model, quantizers, tap
from qsr_plugin.report.fab import feature_average_bits

compat.import_host()

WIDTHS = (4, 6, 8)
X = torch.tensor([[[[0.0, 1], [2, 3]], [[-1, 0.5], [0.25, 0.75]]]])
#: Gradient magnitudes 0.0015 and 0.0005: a ramp to the right and one downwards, of two pixels each.
IMAGE = torch.tensor([[0.0, 3e-3], [1e-3, 4e-3]]).expand(1, 3, 2, 2)
CUES = torch.tensor([1.5, 0.5, 1.2909944, 0.7772816])
ROWS = [[0.1, 0.2, 0.3, -0.1], [0.2, 0.1, 0.1, 0.1], [0.05, 0.1, 0.2, 0.3]]


def close(got: Tensor, want: list, digits: int = 7) -> None:
    wanted = torch.tensor(want, dtype=torch.float32).flatten()
    assert torch.allclose(got.detach().flatten(), wanted, atol=1.01 * 10**-digits, rtol=2e-7), got


def selector(channels: int = 2, axis: int = 1, candidates: tuple[int, ...] = WIDTHS, **options: float) -> BitSelector:
    made = BitSelector(BitSelector.Options(**options), candidates, channels, axis)
    made.place = "site.input"
    return made


@pytest.fixture
def worked() -> tuple[BitSelector, PAMSQuantizer]:
    """Selector and quantizer of the worked examples."""
    policy, quantizer = selector(), PAMSQuantizer(PAMSQuantizer.Options(), WIDTHS, "act", 1)
    with torch.no_grad():
        policy.linear.weight.copy_(torch.tensor(ROWS))
        policy.linear.bias.copy_(torch.tensor([0.5, 0.0, 1.0]))
        quantizer.set_range(torch.tensor(-2.0), torch.tensor(2.0))
    quantizer.mark_calibrated()
    return policy, quantizer


def test_image_cues_of_the_published_scale() -> None:
    """Both examples, scaled by 1000; the selector passes them on as they are."""
    step = torch.zeros(1, 3, 4, 4)
    step[..., 2:] = 1.0
    dot = torch.zeros(1, 3, 3, 3)
    dot[0, 0, 1, 1] = 1.0
    close(gradient_magnitudes(step) * 1000, [250.0, 0.0], digits=4)
    close(gradient_magnitudes(dot) * 1000, [33.2222, 33.2222], digits=4)
    policy = selector(gradient_scale=10.0)
    with torch.no_grad():  # logits show one cue each
        policy.linear.weight.copy_(torch.eye(4)[[0, 1, 1]])
        policy.linear.bias.zero_()
    decision = policy.decide(torch.zeros(1, 2, 3, 3), ForwardRecord(1, image=step))
    close(decision.probabilities, torch.tensor([2.5, 0.0, 0.0]).softmax(0).tolist())
    assert BitSelector.Options().gradient_scale == 1000.0


def test_choice_and_values(worked: tuple[BitSelector, PAMSQuantizer]) -> None:
    policy, quantizer = worked
    decision = policy.decide(X, ForwardRecord(1, image=IMAGE))
    close(decision.probabilities, [0.29851, 0.1805596, 0.5209305])
    close(decision.expected, [6.4448416])
    assert decision.bits.tolist() == [8.0]
    close(decision.bits / decision.expected, [1.2413028])
    want = [0, 1.007874, 2, 2, -1.007874, 0.503937, 0.2519685, 0.7559055]
    close(quantize_with(quantizer, X, decision), want)
    with torch.no_grad():  # the chosen one alone
        close(quantize_with(quantizer, X, decision), want)


def test_gradients_of_the_output(worked: tuple[BitSelector, PAMSQuantizer]) -> None:
    policy, quantizer = worked
    x = X.clone().requires_grad_()
    out = quantize_with(quantizer, x, policy.decide(x, ForwardRecord(1, image=IMAGE)))
    dx, bias, weight, alpha = torch.autograd.grad(
        out.sum(), (x, policy.linear.bias, policy.linear.weight, quantizer.alpha)
    )
    close(dx, [1, 1, 0.5, 0, 1, 1, 1, 1])
    want = [0.0404272, -0.0055014, -0.0349259]
    close(bias, want)
    close(weight, torch.outer(torch.tensor(want), CUES).tolist())
    close(alpha, [0.4797481, 0.2752077, 0.7844721])


def test_gradients_of_the_bits(worked: tuple[BitSelector, PAMSQuantizer]) -> None:
    policy, _ = worked
    decision = policy.decide(X, ForwardRecord(1, image=IMAGE))
    loss = (decision.bits / decision.expected.detach()).sum()
    bias, weight = torch.autograd.grad(loss, (policy.linear.bias, policy.linear.weight))
    want = [-0.1132393, -0.0124627, 0.1257020]
    close(bias, want)
    close(weight, torch.outer(torch.tensor(want), CUES).tolist())


def test_cues_pass_no_gradient_on(worked: tuple[BitSelector, PAMSQuantizer]) -> None:
    policy, _ = worked
    x, image = X.clone().requires_grad_(), IMAGE.clone().requires_grad_()
    decision = policy.decide(x, ForwardRecord(1, image=image))
    assert torch.autograd.grad(decision.expected.sum(), (x, image), allow_unused=True) == (None, None)


@pytest.mark.parametrize("seed", [0, 1])
def test_at_first_every_image_gets_the_most_bits(seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    features = 40 * torch.randn(3, 5, 6, 6, generator=generator)
    decision = selector(5).decide(features, ForwardRecord(3, image=torch.rand(3, 3, 6, 6, generator=generator)))
    assert decision.bits.tolist() == [8.0] * 3
    close(decision.probabilities, [[0.2119416, 0.2119416, 0.5761169]] * 3, digits=4)  # logits are some hundreds


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_so_it_is_in_a_network_of_sixteen_bits(dtype: torch.dtype) -> None:
    features, image = 40 * torch.ones(2, 5, 6, 6).cumsum(2), torch.rand(2, 3, 6, 6)
    decision = selector(5).to(dtype).decide(features.to(dtype), ForwardRecord(2, image=image.to(dtype)))
    assert decision.bits.tolist() == [8.0] * 2


def test_initial_probabilities_to_the_last_digit() -> None:
    decision = selector(2).decide(torch.zeros(1, 2, 2, 2), ForwardRecord(1, image=torch.zeros(1, 3, 2, 2)))
    close(decision.probabilities, [0.2119416, 0.2119416, 0.5761169])


@pytest.mark.parametrize("count", [2, 4])
def test_any_number_of_candidates(count: int) -> None:
    widths = (2, 4, 6, 8)[-count:]
    decision = selector(2, candidates=widths).decide(X, ForwardRecord(1, image=IMAGE))
    assert decision.probabilities.shape == (1, count) and decision.bits.tolist() == [8.0]


def test_spread_of_channels() -> None:
    x = torch.randn(4, 3, 5, 6, generator=torch.Generator().manual_seed(0)) * 7 + 300
    want = x.double().std((2, 3)).float()
    assert torch.allclose(deviations(x, 4, 1), want, rtol=1e-5)
    assert torch.allclose(deviations(x.flatten(2).transpose(1, 2), 4, -1), want, rtol=1e-5)
    # Windows of an image count together, whichever axis channels are on.
    pairs = x.double().unflatten(0, (2, 2)).transpose(1, 2).flatten(2).std(2).float()
    assert torch.allclose(deviations(x, 2, 1), pairs, rtol=1e-5)
    assert torch.allclose(deviations(x.flatten(2).transpose(1, 2), 2, -1), pairs, rtol=1e-5)


def test_one_position_spreads_by_zero() -> None:
    assert deviations(torch.full((2, 3, 1, 1), 5.0), 2, 1).tolist() == [[0.0] * 3] * 2
    decision = selector(3).decide(torch.rand(2, 3, 1, 1), ForwardRecord(2, image=torch.rand(2, 3, 1, 1)))
    assert bool(torch.isfinite(decision.probabilities).all())


def test_a_part_of_a_network_has_no_image() -> None:
    with pytest.raises(RuntimeError, match="site.input: bits follow the image"):
        selector().decide(X, None)


def test_operations_of_the_choice() -> None:
    """Two sums over the tensor and the linear layer; the image's gradients are counted once."""
    assert selector(2).overhead_ops(torch.Size((1, 2, 5, 7))) == 3 * 70 + 2 * 3 * 4
    assert selector(2).shared_ops(ForwardRecord(1, image=torch.zeros(1, 3, 5, 7))) == GRADIENT_OPS * 35


# -- in a network -----------------------------------------------------------------------------------------------------

Build = Callable[..., nn.Module]


def selecting(net: nn.Module, images: list[Tensor], **changes: object) -> nn.Module:
    return calibrate(quantize_model(net, load_recipe("cadyq", **changes)), images)


def shifted(net: nn.Module) -> nn.Module:
    """Selectors that look at the first gradient: images of little contrast get fewer bits."""
    with torch.no_grad():
        for _, policy in policies(net):
            if isinstance(policy, BitSelector):
                policy.linear.weight.zero_()[0, 0] = -1.0
                policy.linear.bias.copy_(torch.tensor([30.0, -100.0, 0.0]))
    return net


@pytest.mark.parametrize(
    ("kind", "placement", "chosen", "fixed"),
    [
        ("EDSR", "quantized_input", {"body.0.input", "body.0.conv2.input"}, {"body.0.conv2.output"}),
        ("EDSR", "shortcut_only", {"body.0.shortcut", "body.0.conv2.input"}, {"body.0.conv2.output"}),
        ("EDSR", "body", {"body.0.conv1.input", "body.0.conv2.input"}, set()),
        ("SRResNet", "quantized_input", {"body.0.input", "body.0.conv2.input"}, set()),
        ("SRResNet", "shortcut_only", {"body.0.shortcut", "body.0.conv2.input"}, set()),
    ],
)
def test_selectors_stand_where_published(
    tiny_net: Build, images: list[Tensor], kind: str, placement: str, chosen: set[str], fixed: set[str]
) -> None:
    net = selecting(tiny_net(kind, num_block=1), images, placement=placement)
    with torch.no_grad():
        net(images[0])
    record = net.last_record()
    assert {place for place, bits in record.bits.items() if isinstance(bits, Tensor)} == chosen
    assert {place for place, bits in record.bits.items() if isinstance(bits, int) and bits == 8} == fixed
    assert {place for place, quantizer in quantizers(net) if quantizer.counts_in_fab} == chosen
    assert {q.candidates for place, q in quantizers(net) if place.endswith(".weight")} == {(8,)}


def test_fully_quantized_networks_choose_in_the_body_only(tiny_net: Build, images: list[Tensor]) -> None:
    net = selecting(tiny_net("EDSR", num_block=1), images, placement="fully")
    convolutions = [name for name, module in net.named_modules() if isinstance(module, nn.Conv2d)]
    places = dict(quantizers(net))
    assert {f"{name}.weight" for name in convolutions} <= set(places)
    assert {f"{name}.input" for name in convolutions if name != "conv_first"} <= set(places)
    chosen = {place for place, policy in policies(net) if isinstance(policy, BitSelector)}
    assert chosen == {"body.0.conv1.input", "body.0.conv2.input"}
    assert {quantizer.candidates for place, quantizer in places.items() if place not in chosen} == {(8,)}


def test_at_the_start_it_is_the_network_of_the_highest_bits(tiny_net: Build, images: list[Tensor]) -> None:
    net = selecting(tiny_net("EDSR"), images)
    eight = calibrate(quantize_model(tiny_net("EDSR"), load_recipe("pams", weight_bits=8, act_bits=8)), images)
    with torch.no_grad():
        assert torch.equal(net(images[0]), eight(images[0]))
    assert feature_average_bits(net, net.last_record()) == 8.0


def test_bits_differ_between_the_images_of_a_batch(tiny_net: Build) -> None:
    flat, busy = torch.full((1, 3, 8, 8), 0.5), torch.rand(1, 3, 8, 8, generator=torch.Generator().manual_seed(0))
    net = shifted(selecting(tiny_net("EDSR"), [busy])).eval()
    both = torch.cat([flat, busy])
    with torch.no_grad():
        out = net(both)
        chosen = [bits.tolist() for bits in net.last_record().bits.values() if isinstance(bits, Tensor)]
        assert chosen == [[4.0, 8.0]] * 4
        assert feature_average_bits(net, net.last_record()) == 6.0
        assert torch.allclose(out, torch.cat([net(flat), net(busy)]), atol=1e-5)


def test_feature_average_bits_of_the_worked_example(tiny_net: Build, images: list[Tensor]) -> None:
    net = selecting(tiny_net("EDSR"), images)
    with torch.no_grad():
        net(images[0])
    record = net.last_record()
    for chosen, want in (([4, 8, 8, 6], 6.5), ([4, 4, 4, 8], 5.0)):
        places = [place for place, policy in policies(net) if isinstance(policy, BitSelector)]
        record.bits.update(zip(places, chosen))
        assert feature_average_bits(net, record) == want
    record.bits.update(
        (place, torch.tensor([float(a), float(b)])) for place, a, b in zip(places, (4, 8, 8, 6), (4, 4, 4, 8))
    )
    assert feature_average_bits(net, record) == 5.75


@pytest.mark.parametrize("name", ["linq", "lsq", "rlq", "fqsr", "asymmetric"])
def test_other_quantizers_under_the_selector(tiny_net: Build, images: list[Tensor], name: str) -> None:
    net = selecting(tiny_net("EDSR"), images, quantizers={"act": {"type": name}}, placement="body").train()
    out = net(images[0])
    (out.square().mean() + sum(net.last_record().signals["expected_bits"].values()).sum()).backward()
    idle = {id(p) for _, quantizer in quantizers(net) for p in quantizer.idle_parameters()}
    learning = [p for p in net.parameters() if id(p) not in idle]
    assert all(p.grad is not None and bool(p.grad.isfinite().all()) for p in learning)
    assert all(bool(policy.linear.bias.grad.any()) for _, policy in policies(net))


def test_the_ablation_takes_ranges_from_the_tensors(tiny_net: Build, images: list[Tensor]) -> None:
    from qsr_plugin.options_file import options_folder

    recipe = load_recipe(options_folder() / "ablations/cadyq_linq.yml")
    net = quantize_model(tiny_net("EDSR"), recipe).train()  # nothing to calibrate
    net(images[0]).sum().backward()
    assert {type(quantizer).__name__ for _, quantizer in quantizers(net)} == {"LinQQuantizer"}
    assert recipe.policy.type == "selector" and "WeightedBitLoss" in {loss.type for loss in recipe.losses}


def test_distillation_of_blocks_is_the_sum_over_them(tiny_net: Build, images: list[Tensor]) -> None:
    from qsr_plugin.losses.context import StepContext
    from qsr_plugin.losses.distill_loss import BlockSKTLoss, SKTLoss

    records = []
    for kind_of_bits in (8, 2):
        net = quantize_model(tiny_net("SRResNet"), load_recipe("pams", weight_bits=kind_of_bits, act_bits=kind_of_bits))
        loss, seen = BlockSKTLoss(), []
        tap(calibrate(net, images), loss.taps[0], loss.taps[0])
        for block in net.body:
            block.bn2.register_forward_pre_hook(lambda module, given, seen=seen: seen.append(given[0]))
        net(images[0])
        assert all(torch.equal(a, b) for a, b in zip(net.last_record().tapped(loss.taps[0]), seen, strict=True))
        records.append(net.last_record())
    teacher, student = records
    value = loss(StepContext(images[0], images[0], student, images[0], teacher))
    one = SKTLoss(loss_weight=100 / 255)
    want = [one.compare(a, b) for a, b in zip(student.tapped(loss.taps[0]), teacher.tapped(loss.taps[0]), strict=True)]
    assert len(want) == 2 and value.item() == pytest.approx(sum(want).item(), rel=1e-6) and value > 0
