"""Every repair of the host: it removes the fault, and it stays away from a stack that does not have the fault."""

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


def write_package(root: Path, files: dict[str, str]) -> Path:
    """Write modules below ``root`` and return it, ready for the module search path."""
    for name, text in files.items():
        target = root / name
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(textwrap.dedent(text), "utf-8")
    return root


HEALTHY = {
    "torchvision/__init__.py": "",
    "torchvision/transforms/__init__.py": "",
    "torchvision/transforms/functional.py": "def rgb_to_grayscale(image): return image",
    "torchvision/transforms/functional_tensor.py": "def rgb_to_grayscale(image): return image",
    "scipy/__init__.py": "",
    "scipy/ndimage/__init__.py": "def convolve(image): return image",
    "scipy/ndimage/filters.py": "from scipy.ndimage import convolve",
    "distutils/__init__.py": "",
    "distutils/version.py": "class LooseVersion: pass",
}


@pytest.fixture
def healthy(tmp_path: Path) -> Path:
    """A folder with a torchvision, a scipy and a distutils that need no repair."""
    return write_package(tmp_path / "stack", HEALTHY)


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


def test_healthy_stack_is_left_alone(healthy: Path, run_python: Callable[..., str]) -> None:
    code = """
        import sys
        from qsr_plugin import compat
        before = list(sys.modules)
        compat.prepare()
        assert compat.applied() == [], compat.applied()
        import torchvision.transforms.functional_tensor, scipy.ndimage.filters, distutils.version
        for module in (torchvision.transforms.functional_tensor, scipy.ndimage.filters, distutils.version):
            assert module.__spec__.origin, module
        assert "torch" not in sys.modules
    """
    run_python(textwrap.dedent(code), path=(healthy,))


# The first, failing import defines the operator already; the second must not define it again.
REGISTERS_ABSENT_OPERATOR = """
    import torch
    library = torch.library.Library("torchvision", "FRAGMENT")
    hasattr(torch.ops.torchvision, "qsr_present") or library.define("qsr_present(Tensor x) -> Tensor")
    torch.library.register_fake("torchvision::qsr_present")(lambda x: x.new_empty(7))
    torch.library.register_fake("torchvision::qsr_absent")(lambda x: x)
    complete = True
"""


def test_torchvision_without_its_operators(healthy: Path, run_python: Callable[..., str]) -> None:
    write_package(healthy, {"torchvision/__init__.py": REGISTERS_ABSENT_OPERATOR})
    code = """
        import logging
        import torch
        lines = []
        handler = logging.Handler()
        handler.emit = lambda record: lines.append(record.getMessage())
        logging.getLogger("qsr_plugin.compat").addHandler(handler)
        logging.getLogger("qsr_plugin.compat").setLevel("INFO")
        try:
            import torchvision
        except RuntimeError as error:
            assert "operator torchvision::qsr_absent does not exist" in str(error)
        else:
            raise AssertionError("this torchvision was to be broken")
        from qsr_plugin import compat
        register = torch.library.register_fake
        for attempt in range(2):
            compat.prepare()
        import torchvision
        assert torchvision.complete
        assert torch.library.register_fake is register
        # registrations that are possible still happen
        assert torch.ops.torchvision.qsr_present(torch.empty(2, device="meta")).shape == (7,)
        assert compat.applied() == ["torchvision-ops"], compat.applied()
        assert len(lines) == 1 and "torchvision-ops" in lines[0], lines
    """
    run_python(textwrap.dedent(code), path=(healthy,))


def test_other_torchvision_errors_are_not_hidden(healthy: Path, run_python: Callable[..., str]) -> None:
    write_package(healthy, {"torchvision/__init__.py": "raise RuntimeError('driver too old')"})
    code = """
        from qsr_plugin import compat
        try:
            compat.prepare()
        except RuntimeError as error:
            assert str(error) == "driver too old"
        else:
            raise AssertionError("the error was swallowed")
    """
    run_python(textwrap.dedent(code), path=(healthy,))


def test_functional_tensor(healthy: Path, run_python: Callable[..., str]) -> None:
    (healthy / "torchvision/transforms/functional_tensor.py").unlink()
    code = """
        from qsr_plugin import compat
        compat.prepare()
        from torchvision.transforms import functional
        from torchvision.transforms.functional_tensor import rgb_to_grayscale
        assert rgb_to_grayscale is functional.rgb_to_grayscale
        assert compat.applied() == ["functional-tensor"], compat.applied()
    """
    run_python(textwrap.dedent(code), path=(healthy,))


def test_distutils(healthy: Path, run_python: Callable[..., str]) -> None:
    code = """
        import sys
        class Removed:
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] == "distutils":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path.insert(0, Removed())
        from qsr_plugin import compat
        compat.prepare()
        from distutils.version import LooseVersion
        assert LooseVersion("0.28.0+cpu") >= LooseVersion("0.9.0") > LooseVersion("0.8.9")
        assert LooseVersion("2.0") == LooseVersion("2.0")
        assert compat.applied() == ["distutils"], compat.applied()
    """
    run_python(textwrap.dedent(code), path=(healthy,))


def test_scipy_filters(healthy: Path, run_python: Callable[..., str]) -> None:
    (healthy / "scipy/ndimage/filters.py").unlink()
    code = """
        from qsr_plugin import compat
        compat.prepare()
        from scipy import ndimage
        from scipy.ndimage.filters import convolve
        assert convolve is ndimage.convolve
        assert compat.applied() == ["scipy-filters"], compat.applied()
    """
    run_python(textwrap.dedent(code), path=(healthy,))


def test_repairs_can_be_switched_off(healthy: Path, run_python: Callable[..., str]) -> None:
    (healthy / "scipy/ndimage/filters.py").unlink()
    code = """
        from qsr_plugin import compat
        compat.prepare()
        assert compat.applied() == []
        try:
            import scipy.ndimage.filters
        except ModuleNotFoundError:
            pass
        else:
            raise AssertionError("repaired although QSR_COMPAT=0")
    """
    run_python(textwrap.dedent(code), path=(healthy,), env={"QSR_COMPAT": "0"})


def test_real_stack_after_repair(run_python: Callable[..., str]) -> None:
    """The host's option to turn pictures grey needs the module that torchvision removed; the report names all repairs."""
    code = """
        from qsr_plugin import compat
        compat.prepare()
        import basicsr.train
        import torch
        from basicsr.data.degradations import rgb_to_grayscale
        assert rgb_to_grayscale(torch.rand(1, 3, 4, 4)).shape == (1, 1, 4, 4)
        text = compat.report()
        assert basicsr.__path__[0] in text
        for repair in compat.IMPORT_REPAIRS + compat.HOST_REPAIRS:
            assert f"{repair.name}: " in text
    """
    run_python(textwrap.dedent(code))


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
    monkeypatch.setattr(torch.distributed, "init_process_group", lambda backend, **kwargs: asked.append((backend, kwargs)))
    with pytest.raises(ZeroDivisionError):
        stock["dist_util"].init_dist("pytorch")
    compat.repair_host()
    stock["dist_util"].init_dist("pytorch")
    stock["dist_util"].init_dist("pytorch", backend="mpi", world_size=1)
    assert asked == [("gloo", {}), ("mpi", {"world_size": 1})]


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
