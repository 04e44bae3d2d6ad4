"""Tables for CABM: made from networks whose selectors choose, also by ``qsr table``."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import Tensor, nn

from qsr_plugin.checkpoint import save_quantized
from qsr_plugin.methods.cabm import read_table
from qsr_plugin.quant.calibrate import calibrate
from qsr_plugin.quant.image_stats import edge_scores
from qsr_plugin.quant.recipe import load_recipe
from qsr_plugin.quant.surgery import policies, quantize_model
from tests.host import harness
from tests.methods.bit_tables import CANDIDATES, places_of, varied


def choosing(tiny_net, images: list[Tensor], **changes: object) -> nn.Module:
    """A network whose selectors choose more bits for stronger gradients, each from another strength on."""
    net = calibrate(quantize_model(tiny_net(**changes), "cadyq"), images)
    with torch.no_grad():
        for number, (_, policy) in enumerate(one for one in policies(net) if len(one[1].candidates) > 1):
            policy.linear.weight.zero_()[:, 0] = torch.tensor([0.0, 0.5, 1.0])
            policy.linear.bias.copy_(torch.tensor([20.0, 0.0, -30.0]) + number * torch.tensor([0.0, -1.0, -4.0]))
    return net


def test_a_table_holds_what_each_patch_was_given(tiny_net, images) -> None:
    from qsr_plugin.data.spans import spans
    from qsr_plugin.report.edge_table import build_table

    net = choosing(tiny_net, images).train()
    photos = [torch.cat(varied(4, 20).split(1), 3)[..., :33], varied(1, 9), varied(2, 24)[1:]]
    want, count = set(), 0
    for photo in photos:
        for y in spans(photo.shape[2], 12, 2, last="enlarge"):
            for x in spans(photo.shape[3], 12, 2, last="enlarge"):
                patch = photo[:, :, y.start : y.stop, x.start : x.stop]
                net.eval()(patch)
                bits = net.last_record().bits
                row = "".join(str(round(bits[place].item())) for place in places_of(net))
                want.add((round(edge_scores(patch).item(), 2), row))
                count += 1
    net.train()
    reports = [build_table(net, photos, patch=12, step=10, batch=batch) for batch in (1, 3)]
    assert reports[0] == reports[1] and net.training
    made = reports[0].table
    assert set(zip(made.scores, made.bits)) == want and reports[0].patches == count == 8
    assert list(zip(made.scores, made.fabs())) == sorted(zip(made.scores, made.fabs()))
    assert (
        made.places == tuple(places_of(net)) and made.candidates == CANDIDATES and (made.patch, made.step) == (12, 10)
    )
    assert len(set("".join(made.bits))) == 3, "all widths are used, else this test says little"
    assert reports[0].bits.lowest == min(made.fabs()) and reports[0].bits.highest == max(made.fabs())


def test_a_table_needs_a_choosing_network_and_patches_that_meet(tiny_net, images) -> None:
    from qsr_plugin.report.edge_table import build_table

    fixed = calibrate(quantize_model(tiny_net(), "pams"), images)
    with pytest.raises(ValueError, match="the same bits for every image"):
        build_table(fixed, images)
    for step in (0, 13):
        with pytest.raises(ValueError, match=f"step {step} with patches of 12 pixels: allowed are 1 to 12"):
            build_table(choosing(tiny_net, images), images, patch=12, step=step)
    with pytest.raises(ValueError, match="no images"):
        build_table(choosing(tiny_net, images), [])


def test_command_line_from_selectors_to_a_network_without(tiny_net, images, tmp_path: Path) -> None:
    """Patches that the table was made from get the very bits that the selectors chose for them."""
    from qsr_plugin.data.images import list_images
    from qsr_plugin.report.edge_table import low_resolution

    net = choosing(tiny_net, images).eval()
    save_quantized(net, tmp_path / "cadyq.safetensors")
    folder = harness.write_photos(tmp_path / "photos", 3, side=48)
    sizes = ("--patch", 16, "--step", 14, "--batch", 2)
    said = harness.qsr(tmp_path, "table", "cadyq.safetensors", "-o", "out/table.json", "--photos", folder, *sizes)
    assert "of 16 pixels, 14 apart" in said and "recipe.policy.table: out/table.json" in said
    made = read_table(tmp_path / "out/table.json")
    assert len(set(made.scores)) == len(made.scores) > 1

    recipe = load_recipe("cabm", policy={"table": str(tmp_path / "out/table.json"), "max_bits_train": 9})
    mapped = calibrate(quantize_model(tiny_net(), recipe), images)
    seen = set()
    for path in list_images(folder):
        image = low_resolution(path, scale=2)
        assert image.shape == (1, 3, 24, 24)
        with torch.no_grad():
            net(image), mapped(image)  # at this size an image is one patch
        rows = [[round(float(one.last_record().bits[place])) for place in places_of(net)] for one in (net, mapped)]
        assert rows[0] == rows[1]
        seen.add(tuple(rows[0]))
    assert len(seen) > 1


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--images", "a", "--photos", "b"], "give one of --images"),
        ([], "give one of --images"),
        (["--images", ".", "-o", "table.txt"], "tables are saved as .json"),
        (["--images", "none"], "looked for a folder of images"),
    ],
)
def test_command_line_says_what_is_missing(arguments: list[str], says: str, tmp_path: Path, monkeypatch) -> None:
    from typer.testing import CliRunner

    from qsr_plugin.cli import app

    monkeypatch.chdir(tmp_path)
    done = CliRunner().invoke(app, ["table", "net.safetensors", "-o", "table.json", *arguments], env={"COLUMNS": "160"})
    assert done.exit_code != 0 and says in done.output + str(done.exception)
