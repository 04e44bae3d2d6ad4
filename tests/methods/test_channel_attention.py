"""Channel attention, as HAT and RCAN have it, under bits per image: quantized where asked, float by one rule."""

from __future__ import annotations

import pytest
import torch

from qsr_plugin import compat
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.places import ROLE_TABLES
from qsr_plugin.quant.surgery import quantize_model, quantizers
from tests.recipes import ADAPTIVE, shipped

compat.import_host()

EVERY_CONV = [{"match": "body.**", "type": "Conv2d", "port": port} for port in ("input", "weight")]
LEAVE_ATTENTION = {"match": "body.**.attention.*", "type": "Conv2d", "keep_float": True}


@pytest.mark.parametrize("method", ADAPTIVE)
def test_one_rule_leaves_channel_attention_float(
    tiny_net, images, monkeypatch: pytest.MonkeyPatch, method: str
) -> None:
    monkeypatch.setitem(ROLE_TABLES, "RCAN", {"head": ("conv_first",)})
    places = {}
    for name, rules in (("all", EVERY_CONV), ("but attention", [*EVERY_CONV, LEAVE_ATTENTION])):
        net = tiny_net("RCAN", num_feat=16, num_group=1)
        net = quantize_model(net, shipped(method, net, placement="mine", placements={"mine": rules}))
        net = calibrate(net, images).train()
        net(images[0]).sum().backward()  # in attention a statistic of one pixel has no spread
        assert all(bool(p.grad.isfinite().all()) for p in net.parameters() if p.grad is not None)
        bits = net.last_record().bits
        assert all(bool(chosen.isfinite().all()) for chosen in bits.values() if isinstance(chosen, torch.Tensor))
        places[name] = {place for place, _ in quantizers(net)}
    dropped = places["all"] - places["but attention"]
    assert dropped and all(".attention." in place for place in dropped)
    assert places["but attention"] and not any(".attention." in place for place in places["but attention"])
