"""The form of result files: what is written comes back, and what is no such file is told so."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import math
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from qsr_plugin import __version__, complexity
from qsr_plugin.data.patches import PatchOptions
from qsr_plugin.report.evaluate import evaluate
from qsr_plugin.report.fab import BitStatistics
from qsr_plugin.report.result_io import (
    SCHEMA,
    VERSION,
    NoResultFile,
    ResultError,
    read_results,
    read_table,
    write_results,
)
from qsr_plugin.report.result_schema import (
    CalibrationImages,
    Costs,
    ImageQuality,
    Quality,
    Result,
    ResultTable,
    Training,
    described,
    of_backbone,
    package_versions,
)


@pytest.fixture
def real(tiny, write_images) -> Result:
    """Everything of a small network on two images, in patches."""
    rng = np.random.default_rng(0)
    images = {f"{name}.png": rng.integers(0, 256, (32, 32, 3), dtype=np.uint8) for name in "ab"}
    hr = write_images("HR", images)
    lr = write_images("LR", {name: image[::2, ::2] for name, image in images.items()})
    net, cut = tiny("EDSR", "minmax", weight_bits=4, act_bits=6), PatchOptions(size=12, overlap=2)
    score = evaluate(net, hr, lr, 2, patches=cut)
    costs = complexity(net, (16, 16), bits=score.place_bits, patches=cut)
    return Result(
        **described(net.recipe), **of_backbone({"type": "EDSR", "upscale": 2}), network="tiny", seed=3,
        quality={"Two": Quality.of(score, costs.bitops)}, before={"Two": Quality(psnr=math.inf)}, costs=Costs.of(costs),
        calibration=CalibrationImages(folder="photos", reduced=2, images=2, names=("a.png", "b.png"), side=48, seed=3),
        seconds={"calibration": 1.5}, peak_memory=10**9, training=Training(iterations=7), versions=package_versions(),
        origin={"bits": "W4A6", "side": 8}, reference=Result(label="float", costs=Costs.of(complexity(net))),
    )  # fmt: skip


def test_what_is_written_comes_back(real: Result, tmp_path: Path) -> None:
    write_results(real, tmp_path / "one.json")
    assert read_results(tmp_path / "one.json") == [real.reference, real]
    table = ResultTable(
        rows=(real, Result(label="b W4A4", note="failed")), settings={"iters": 3}, details={"span": 2.5}
    )
    write_results(table, tmp_path / "two.json")
    assert read_table(tmp_path / "two.json") == table
    assert read_results(tmp_path / "two.json") == [real.reference, *table.rows]


def test_what_a_result_says(real: Result) -> None:
    """Names, protocol and costs, as the networks and the folders have them."""
    assert (real.label, real.method, real.bits, real.placement) == ("minmax W4A6", "minmax", "W4A6", "body")
    assert (real.architecture, real.scale, real.recipe["method"]) == ("EDSR x2", 2, "minmax")
    quality = real.quality["Two"]
    assert (quality.images, quality.border, quality.colour, quality.fab) == (2, 2, "Y", 6.0)
    assert quality.patches == real.costs.patches == {"size": 12, "overlap": 2, "last": "shift"}
    assert quality.protocol == real.costs.protocol and quality.protocol.startswith("patches of 12x12")
    assert [one.name for one in quality.by_image] == ["a.png", "b.png"] and quality.bits.fab == 6.0
    assert quality.bitops == real.costs.bitops and real.costs.convention == "macs-bits"
    assert {"qsr_plugin", "torch", "basicsr", "python"} <= set(real.versions)


def test_sizes_real_and_ideal(tiny) -> None:
    """Four convolutions of the body at 4 bits; a file also has their ranges, two for each weight and input or more."""
    net = tiny("EDSR", "minmax", weight_bits=4, act_bits=4)
    costs = Costs.of(complexity(net), sites=False)
    weights = sum(net.get_parameter(f"body.{b}.conv{c}.weight").numel() for b in (0, 1) for c in (1, 2))
    assert costs.ideal_storage_bits == 32 * costs.parameters - 28 * weights
    assert costs.ideal_storage_bits < costs.storage_bits < costs.float_storage_bits and costs.sites == ()
    plain = Costs.of(complexity(tiny("EDSR")))
    assert plain.ideal_storage_bits == plain.storage_bits == plain.float_storage_bits


def test_files_are_strict_json(tmp_path: Path) -> None:
    """Infinity and NaN are strings, which come back as numbers."""
    quality = {"A": Quality(psnr=math.inf, ssim=1.0), "B": Quality(psnr=math.nan)}
    write_results(Result(label="a", quality=quality), tmp_path / "r.json")
    text = (tmp_path / "r.json").read_text()
    data = json.loads(text, parse_constant=lambda name: pytest.fail(f"{name} is not JSON"))
    assert data["schema"] == {"name": SCHEMA, "version": VERSION} and data["quality"]["A"]["psnr"] == "inf"
    (result,) = read_results(tmp_path / "r.json")
    assert math.isinf(result.quality["A"].psnr) and math.isnan(result.quality["B"].psnr)


OURS = {"name": SCHEMA, "version": VERSION}


@pytest.mark.parametrize(
    ("data", "says"),
    [
        ("{", "is no JSON"),
        ([1], "is no result file: expected schema 'qsr-results', found list"),
        ({}, r"found the keys \(none\)"),
        ({"complexity": {}, "scores": {}}, "found the keys complexity, scores.*make the results again"),
        ({"schema": "mine"}, "is no result file"),
        ({"schema": {**OURS, "version": VERSION + 1}}, f"of schema version {VERSION + 1}, qsr_plugin {__version__} reads version {VERSION}: update"),
        ({"schema": {**OURS, "version": 0}}, "version 0, .* make the results again"),
        ({"schema": {"name": SCHEMA}}, "version None"),
        ({"schema": OURS}, "results.label: required, but not given"),
        ({"schema": OURS, "rows": 3}, r"results\.rows: .*tuple"),
        ({"schema": OURS, "label": "a", "qualty": {}}, "results.qualty: unknown key. Did you mean 'quality'.*"
         f"another version of qsr_plugin.*{__version__}: make the results again"),
        ({"schema": OURS, "label": "a", "quality": {"A": {"ssim": 1}}}, r"results\.quality\.A\.psnr: required"),
        ({"schema": OURS, "label": "a", "quality": {"A": {"psnr": "30"}}}, r"quality\.A\.psnr: is '30', expected a number"),
        ({"schema": OURS, "rows": [{"label": "a", "quality": {"A": {"psnr": True}}}]}, r"rows\[0\]\.quality\.A\.psnr: is True"),
        ({"schema": OURS, "label": "a", "scale": 2.5}, r"results\.scale: .*integer"),
    ],
)  # fmt: skip
def test_what_is_no_result_file_is_told(tmp_path: Path, data: Any, says: str) -> None:
    path = tmp_path / "r.json"
    path.write_text(data if isinstance(data, str) else json.dumps(data))
    with pytest.raises(ResultError, match=rf"r\.json.*{says}"):
        read_results(path)


def test_the_version_rises_with_every_change_of_the_keys() -> None:
    """Unknown keys are refused. If this fails: raise VERSION, and put the new number and digest here."""
    parts = (ImageQuality, Quality, Costs, CalibrationImages, Training, Result, ResultTable)
    keys = {part.__name__: sorted(part.model_fields) for part in parts}
    keys["BitStatistics"] = sorted(field.name for field in dataclasses.fields(BitStatistics))
    digest = hashlib.sha256(json.dumps(keys, sort_keys=True).encode()).hexdigest()[:8]
    assert (VERSION, digest) == (1, "92747d0e")


def test_other_files_can_be_told_from_broken_ones(tmp_path: Path) -> None:
    """A reader of folders passes over the former alone."""
    (tmp_path / "other.json").write_text('{"a": 1}')
    with pytest.raises(NoResultFile):
        read_results(tmp_path / "other.json")
    (tmp_path / "newer.json").write_text(json.dumps({"schema": {"name": SCHEMA, "version": 99}}))
    with pytest.raises(ResultError) as caught:
        read_results(tmp_path / "newer.json")
    assert not isinstance(caught.value, NoResultFile)
    with pytest.raises(ResultError, match=r"none\.json cannot be read \(No such file"):
        read_results(tmp_path / "none.json")
    write_results(Result(label="a"), tmp_path / "one.json")
    with pytest.raises(ResultError, match=r"one\.json: results\.rows: required"):
        read_table(tmp_path / "one.json")
