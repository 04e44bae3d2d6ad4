"""Tiles: no seams, exact sizes, little memory, and smaller ones where memory runs out."""

from __future__ import annotations

import logging
import tracemalloc
from dataclasses import replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from qsr_plugin.deploy import tiles
from qsr_plugin.deploy.engine import Engine, open_engine
from qsr_plugin.deploy.tiles import check_tiles, default_tile, upscale_tiled
from qsr_plugin.errors import UserError
from tests.deploy.engines import nearest, nearest_engine


def levels(height: int, width: int, dtype: type = np.uint8) -> np.ndarray:
    """(H, W, 3) random integers over the full range."""
    return np.random.default_rng(0).integers(0, np.iinfo(dtype).max + 1, (height, width, 3), dtype)


def as_float(image: np.ndarray) -> np.ndarray:
    return image.astype(np.float32) / np.iinfo(image.dtype).max


def enlarged(image: np.ndarray, scale: int = 2) -> np.ndarray:
    return nearest(image.transpose(2, 0, 1), scale).transpose(1, 2, 0)


@given(st.data())
def test_repetition_is_exact_for_any_size_and_tile(data: st.DataObject) -> None:
    height, width = data.draw(st.integers(1, 60)), data.draw(st.integers(1, 60))
    tile = data.draw(st.one_of(st.none(), st.integers(1, 70)))
    overlap = data.draw(st.integers(0, (tile or 20) - 1))
    scale, window, batch = data.draw(st.tuples(st.integers(1, 3), st.sampled_from([1, 8]), st.integers(1, 4)))
    dtype = data.draw(st.sampled_from([np.uint8, np.uint16]))
    image = levels(height, width, dtype)
    sizes: list[tuple[int, ...]] = []
    engine = nearest_engine(scale, lambda x: sizes.append(x.shape), window=window)
    out = upscale_tiled(engine, as_float(image), tile, overlap, batch, dtype=dtype)
    np.testing.assert_array_equal(out, enlarged(image, scale))
    assert out.dtype == dtype
    assert max(size[0] for size in sizes) <= batch
    assert len({size[2:] for size in sizes}) == 1  # all tiles of an image have one size


@pytest.mark.parametrize("size", [(50, 37), (5, 7), (16, 24), (1, 100)])
def test_a_model_of_fixed_size_gets_only_its_tiles(size: tuple[int, int]) -> None:
    shapes = set()
    image = levels(*size)
    engine = nearest_engine(2, lambda x: shapes.add(x.shape), fixed=(16, 24), batches=False)
    np.testing.assert_array_equal(upscale_tiled(engine, as_float(image), None, 4, 3), enlarged(image))
    assert shapes == {(1, 3, 16, 24)}
    with pytest.raises(UserError, match="tile is 32, but this model takes 16x24 pixels only"):
        upscale_tiled(engine, as_float(image), 32)


def test_tiles_give_the_result_of_the_whole_image(tiny_net) -> None:
    """An overlap of 16 covers the receptive field of this network: 7 pixels to each side."""
    engine = open_engine(tiny_net("EDSR", num_block=2))
    image = as_float(levels(60, 45))
    whole = upscale_tiled(engine, image, None).astype(int)
    assert np.abs(upscale_tiled(engine, image, 24, 16, 3) - whole).max() <= 1
    apart = upscale_tiled(engine, image, 24, 0) - whole
    assert np.abs(apart).max() > 1  # without overlap seams show, so that the line above could fail


def test_the_default_overlap_is_what_the_network_needs(tiny_net) -> None:
    """16 blocks see 37 pixels to each side; the weights let far ones matter, and the output fill the range."""
    net, images = tiny_net("EDSR", num_block=16), torch.rand(2, 3, 48, 48, generator=torch.manual_seed(0))
    with torch.no_grad():
        for name, parameter in net.body.named_parameters():
            parameter *= 3 if name.endswith("weight") else 1
        net.conv_last.weight *= 0.2 / net(images).std()
        net.conv_last.bias += 0.5 - net(images).mean()
    engine = open_engine(net)
    assert 16 <= engine.reach <= 37
    image = as_float(levels(100, 170))
    whole = upscale_tiled(engine, image, None).astype(int)
    assert np.abs(upscale_tiled(engine, image, 90) - whole).max() <= 1
    assert np.abs(upscale_tiled(engine, image, 60, 16) - whole).max() > 20  # so that the line above could fail


class Pooled(torch.nn.Module):
    """The brightness of the whole image matters everywhere."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return x * x.mean(dim=(2, 3), keepdim=True)


def test_reach_of_networks(tiny_net, caplog: pytest.LogCaptureFixture) -> None:
    assert nearest_engine().reach == 0
    assert 1 <= open_engine(tiny_net("EDSR", num_block=2)).reach <= 9
    assert nearest_engine(fixed=(8, 24), window=8).reach == 0 and nearest_engine(fixed=(8, 8), window=8).reach == 0
    assert not caplog.records
    everywhere = open_engine(Pooled())
    assert [tiles.default_overlap(everywhere, side) for side in (192, 192, 40)] == [64, 64, 20]
    (warning,) = caplog.records
    assert "looks at more than 48 pixels to each side, or at the whole image" in warning.getMessage()


@pytest.mark.parametrize("tile, overlap", [(None, None), (48, 4), (200, None)])
def test_nothing_is_measured_without_need(tile: int | None, overlap: int | None) -> None:
    seen: list[tuple[int, ...]] = []
    upscale_tiled(nearest_engine(2, lambda x: seen.append(x.shape)), np.zeros((60, 50, 3), np.float32), tile, overlap)
    assert not [shape for shape in seen if shape[3] > 60]


def test_results_are_clipped_and_rounded() -> None:
    values = np.array([-0.3, 0.0, 0.4 / 255, 0.6 / 255, 254.6 / 255, 1.0, 7.0], np.float32)
    image = np.broadcast_to(values[:, None], (1, 7, 3))
    assert upscale_tiled(nearest_engine(1), image, None)[0, :, 0].tolist() == [0, 0, 0, 1, 255, 255, 255]


@pytest.mark.parametrize(
    "tile, overlap, batch, said",
    [
        (16, 16, 1, "overlap is 16; it must be 0 to 15 with tiles of 16 pixels"),
        (16, -1, 1, "overlap is -1"),
        (0, 0, 1, "tile is 0"),
        (16, 4, 0, "batch is 0"),
    ],
)
def test_impossible_tiles_are_refused(tile: int, overlap: int, batch: int, said: str) -> None:
    for run in (check_tiles, lambda engine, *cut: upscale_tiled(engine, np.zeros((8, 8, 3), np.float32), *cut)):
        with pytest.raises(UserError, match=said):
            run(nearest_engine(), tile, overlap, batch)


def test_an_output_that_is_not_finite_is_refused() -> None:
    engine = Engine("torch", 2, lambda x: nearest(x) / np.float32(0))
    with np.errstate(all="ignore"), pytest.raises(UserError, match="NaN or infinity"):
        upscale_tiled(engine, np.zeros((4, 4, 3), np.float32), None)


# -- memory ----------------------------------------------------------------------------------------------------------


def limited(pixels: int, error: Exception) -> Engine:
    """Runs out of memory where a batch has more pixels."""

    def watch(x: np.ndarray) -> None:
        if x.shape[0] * x.shape[2] * x.shape[3] > pixels:
            raise error

    return nearest_engine(2, watch)


@pytest.mark.parametrize(
    "error",
    [
        MemoryError(),
        RuntimeError("CUDA out of memory. Tried to allocate 2.00 GiB"),
        RuntimeError("[enforce fail at alloc_cpu.cpp] DefaultCPUAllocator: can't allocate memory"),
        RuntimeError("std::bad_alloc"),
    ],
)
def test_batches_then_tiles_are_halved(error: Exception, caplog: pytest.LogCaptureFixture) -> None:
    image = levels(150, 130)
    with caplog.at_level(logging.WARNING):
        out = upscale_tiled(limited(40 * 40, error), as_float(image), 128, 16, 4)
    np.testing.assert_array_equal(out, enlarged(image))
    said = [record.getMessage().removeprefix("out of memory: going on with ") for record in caplog.records]
    assert [line.split(" at")[0] for line in said] == [
        "tiles of 128 pixels, 2",
        "tiles of 128 pixels, 1",
        "tiles of 64 pixels, 1",
        "tiles of 32 pixels, 1",
    ]


def test_whole_images_are_cut_when_memory_runs_out() -> None:
    image = levels(90, 100)
    np.testing.assert_array_equal(
        upscale_tiled(limited(50 * 50, MemoryError()), as_float(image), None), enlarged(image)
    )


def test_the_end_of_halving_is_an_error() -> None:
    image = np.zeros((90, 100, 3), np.float32)
    with pytest.raises(UserError, match="out of memory even with one tile of 32x32 pixels at a time"):
        upscale_tiled(limited(100, MemoryError()), image, None, 8, 2)
    with pytest.raises(UserError, match="out of memory even with one tile of 60x60 .*overlap 40"):
        upscale_tiled(limited(100, MemoryError()), image, 60, 40)
    with pytest.raises(UserError, match="out of memory even with one tile of 64x64"):
        upscale_tiled(replace(limited(100, MemoryError()), fixed=(64, 64)), image, None)


def test_other_errors_are_passed_on_at_once() -> None:
    seen: list[int] = []

    def fail(x: np.ndarray) -> None:
        seen.append(len(x))
        raise RuntimeError("sizes do not match")

    with pytest.raises(RuntimeError, match="sizes do not match"):
        upscale_tiled(nearest_engine(2, fail), np.zeros((90, 100, 3), np.float32), 32, 4, 2)
    assert seen == [2]


def test_only_the_result_and_one_batch_are_in_memory() -> None:
    image = as_float(levels(300, 400))
    tracemalloc.start()
    try:
        out = upscale_tiled(nearest_engine(4), image, 32, 4)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    assert out.nbytes <= peak < 1.5 * out.nbytes  # floats of the whole result would be four times as much


@pytest.mark.parametrize(
    "size, free, expected", [((512, 512), 2**40, None), ((513, 512), 2**40, 192), ((400, 400), 2**28, 192)]
)
def test_the_tile_is_chosen_by_image_and_memory(
    size: tuple[int, int], free: int, expected: int | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tiles, "free_memory", lambda device: free)
    assert default_tile(nearest_engine(), *size) == expected
    assert default_tile(SimpleNamespace(fixed=(8, 8)), *size) is None


def test_memory_is_that_of_the_network_and_of_all_processes(monkeypatch: pytest.MonkeyPatch, tiny_net) -> None:
    engine = open_engine(tiny_net())
    assert engine.pixel_bytes == 4 * (32 + 32)  # its pixel shuffle, see test_bench.py
    needed = 2 * engine.pixel_bytes * 400 * 400
    monkeypatch.setattr(tiles, "free_memory", lambda device: needed)
    assert default_tile(engine, 400, 400) is None
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    assert default_tile(engine, 400, 400) == 192
    monkeypatch.setattr(tiles, "free_memory", lambda device: 2 * needed)
    assert default_tile(engine, 400, 400) is None
