"""``qsr --import FILE.py``: a network that only a file of the user defines, from float weights to its report."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from torch import nn

from qsr_plugin.report.result_io import read_table
from tests.host import harness
from tests.host.harness import qsr
from tests.host.test_other_project import TOY_ARCH


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """File of the network, its weights, its option file, and pictures."""
    (tmp_path / "my_networks.py").write_text(TOY_ARCH)
    (tmp_path / "toy.yml").write_text("network_g: {type: ToyNet, width: 4, scale: 2}\n")
    torch.manual_seed(0)
    parts = {"head": nn.Conv2d(3, 4, 3), "body.0": nn.Conv2d(4, 4, 3), "body.2": nn.Conv2d(4, 4, 3)}
    parts["tail.0"] = nn.Conv2d(4, 12, 3)
    torch.save(
        {f"{name}.{k}": v for name, part in parts.items() for k, v in part.state_dict().items()}, tmp_path / "t.pth"
    )
    harness.write_photos(tmp_path / "photos", 2, side=32)
    return tmp_path


def test_a_network_of_the_user_is_quantized_and_reported(project: Path) -> None:
    own = ("--import", "my_networks.py")
    given = ("t.pth", "--arch", "toy.yml", "--photos", "photos", "--method", "minmax")
    said = qsr(project, *own, "quantize", *given, starts=True)
    assert "2 of 4 layers at W4A4" in said
    guessed = "ToyNet has no role table. Guessed from a run: head head; tail tail.0; the body is the other 2 layers"
    assert guessed in said
    assert "qsr --import my_networks.py export t_minmax_w4a4.safetensors" in " ".join(said.split())
    for form in (own, ("--import", "my_networks")):
        assert "ToyNet, minmax W4A4" in qsr(project, *form, "report", "t_minmax_w4a4.safetensors", starts=True)


def test_a_network_of_the_user_in_a_table_of_methods(project: Path) -> None:
    sizes = ["--photos", "photos", "--crop", "8", "--method", "minmax", "--bits", "W8A8", "-o", "table"]
    for name, side in (("HR", 32), ("LR", 16)):
        harness.write_photos(project / "set" / name, 2, side=side)
    tool = Path(__file__).resolve().parents[2] / "tools" / "ptq_table.py"
    made = harness.run(
        [str(tool), "--import", "my_networks.py", "--net", "toy.yml:t.pth", "--placement", "body", *sizes, "--threads", "1",
         "--test", "set/HR", "set/LR"], project, COLUMNS="160",
    )  # fmt: skip
    assert made.returncode == 0, made.stderr
    rows = read_table(project / "table" / "ptq.json").rows
    assert [row.method for row in rows] == ["float", "minmax"]
    assert all(row.quality and not row.note for row in rows) and "failed" not in made.stdout
    unknown = harness.run([str(tool), "--net", "ToyNet:t.pth", *sizes, "--test", "set/HR", "set/LR"], project)
    assert unknown.returncode == 1 and "unknown backbone 'ToyNet'" in unknown.stderr
    known = harness.run(
        [str(tool), "--import", "my_networks.py", "--net", "ToyNet:t.pth", *sizes, "--test", "set/HR", "set/LR"],
        project,
    )
    assert known.returncode == 1 and "give a .yml file with network_g: {type: ToyNet, ...}" in known.stderr


def test_without_the_import_the_message_names_it(project: Path) -> None:
    assert "--import" in qsr(project, "quantize", "t.pth", "--arch", "toy.yml", "--photos", "photos", fails=True)


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        ("missing.py", None, "there is no such file"),
        ("broken.py", "1 / 0\n", "ZeroDivisionError: division by zero"),
        ("json.py", "", "a module 'json' exists already"),
        ("nowhere.networks", None, "No module named 'nowhere'"),
    ],
)
def test_what_cannot_be_imported_is_named(tmp_path: Path, name: str, content: str | None, says: str) -> None:
    if content is not None:
        (tmp_path / "own").mkdir()
        name = f"own/{name}"
        (tmp_path / name).write_text(content)
    said = qsr(tmp_path, "--import", name, "list", fails=True)
    assert says in said and f"--import {name}" in said
