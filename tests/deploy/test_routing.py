"""Networks of several depths that share the tiles of an image."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import pytest
import torch
from typer.testing import CliRunner

from qsr_plugin import load_quantized, save_quantized, slim
from qsr_plugin.cli import app
from qsr_plugin.deploy import routing
from qsr_plugin.deploy.engine import Engine
from qsr_plugin.deploy.image_io import read_picture
from qsr_plugin.deploy.routing import with_shallower
from qsr_plugin.deploy.tiles import upscale_tiled
from qsr_plugin.errors import UserError
from qsr_plugin.quant.image_stats import edge_scores
from tests.deploy.engines import nearest_engine
from tests.deploy.test_upscale import noise, write_png


def constant(value: float, seen: Counter[float], **changes: object) -> Engine:
    """Makes images of one value, and counts its tiles."""

    def run(x: np.ndarray) -> np.ndarray:
        seen[value] += len(x)
        return np.full((len(x), 3, 2 * x.shape[2], 2 * x.shape[3]), value, np.float32)

    return Engine("torch", 2, run, **changes)


@pytest.mark.parametrize("size", [(1, 1), (2, 5), (12, 9)])
def test_edges_are_scored_as_policies_score_them(size: tuple[int, int]) -> None:
    tile = np.random.default_rng(0).random((3, *size), np.float32)
    assert routing._edge_score(tile) == pytest.approx(edge_scores(torch.from_numpy(tile)[None]).item(), rel=1e-6)


@pytest.mark.parametrize("batch", [1, 3])
def test_tiles_with_more_edges_go_deeper(batch: int) -> None:
    """Four columns of tiles, from flat to noisy: one for the first network, one for the second, two for the last."""
    strength = np.repeat([0.0, 0.1, 0.3, 0.9], 8)
    image = (0.5 + strength[None, :, None] * (np.random.default_rng(0).random((8, 32, 3)) - 0.5)).astype(np.float32)
    seen: Counter[float] = Counter()
    engine = with_shallower([constant(value, seen) for value in (0.0, 0.5, 1.0)])
    out = upscale_tiled(engine, image, 8, 0, batch)
    assert [int(level) for level in out[0, 8::16, 0]] == [0, 128, 255, 255] and (out == out[:1]).all()
    assert seen == {0.0: 1, 0.5: 1, 1.0: 2}


@pytest.mark.parametrize("tiles", [1, 2, 3, 4, 7])
def test_shares_are_equal_and_the_rest_is_for_the_deepest(tiles: int) -> None:
    seen: Counter[float] = Counter()
    engine = with_shallower([constant(value, seen) for value in (0.0, 0.5, 1.0)])
    upscale_tiled(engine, noise(4, 4 * tiles).astype(np.float32) / 255, 4, 0)
    counts = [seen[value] for value in (0.0, 0.5, 1.0)]
    assert sum(counts) == tiles and counts == sorted(counts) and counts[-1] - counts[0] <= 1


def test_networks_that_do_not_fit_together() -> None:
    with pytest.raises(UserError, match="of an image have scale 4 and 2: give one network at several depths"):
        with_shallower([nearest_engine(4), nearest_engine(2)])
    with pytest.raises(UserError, match="take 8x8 pixels only and any size: export them with one --input-size"):
        with_shallower([nearest_engine(fixed=(8, 8)), nearest_engine()])


def test_the_command(monkeypatch: pytest.MonkeyPatch, model_of_depths: Path, tmp_path: Path) -> None:
    """The flat half of an image is that of one block, the other half that of two."""
    monkeypatch.setenv("COLUMNS", "400")
    picture = np.concatenate([np.full((16, 16, 3), 90, np.uint8), noise(16, 16)], 1)
    write_png(tmp_path / "in.png", picture)

    def made(depth: str) -> np.ndarray:
        out = tmp_path / f"{depth}.png"
        given = [
            tmp_path / "in.png",
            "-o",
            out,
            "--model",
            model_of_depths,
            "--tile",
            16,
            "--overlap",
            0,
            "--depth",
            depth,
        ]
        done = CliRunner().invoke(app, ["upscale", *map(str, given)])
        assert done.exit_code == 0, done.output
        return read_picture(out).rgb

    shallow, deep, both = made("1"), made("2"), made("2,1")
    assert (shallow[:, :32] != deep[:, :32]).any() and (shallow[:, 32:] != deep[:, 32:]).any()
    np.testing.assert_array_equal(both, np.concatenate([shallow[:, :32], deep[:, 32:]], 1))
    files = [tmp_path / "1.safetensors", tmp_path / "2.safetensors"]
    for blocks, path in enumerate(files, 1):
        save_quantized(slim(load_quantized(model_of_depths), blocks), path)
    given = [tmp_path / "in.png", "-o", tmp_path / "files.png", "--tile", 16, "--overlap", 0]
    done = CliRunner().invoke(app, ["upscale", *map(str, given), "--model", str(files[0]), "--model", str(files[1])])
    assert done.exit_code == 0, done.output
    np.testing.assert_array_equal(read_picture(tmp_path / "files.png").rgb, both)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--depth", "1,many"), "--depth is '1,many'; expected numbers of blocks like 8 or 4,8,16"),
        (("--depth", "3"), "has 2 blocks: give 1 to 2"),
        (("--depth", "1,2", "--tile", "0"), "--tile 0 runs whole images, and several depths share tiles"),
        (("--model", "net.safetensors", "--depth", "1"), "with 2 models: give one model at several depths"),
        (("--model", "net.safetensors"), "several models share the tiles, given from the fewest blocks to the most"),
    ],
)
def test_depths_that_do_not_fit(
    monkeypatch: pytest.MonkeyPatch, model_of_depths: Path, tmp_path: Path, arguments: tuple[str, ...], message: str
) -> None:
    monkeypatch.chdir(tmp_path)
    write_png(tmp_path / "in.png", noise(8, 8))
    given = ["in.png", "-o", "out.png", "--model", "net.safetensors", *arguments]
    assert message in str(CliRunner().invoke(app, ["upscale", *given]).exception)
    assert not (tmp_path / "out.png").exists()
