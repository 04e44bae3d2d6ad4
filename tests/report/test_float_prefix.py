"""Passes that take results of their first layers from the float pass: the same outputs, and fewer layers run."""

from __future__ import annotations

import pytest
import torch
from qsr_plugin.archs.roles import list_backbones
from torch import Tensor, nn

from qsr_plugin import calibrate, quantize_model
from qsr_plugin.quant.record import float_mode, only_places
from qsr_plugin.quant.surgery import quantizers, sites
from qsr_plugin.report import float_prefix as reusing
from qsr_plugin.report.float_prefix import float_prefix
from tests.recipes import custom_recipe


def groups_of(net: nn.Module) -> list[list[str]]:
    """Each place, all of each layer, the first and the last place, all places."""
    places = [place for place, _ in quantizers(net)]
    layers = {place.rpartition(".")[0] for place in places}
    together = [[place for place in places if place.rpartition(".")[0] == layer] for layer in sorted(layers)]
    return [*([place] for place in places), *together, [places[0], places[-1]], places]


@pytest.mark.parametrize("room", [1.0, 0.0], ids=["kept", "no room"])
@pytest.mark.parametrize("backbone", list_backbones())
def test_outputs_are_those_of_whole_passes(tiny, monkeypatch, backbone: str, room: float) -> None:
    monkeypatch.setattr(reusing, "KEPT_SHARE", room)
    net = tiny(backbone, "minmax", weight_bits=4, act_bits=4, placement="full")
    for side in (8, 12):
        images = torch.rand(2, 3, side, side, generator=torch.Generator().manual_seed(side))
        with torch.no_grad():
            with float_mode():
                plain = net(images)
            want = []
            for group in groups_of(net):
                with only_places(group):
                    want.append(net(images))
            with float_prefix(net) as prefix:
                assert torch.equal(prefix.float_output(images), plain)
                found = [prefix.output(images, group) for group in groups_of(net)]
        assert all(torch.equal(a, b) for a, b in zip(found, want, strict=True))
        assert any(not torch.equal(one, plain) for one in found)
    assert not any("forward" in site.__dict__ for _, site in sites(net))


class Block(nn.Module):
    """A convolution whose result is changed in place."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 3, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x).relu_()


class Repeating(nn.Module):
    """A block that runs three times."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.again, self.last = nn.Conv2d(3, 3, 1), Block(), nn.Conv2d(3, 3, 1)

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        for _ in range(3):
            x = self.again(x).add_(x)
        return self.last(x)


def ran(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the convolutions that run from now on."""
    seen: list[str] = []
    plain = nn.Conv2d._conv_forward
    monkeypatch.setattr(
        nn.Conv2d, "_conv_forward", lambda self, *args: seen.append(self.site_name) or plain(self, *args)
    )
    return seen


def test_layers_before_the_first_that_quantizes_do_not_run(monkeypatch) -> None:
    torch.manual_seed(0)
    names = ("first", "again", "again.conv", "last")
    net = quantize_model(Repeating(), custom_recipe(*({"match": name, "port": "input"} for name in names)))
    images = torch.rand(2, 3, 6, 6)
    calibrate(net, [images])
    seen = ran(monkeypatch)
    wanted = {
        "first.input": ["first", *["again.conv"] * 3, "last"],
        "again.input": [*["again.conv"] * 3, "last"],
        "again.conv.input": [*["again.conv"] * 3, "last"],
        "last.input": ["last"],
    }
    with torch.no_grad(), float_prefix(net) as prefix:
        prefix.float_output(images)
        for place, want in wanted.items():
            seen.clear()
            found = prefix.output(images, [place])
            assert seen == want
            with float_mode():
                assert not torch.equal(found, net(images))


def test_an_error_leaves_the_network_as_it_was(tiny) -> None:
    """A module that somebody gave a forward of its own keeps it."""
    net = tiny("EDSR", "minmax", placement="full")
    net.conv_last.forward = own = net.conv_last.forward
    with pytest.raises(RuntimeError), torch.no_grad(), float_prefix(net) as prefix:
        prefix.float_output(torch.rand(1, 5, 8, 8))
    assert {name: vars(site).get("forward") for name, site in sites(net) if "forward" in vars(site)} == {
        "conv_last": own
    }
