"""Files that are damaged, foreign, malicious or cannot be written."""

from __future__ import annotations

import errno
import json
import os
import pickle
import stat
import warnings
from pathlib import Path

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from safetensors.torch import save_file
from torch import nn

from qsr_plugin.atomic import check_writable
from qsr_plugin.checkpoint import (
    CheckpointError,
    load_float_weights,
    load_quantized,
    metadata_of,
    read_file,
    save_quantized,
    save_torch,
    state_dict_in,
    write_atomically,
)
from qsr_plugin.quant.surgery import quantize_model


class Payload:
    """Creates a folder when it is unpickled without care."""

    def __init__(self, folder: Path) -> None:
        self.folder = str(folder)

    def __reduce__(self):
        return os.mkdir, (self.folder,)


def refusal(path: Path) -> str:
    with pytest.raises(CheckpointError) as error:
        read_file(path)
    assert str(path) in str(error.value)
    return str(error.value)


# -- reading ---------------------------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:Detected pickle protocol")
@pytest.mark.parametrize("suffix", [".pth", ".state", ".pt", ".ckpt", ".bin"])
@pytest.mark.parametrize("form", ["zip", "legacy", "pickle"])
def test_malicious_pickles_run_nothing(tmp_path: Path, suffix: str, form: str) -> None:
    sentinel, path = tmp_path / "sentinel", tmp_path / f"evil{suffix}"
    content = {"params": {"weight": torch.ones(1)}, "extra": Payload(sentinel)}
    if form == "pickle":
        path.write_bytes(pickle.dumps(content))
    else:
        torch.save(content, path, _use_new_zipfile_serialization=form == "zip")
    message = refusal(path)
    assert not sentinel.exists()
    if form != "pickle":
        assert "holds Python objects, not only tensors, and was not opened" in message


def test_the_sentinel_works(tmp_path: Path) -> None:
    pickle.loads(pickle.dumps(Payload(tmp_path / "sentinel")))
    assert (tmp_path / "sentinel").is_dir()


def test_a_pickled_network_is_refused_with_the_remedy(tiny_net, tmp_path: Path) -> None:
    torch.save(tiny_net(), tmp_path / "whole.pth")
    assert "save net.state_dict() instead of the network itself" in refusal(tmp_path / "whole.pth")


def test_torchscript_is_named(tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # such files stay around longer than what writes them
        torch.jit.save(torch.jit.trace(nn.Linear(2, 2), torch.ones(1, 2)), tmp_path / "net.pt")
    assert "is a TorchScript program" in refusal(tmp_path / "net.pt")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("empty.pth", b"", "is empty (zero bytes)"),
        ("page.pth", b"\n<!DOCTYPE html><html></html>", "is an HTML or XML page (a failed download?)"),
        ("net.onnx", b"\x08\x0a\x12\x07pytorch", "is an ONNX model"),
        (
            "text.pth",
            b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            "is a Git LFS pointer, not the file itself",
        ),
        ("note.pth", b"just some text\n", "is no PyTorch file, or damaged"),
        ("noise.pth", bytes(range(256)) * 8, "get or save it again"),
        ("cut.pth", b"PK\x03\x04" + b"\0" * 100, "or damaged or cut short"),
        ("empty.safetensors", b"", "not a readable safetensors file"),
        ("page.safetensors", b"<!DOCTYPE html><html></html>", "not a readable safetensors file"),
        ("cut.safetensors", (1 << 20).to_bytes(8, "little") + b"{", "not a readable safetensors file"),
    ],
)
def test_foreign_and_damaged_files_are_named(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    assert message in refusal(tmp_path / name)


def test_a_truncated_checkpoint_is_refused_at_every_length(tiny_net, tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    torch.save(tiny_net().state_dict(), path)
    whole = path.read_bytes()
    for share in (0.1, 0.5, 0.9, 0.999):
        path.write_bytes(whole[: int(len(whole) * share)])
        refusal(path)


def test_missing_files_and_folders(tmp_path: Path) -> None:
    assert "does not exist" in refusal(tmp_path / "none.pth")
    assert "does not exist" in refusal(tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        {},
        {"params": {}},
        {"epoch": 3},
        {"state_dict": {"w": torch.ones(1)}},
        {"w": torch.ones(1), "step": 3},
        {0: torch.ones(1)},
    ],
)
def test_files_without_a_state_dict(tmp_path: Path, content: dict) -> None:
    torch.save(content, tmp_path / "net.pth")
    with pytest.raises(CheckpointError, match="net.pth is not a state dict"):
        state_dict_in(read_file(tmp_path / "net.pth")[0], tmp_path / "net.pth")


def test_a_bare_tensor_is_no_checkpoint(tmp_path: Path) -> None:
    torch.save(torch.ones(3), tmp_path / "net.pth")
    assert "holds a Tensor" in refusal(tmp_path / "net.pth")


@pytest.fixture
def saved(tiny_net, tmp_path: Path):
    """Write a quantized checkpoint with changed metadata: ``saved(format="2")``; None drops an entry."""
    net = quantize_model(tiny_net(), "pams")

    def write(**changes: str | None) -> Path:
        metadata = {**metadata_of(net), **changes}
        save_file(
            dict(net.state_dict()), tmp_path / "q.safetensors", {k: v for k, v in metadata.items() if v is not None}
        )
        return tmp_path / "q.safetensors"

    return write


def test_an_unchanged_file_loads(saved) -> None:
    assert load_quantized(saved()).recipe.method == "pams"


def recipe_with(**changes: object) -> str:
    from qsr_plugin.quant.recipe import load_recipe

    return json.dumps({**load_recipe("pams").to_dict(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"recipe": None}, "has no recipe in it: it was not written by save_quantized"),
        ({"format": None}, "has no recipe in it"),
        ({"format": "3", "qsr_plugin": "9.1"}, r"written by qsr_plugin 9\.1 in format 3, this is .*update qsr_plugin"),
        ({"format": "2"}, "is a packed file that is damaged"),
        ({"format": "two"}, "in format two"),
        ({"recipe": "{not json"}, "cannot be rebuilt"),
        ({"recipe": "[1, 2]"}, "cannot be rebuilt"),
        ({"recipe": "7"}, "cannot be rebuilt"),
        ({"recipe": recipe_with(quantizers={"act": "shiny", "weight": "maxabs"})}, "unknown quantizer 'shiny'"),
        ({"recipe": recipe_with(policy={"type": "clever"})}, "unknown bit policy 'clever'"),
        ({"recipe": recipe_with(novelty=1)}, "recipe.novelty: unknown key"),
        ({"recipe": recipe_with(bits={"weight": 99, "act": 4})}, "weight bits is 99"),
        ({"recipe": recipe_with(placement="shortcut_only")}, "does not hold the network it describes"),
        ({"backbone": "null"}, "cannot be rebuilt"),
        ({"backbone": "[]"}, "cannot be rebuilt"),
        ({"backbone": '{"type": "Nowhere"}'}, "no arch 'Nowhere' is registered"),
        ({"backbone": '{"type": "MSRResNet", "num_feat": 8}'}, "cannot be rebuilt|does not hold"),
        ({"backbone": '{"type": "EDSR", "bad": 1}'}, "cannot be rebuilt"),
    ],
)
def test_metadata_that_does_not_fit(saved, changes: dict, message: str) -> None:
    path = saved(**changes)
    with pytest.raises(CheckpointError, match=message) as error:
        load_quantized(path)
    assert str(path) in str(error.value)


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=60)
@given(content=st.binary(max_size=300), suffix=st.sampled_from([".pth", ".safetensors"]))
def test_any_bytes_give_a_checkpoint_error(tmp_path: Path, content: bytes, suffix: str) -> None:
    path = tmp_path / f"fuzz{suffix}"
    path.write_bytes(content)
    with pytest.raises(CheckpointError):
        read_file(path)


# -- writing ---------------------------------------------------------------------------------------------------------


def test_a_write_that_fails_leaves_the_old_file_and_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    save_torch({"params": {"w": torch.ones(2)}}, path)
    before = path.read_bytes()

    def full(temporary: Path) -> None:
        temporary.write_bytes(before[:10])
        raise OSError(errno.ENOSPC, "No space left on device")

    with pytest.raises(OSError, match=f"cannot write {path}: .*No space left.*Free some space"):
        write_atomically(path, full)
    assert path.read_bytes() == before and list(tmp_path.iterdir()) == [path]


def test_a_full_disk_in_the_middle_of_torch_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "net.pth"

    def fails(content: object, file: Path) -> None:
        Path(file).write_bytes(b"PK half")
        raise RuntimeError("PytorchStreamWriter failed writing file")

    monkeypatch.setattr(torch, "save", fails)
    with pytest.raises(OSError, match="cannot write .*PytorchStreamWriter failed"):
        save_torch({"w": torch.ones(1)}, path)
    assert list(tmp_path.iterdir()) == []


def test_an_interrupted_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(b"old")

    def interrupted(temporary: Path) -> None:
        temporary.write_bytes(b"half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, interrupted)
    assert path.read_bytes() == b"old" and list(tmp_path.iterdir()) == [path]


def test_the_old_file_stays_readable_until_the_new_one_is_complete(tmp_path: Path) -> None:
    path = tmp_path / "net.pth"
    path.write_bytes(b"old")
    seen: list[bytes] = []

    def write(temporary: Path) -> None:
        assert temporary.parent == path.parent and temporary != path
        temporary.write_bytes(b"new")
        seen.append(path.read_bytes())

    write_atomically(path, write)
    assert seen == [b"old"] and path.read_bytes() == b"new"
    assert stat.S_IMODE(path.stat().st_mode) & 0o444 == 0o444, "other users can read it"


@pytest.mark.skipif(os.name != "posix", reason="this system has no POSIX permissions")
def test_permissions_follow_the_umask(tmp_path: Path) -> None:
    path, before = tmp_path / "net.pth", os.umask(0o027)
    try:
        write_atomically(path, lambda temporary: temporary.write_bytes(b"new"))
    finally:
        os.umask(before)
    assert stat.S_IMODE(path.stat().st_mode) == 0o640


def test_looking_whether_a_folder_can_be_written_touches_no_file(tmp_path: Path) -> None:
    (tmp_path / "net.probe").write_text("of the user")
    check_writable(tmp_path / "net.onnx")
    check_writable(tmp_path / "new" / "net.onnx")
    assert (tmp_path / "net.probe").read_text() == "of the user"
    assert sorted(path.name for path in tmp_path.rglob("*")) == ["net.probe", "new"]


def test_quantized_networks_are_written_the_same_way(tiny_net, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    net, path = quantize_model(tiny_net(), "pams"), tmp_path / "new folder" / "net.safetensors"
    save_quantized(net, path)
    before = path.read_bytes()
    monkeypatch.setattr(os, "replace", lambda *_: (_ for _ in ()).throw(OSError(errno.EIO, "Input/output error")))
    with pytest.raises(OSError, match="cannot write"):
        save_quantized(net, path)
    assert path.read_bytes() == before and list(path.parent.iterdir()) == [path]


def test_a_float_checkpoint_that_is_malicious_leaves_the_network_alone(tiny_net, tmp_path: Path) -> None:
    net = tiny_net()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    torch.save({**net.state_dict(), "x": Payload(tmp_path / "sentinel")}, tmp_path / "float.pth")
    with pytest.raises(CheckpointError, match="Python objects"):
        load_float_weights(net, tmp_path / "float.pth")
    assert all(torch.equal(net.state_dict()[key], value) for key, value in before.items())
    assert not (tmp_path / "sentinel").exists()
