"""Averages and distributions of bits, counted by hand."""

from __future__ import annotations

import json

import pytest
import torch
from torch import nn

from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.report.fab import BitTally, bits_of_images, feature_average_bits
from tests.quant.choosers import quantized

NAMES = ("a", "b", "c", "d")


def image(*patches: tuple[float, ...]) -> list[dict[str, float]]:
    return [dict(zip(NAMES, bits)) for bits in patches]


def test_published_example() -> None:
    """Two patches of a network with four places have 6.5 and 5.0 bits, the image 5.75 whatever their sizes."""
    assert BitTally().add(image((4, 8, 8, 6))) == 6.5
    assert BitTally().add(image((4, 4, 4, 8))) == 5.0
    assert BitTally().add(image((4, 8, 8, 6), (4, 4, 4, 8))) == 5.75


def test_images_weigh_alike_however_many_patches_they_have() -> None:
    tally = BitTally()
    assert tally.add(image((4, 8), (4, 4), (8, 8))) == 6.0
    assert tally.add(image((4, 4)), others=[{"head": 8.0}]) == 4.0
    found = tally.statistics()
    assert found.fab == 5.0
    assert (found.lowest, found.quartiles, found.highest) == (4.0, (4.5, 5.0, 5.5), 6.0)
    assert found.shares == {"4": pytest.approx((1 / 2 + 1) / 2), "8": pytest.approx(1 / 4)}
    assert found.places == {"a": pytest.approx((16 / 3 + 4) / 2), "b": pytest.approx((20 / 3 + 4) / 2)}
    assert found.others == {"head": 8.0}
    assert found.varies and found.shares_text() == "4: 75 %, 8: 25 %"
    assert json.loads(json.dumps(found.to_dict()))["places"] == found.places


def test_shares_and_places_have_the_mean_fab() -> None:
    generator = torch.Generator().manual_seed(0)
    tally = BitTally()
    for patches in (1, 3, 6):
        tally.add(image(*(2.0 * torch.randint(2, 5, (patches, 4), generator=generator)).tolist()))
    found = tally.statistics()
    assert sum(found.shares.values()) == pytest.approx(1)
    assert sum(float(width) * share for width, share in found.shares.items()) == pytest.approx(found.fab)
    assert sum(found.places.values()) / 4 == pytest.approx(found.fab)


def test_a_float_network_has_32_bits_and_no_shares() -> None:
    tally = BitTally()
    assert tally.add([{}]) == 32
    found = tally.statistics()
    assert (found.fab, found.shares, found.places, found.varies) == (32, {}, {}, False)


@pytest.mark.usefixtures("choosers")
def test_bits_of_every_image_of_a_forward(images) -> None:
    """One width for the batch, one per image, and a place with bits of its own, which is not counted."""
    own = {"match": "body.1.conv2", "port": "input", "bits": 8}
    placements = {"all": [{"match": "body.*.conv?", "port": "input"}, own]}
    net: nn.Module = quantized("toy_selector", images, placements=placements)
    names = [f"body.{block}.conv{conv}.input" for block in (0, 1) for conv in (1, 2)]
    record = ForwardRecord(images=2)
    record.bits = {names[0]: torch.tensor([4.0, 6.0]), names[1]: 8, names[2]: torch.tensor(4.0), names[3]: 8}
    counted, others = bits_of_images(net, record)
    assert counted == [dict(zip(names, bits)) for bits in ((4.0, 8.0, 4.0), (6.0, 8.0, 4.0))]
    assert others == [{names[3]: 8.0}] * 2
    assert feature_average_bits(net, record) == pytest.approx((16 / 3 + 6) / 2)
    del record.bits[names[1]]  # a block that was left out
    assert feature_average_bits(net, record) == 4.5
