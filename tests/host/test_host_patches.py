"""Every repair of the host's own modules: it removes the fault, and it stays away where the fault is absent."""

from __future__ import annotations

import gc
import importlib
import importlib.util
import os
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import lmdb
import pytest
import torch
from torch import nn

from qsr_plugin import compat

HOST_MODULES = ("basicsr.utils.file_client", "basicsr.utils.dist_util", "basicsr.models.base_model")


@pytest.fixture
def stock(monkeypatch: pytest.MonkeyPatch) -> dict[str, ModuleType]:
    """Fresh, unrepaired copies of the host's modules in the place of the repaired ones, by their last name."""
    copies = {}
    for name in HOST_MODULES:
        spec = importlib.util.spec_from_file_location(name, importlib.import_module(name).__file__)
        copy = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(copy)
        package, _, last = name.rpartition(".")
        monkeypatch.setitem(sys.modules, name, copy)
        monkeypatch.setattr(sys.modules[package], last, copy)
        copies[last] = copy
    monkeypatch.setattr(compat, "_applied", [])
    return copies


@pytest.fixture
def database(tmp_path: Path) -> str:
    """An LMDB with one entry: picture -> pixels."""
    path = str(tmp_path / "pictures.lmdb")
    with lmdb.open(path) as env, env.begin(write=True) as transaction:
        transaction.put(b"picture", b"pixels")
    return path


@pytest.mark.skipif(lmdb.__version__.startswith(("0.", "1.")), reason="this py-lmdb may open a file twice")
def test_lmdb_fault_exists(stock: dict[str, ModuleType], database: str) -> None:
    backend = stock["file_client"].LmdbBackend
    first = backend(database)
    with pytest.raises(lmdb.Error, match="already open"):
        backend(database)
    assert bytes(first.get("picture", "default")) == b"pixels"


def test_lmdb_opened_twice(stock: dict[str, ModuleType], database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb, "__version__", "2.0.0")
    compat.repair_host()
    assert "lmdb-opened-twice" in compat.applied()
    backend = stock["file_client"].LmdbBackend
    os.symlink(database, f"{database}.link")
    first, second = backend(database), backend([f"{database}.link", database], ["gt", "lq"])
    assert [bytes(second.get("picture", key)) for key in ("gt", "lq")] == [b"pixels"] * 2
    del second
    assert bytes(first.get("picture", "default")) == b"pixels"
    del first
    gc.collect()
    with lmdb.open(database) as env:  # nothing holds the file once its readers are gone
        assert env.stat()["entries"] == 1


def test_lmdb_in_a_forked_worker(stock: dict[str, ModuleType], database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb, "__version__", "2.0.0")
    compat.repair_host()
    backend = stock["file_client"].LmdbBackend
    inherited = backend(database)

    class Pictures(torch.utils.data.Dataset):
        def __len__(self) -> int:
            return 2

        def __getitem__(self, index: int) -> bool:
            readers = [backend(database), inherited] if index else [inherited, backend(database)]
            return all(bytes(reader.get("picture", "default")) == b"pixels" for reader in readers)

    loader = torch.utils.data.DataLoader(Pictures(), num_workers=1, multiprocessing_context="fork", timeout=60)
    assert [bool(good) for good in loader] == [True, True]
    assert bytes(inherited.get("picture", "default")) == b"pixels"


def test_lmdb_arguments(stock: dict[str, ModuleType], database: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb, "__version__", "2.0.0")
    compat.repair_host()
    backend = stock["file_client"].LmdbBackend
    with pytest.raises(ValueError, match="1 db_paths and 2 client_keys"):
        backend(database, ["gt", "lq"])
    writer = backend(database, readonly=False)
    assert isinstance(writer._client["default"], lmdb.Environment)


def test_lmdb_that_opens_twice_is_left_alone(stock: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmdb, "__version__", "1.7.5")
    before = stock["file_client"].LmdbBackend.__init__
    compat.repair_host()
    assert stock["file_client"].LmdbBackend.__init__ is before


def test_stack_with_cuda_is_left_alone(stock: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    before = stock["dist_util"]._init_dist_pytorch, stock["base_model"].BaseModel.model_to_device
    compat.repair_host()
    assert before == (stock["dist_util"]._init_dist_pytorch, stock["base_model"].BaseModel.model_to_device)
    assert not {"gloo", "ddp-on-cpu"} & set(compat.applied())


def test_launcher_without_cuda(stock: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    monkeypatch.setenv("RANK", "0")
    asked = []
    monkeypatch.setattr(
        torch.distributed, "init_process_group", lambda backend, **kwargs: asked.append((backend, kwargs))
    )
    with pytest.raises(ZeroDivisionError):
        stock["dist_util"].init_dist("pytorch")
    compat.repair_host()
    stock["dist_util"].init_dist("pytorch")
    stock["dist_util"].init_dist("pytorch", backend="mpi", world_size=1)
    assert asked == [("gloo", {}), ("mpi", {"world_size": 1})]


@pytest.mark.skipif(torch.cuda.is_available(), reason="the fault needs a machine without CUDA")
def test_distributed_cpu_fault_exists(stock: dict[str, ModuleType]) -> None:
    model = stock["base_model"].BaseModel({"num_gpu": 0, "is_train": False, "dist": True})
    with pytest.raises((AssertionError, RuntimeError), match="CUDA|NVIDIA"):
        model.model_to_device(nn.Conv2d(1, 1, 1))


@pytest.mark.parametrize("devices", [0, 1])
def test_num_gpu_zero(stock: dict[str, ModuleType], monkeypatch: pytest.MonkeyPatch, devices: int) -> None:
    monkeypatch.setattr(torch.cuda, "device_count", lambda: devices)
    compat.repair_host()
    model = stock["base_model"].BaseModel({"num_gpu": 0, "is_train": False, "dist": False})
    net = nn.Conv2d(1, 1, 1)
    assert model.model_to_device(net) is net
    assert net.weight.device.type == "cpu"


TWO_PROCESSES = """
    import qsr_plugin  # in the first line, as in a user's own training script; also seen by spawned processes
    import os, socket
    import torch
    import torch.multiprocessing as mp

    def work(rank, port):
        os.environ.update(RANK=str(rank), WORLD_SIZE="2", MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port))
        from basicsr.models.base_model import BaseModel
        from basicsr.utils.dist_util import get_dist_info, init_dist
        init_dist("pytorch")
        assert get_dist_info() == (rank, 2)
        assert torch.distributed.get_backend() == "gloo"
        for unused in (False, True):
            options = {"num_gpu": 0, "is_train": True, "dist": True, "find_unused_parameters": unused}
            net = BaseModel(options).model_to_device(torch.nn.Linear(2, 1, bias=False))
            assert net.find_unused_parameters is unused and not net.device_ids
            net(torch.full((1, 2), float(rank))).sum().backward()
            assert net.module.weight.grad.tolist() == [[0.5, 0.5]]  # mean of the gradients 0 and 1
        # Taking a gloo group down can deadlock in torch: a worker thread may wait for the interpreter lock.
        torch.distributed.barrier()
        os._exit(0)

    if __name__ == "__main__":
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port = probe.getsockname()[1]
        mp.spawn(work, (port,), nprocs=2)
"""


def test_two_processes_on_cpu(run_python: Callable[..., str]) -> None:
    run_python(textwrap.dedent(TWO_PROCESSES), env={"CUDA_VISIBLE_DEVICES": ""}, timeout=240)
