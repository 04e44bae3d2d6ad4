"""Option values in a model file that would make a constructor open another file."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from safetensors.torch import save_file

from qsr_plugin.checkpoint import CheckpointError, load_quantized, metadata_of
from qsr_plugin.options_file import path_in
from qsr_plugin.quant.surgery import quantize_model


@pytest.mark.parametrize(
    "value",
    [
        "/etc/passwd",
        "a/b",
        "..\\secret",
        "weights.pth",
        "X.YML",
        ["a", {"b": "c.pt"}],
        {"a.json": 1},
        {"a": [[["./x"]]]},
    ],
)
def test_paths_are_found_at_any_depth(value: object) -> None:
    assert path_in({"type": "EDSR", "num_feat": 8, "some": value})


def test_other_values_are_free() -> None:
    options = {"type": "SwinIR", "upsampler": "pixelshuffledirect", "depths": [6, 6], "img_range": 1.0, "x": None}
    assert path_in([options, {"match": "body.*.conv?", "bits": {"act": [4, 6]}}]) == ""


@pytest.fixture
def rewritten(tiny_net, tmp_path: Path):
    """A quantized model whose metadata was changed: ``rewritten("backbone", num_feat="x")``."""
    net = quantize_model(tiny_net(), "pams")

    def write(part: str, **changes: object) -> Path:
        metadata = metadata_of(net)
        metadata[part] = json.dumps({**json.loads(metadata[part]), **changes})
        save_file(dict(net.state_dict()), tmp_path / "q.safetensors", metadata)
        return tmp_path / "q.safetensors"

    return write


def test_a_backbone_cannot_name_a_file(rewritten, monkeypatch: pytest.MonkeyPatch) -> None:
    from basicsr.archs.edsr_arch import EDSR

    built: list[object] = []
    monkeypatch.setattr(EDSR, "__init__", lambda self, **options: built.append(options))
    with pytest.raises(
        CheckpointError, match="q.safetensors cannot be rebuilt: it names another file, '/tmp/other.pth'"
    ):
        load_quantized(rewritten("backbone", load_path="/tmp/other.pth"))
    assert not built, "no constructor saw it"


@pytest.mark.parametrize(
    "changes",
    [{"base": "../other.yml"}, {"policy": {"type": "edge_table", "table": "/etc/hostname"}}, {"method": "a/b"}],
)
def test_a_recipe_cannot_name_a_file(rewritten, changes: dict) -> None:
    with pytest.raises(CheckpointError, match="it names another file"):
        load_quantized(rewritten("recipe", **changes))
