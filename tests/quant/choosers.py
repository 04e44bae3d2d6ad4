"""Small bit policies for tests of the mechanism, one of each kind; put into the registry by the fixture ``choosers``."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.policy import BitDecision, BitPolicy, NetworkPolicy, PolicyPart, choose
from qsr_plugin.quant.quantizer import StrictOptions
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.surgery import quantize_model

CANDIDATES = (4, 6, 8)


class Brightness(NetworkPolicy):
    """Compares the mean of each image with two thresholds that calibration sets; counts how often it is asked."""

    adapts = True

    def __init__(self, options: StrictOptions, candidates: tuple, places: tuple, channels: tuple) -> None:
        super().__init__(options, candidates, places, channels)
        self.channels, self.asked, self.settled = channels, 0, {}
        self.seen_means: list[Tensor] | None = None
        self.register_buffer("limits", torch.tensor([0.45, 0.55]))

    def begin_calibration(self) -> None:
        self.seen_means = []

    def observe(self, image: Tensor) -> None:
        if self.seen_means is not None:
            self.seen_means.append(image.mean((1, 2, 3)))

    def end_calibration(self, *, keep: bool = True) -> None:
        if keep and self.seen_means:
            means = torch.cat(self.seen_means)
            self.limits.copy_(torch.stack([means.min(), means.max()]))
        self.seen_means = None

    def settle(self, policies: Mapping[str, BitPolicy]) -> None:
        self.settled = {name: policy.largest for name, policy in policies.items()}

    def bits(self, record: ForwardRecord) -> Tensor:
        self.asked += 1
        level = (record.image.mean((1, 2, 3))[:, None] > self.limits).sum(1)
        return self.limits.new_tensor(self.candidates)[level]


class ByBrightness(BitPolicy):
    """All places of an image have the bits of its brightness."""

    network = Brightness

    def __init__(self, options, candidates, channels=None, channel_axis=1) -> None:
        super().__init__(options, candidates, channels, channel_axis)
        self.channels, self.largest, self.stage = channels, None, None
        self.open = False

    def begin_calibration(self) -> None:
        self.open, self.largest = True, None

    def observe(self, x: Tensor) -> None:
        if self.open:
            self.largest = x.abs().amax() if self.largest is None else torch.maximum(self.largest, x.abs().amax())

    def end_calibration(self, *, keep: bool = True) -> None:
        if not keep and self.open:
            self.largest = None
        self.open = False

    def enter_stage(self, stage) -> None:
        self.stage = stage

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        return BitDecision(record.once(record.policy.bits))

    def usual_bits(self) -> int:
        return 6


class Gate(NetworkPolicy):
    """A linear layer on the means of the head's channels; one threshold that no gradient reaches."""

    taps = ("head:output",)

    def __init__(self, options: StrictOptions, candidates: tuple, places: tuple, channels: tuple) -> None:
        super().__init__(options, candidates, places, channels)
        self.linear = nn.Linear(channels[0], len(candidates))
        self.limit = nn.Parameter(torch.tensor(2.0))
        self.target_bits = 5.0

    def threshold_parameters(self) -> list[nn.Parameter]:
        return [self.limit]

    def project(self) -> None:
        with torch.no_grad():
            self.limit.clamp_(max=1.0)

    def probabilities(self, record: ForwardRecord) -> Tensor:
        (features,) = record.tapped("head:output")
        return (self.linear(4 * features.mean((2, 3))) * self.limit).softmax(1)


class Gated(BitPolicy):
    """All places of an image have the bits its gate chooses, learned through a one-hot factor."""

    network = Gate

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        return choose(record.once(record.policy.probabilities), self.candidates, straight_through=True)


class Selector(BitPolicy):
    """A linear layer of each place's own on the deviations of its channels, learned through the mixture."""

    per_channel = True

    def __init__(self, options, candidates, channels=None, channel_axis=1) -> None:
        super().__init__(options, candidates, channels, channel_axis)
        self.linear = nn.Linear(channels, len(candidates))

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        rows = features.detach().movedim(self.channel_axis, 1).flatten(2)
        rows = rows.reshape(record.images, -1, *rows.shape[1:]).transpose(1, 2).flatten(2)
        return choose(self.linear(rows.std(2)).softmax(1), self.candidates)


class Offset(BitPolicy):
    """One bit more or less around a given width, learned, whatever the image."""

    reach = 1

    class Options(StrictOptions):
        start: float = 0.0

    def __init__(self, options, candidates, channels=None, channel_axis=1) -> None:
        super().__init__(options, candidates, channels, channel_axis)
        self.offset = nn.Parameter(torch.tensor(options.start))

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        soft = self.offset.tanh()
        return BitDecision(self.candidates[1] + soft + (self.offset.clamp(-1, 1).round() - soft).detach())

    def usual_bits(self) -> Tensor:
        return (self.candidates[1] + self.offset.clamp(-1, 1).round()).detach()


KINDS = {"toy_brightness": ByBrightness, "toy_gate": Gated, "toy_selector": Selector, "toy_offset": Offset}


class Block(nn.Module):
    """Residual block."""

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(4, 4, 3, padding=1), nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.conv2(self.conv1(x).relu())


class Net(nn.Module):
    """Head, two residual blocks, tail.

    Attributes:
        reentrant: Kind of the activation checkpointing of the blocks; ``None`` for none.
    """

    def __init__(self, reentrant: bool | None = None) -> None:
        super().__init__()
        self.head, self.tail = nn.Conv2d(3, 4, 3, padding=1), nn.Conv2d(4, 3, 3, padding=1)
        self.body = nn.ModuleList([Block(), Block()])
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.head(x)
        for block in self.body:
            x = block(x) if self.reentrant is None else checkpoint(block, x, use_reentrant=self.reentrant)
        return self.tail(x)


def recipe(policy: str, **changes: object) -> dict[str, object]:
    """A recipe with one of the policies above for networks whose convolutions are named ``conv?``."""
    return {
        "method": "mine",
        "bits": {"weight": 8, "act": 5 if KINDS[policy].reach else list(CANDIDATES)},
        "quantizers": {"act": "pams", "weight": "maxabs"},
        "policy": policy,
        "placement": "all",
        "placements": {"all": [{"match": "**conv?", "port": "input"}, {"match": "**conv?", "port": "weight"}]},
        **changes,
    }


def quantized(policy: str, images: list[Tensor], **changes: object) -> nn.Module:
    """:class:`Net` with fixed weights, quantized and calibrated."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return calibrate(quantize_model(Net(), recipe(policy, **changes)), images)


def bright_to_dark(count: int) -> Tensor:
    """``(count, 3, 8, 8)`` images whose mean falls from 0.8 to 0.2, and whose contrast rises."""
    noise = torch.rand(count, 3, 8, 8, generator=torch.Generator().manual_seed(1)) - 0.5
    fall, rise = torch.linspace(0.8, 0.2, count), torch.linspace(0.05, 0.4, count)
    return fall.view(-1, 1, 1, 1) + rise.view(-1, 1, 1, 1) * noise


def trained(net: nn.Module, batch: Tensor) -> nn.Module:
    """Set the linear layers of learned policies so that each width is chosen for about a third of a batch."""
    seen: dict[nn.Module, Tensor] = {}
    layers = [m for part in net.modules() if isinstance(part, PolicyPart) for m in part.modules()]
    for layer in (layer for layer in layers if isinstance(layer, nn.Linear)):
        hook = layer.register_forward_pre_hook(lambda module, args: seen.update({module: args[0].detach()}))
        with torch.no_grad():
            net(batch)
            along = seen[layer][-1] - seen[layer][0]
            rows = torch.stack([-along, torch.zeros_like(along), along]) * 6 / along.square().sum()
            layer.weight.copy_(rows)
            layer.bias.copy_(torch.tensor([0.0, 1.0, 0.0]) - rows @ seen[layer].mean(0))
        hook.remove()
    return net
