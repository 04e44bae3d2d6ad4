"""The single repairs behind :mod:`qsr_plugin.compat`: for each a function that finds the fault and one that removes it.

The first half makes BasicSR importable, the second changes BasicSR's own modules. Nothing here imports torch or BasicSR
before it is called.
"""

from __future__ import annotations

import functools
import importlib
import importlib.util
import os
import re
import sys
import types
from collections.abc import Callable
from typing import TYPE_CHECKING
from weakref import WeakValueDictionary

if TYPE_CHECKING:
    import lmdb
    from torch import nn

_MISSING_OPERATOR = re.compile(r"operator torchvision::\w+ does not exist")
_REGISTRATIONS = ("register_fake", "impl_abstract", "register_autograd")


def torchvision_refuses() -> bool:
    """Whether ``import torchvision`` stops at an operator of its compiled library, which could not be loaded."""
    try:
        importlib.import_module("torchvision")
    except RuntimeError as error:
        return bool(_MISSING_OPERATOR.search(str(error)))
    except ImportError:
        return False
    return False


def import_torchvision_without_ops() -> None:
    """Import torchvision once while registrations for operators that do not exist are skipped."""
    import torch

    for name in [name for name in sys.modules if name.split(".")[0] == "torchvision"]:
        del sys.modules[name]
    real = {name: getattr(torch.library, name) for name in _REGISTRATIONS if hasattr(torch.library, name)}

    def tolerant(register: Callable[..., object]) -> Callable[..., object]:
        @functools.wraps(register)
        def call(op: object, *args: object, **kwargs: object) -> object:
            namespace, _, operator = op.partition("::") if isinstance(op, str) else ("", "", "")
            if namespace == "torchvision" and not hasattr(torch.ops.torchvision, operator):
                return lambda function: function
            return register(op, *args, **kwargs)

        return call

    try:
        for name, register in real.items():
            setattr(torch.library, name, tolerant(register))
        importlib.import_module("torchvision")
    finally:
        for name, register in real.items():
            setattr(torch.library, name, register)


def lacks(module: str) -> bool:
    """Whether ``module`` cannot be found although the package it belongs to can."""
    try:
        return module not in sys.modules and importlib.util.find_spec(module) is None
    except ImportError:
        return False


def stub_functional_tensor() -> None:
    """Give back the one function that BasicSR takes from a module torchvision 0.17 removed."""
    functional = importlib.import_module("torchvision.transforms.functional")
    stub = types.ModuleType("torchvision.transforms.functional_tensor")
    stub.rgb_to_grayscale = functional.rgb_to_grayscale
    sys.modules[stub.__name__] = stub


def lacks_distutils() -> bool:
    """Whether neither Python nor setuptools provides ``distutils.version``."""
    try:
        importlib.import_module("distutils.version")
    except ImportError:
        return True
    return False


@functools.total_ordering
class _LooseVersion:
    """Dotted version compared by its whole numbers; what BasicSR uses of ``distutils.version.LooseVersion``."""

    def __init__(self, text: str) -> None:
        self.version = [int(number) for number in re.findall(r"\d+", text.split("+")[0])]

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _LooseVersion) and self.version == other.version

    def __lt__(self, other: _LooseVersion) -> bool:
        return self.version < other.version


def stub_distutils() -> None:
    """Provide ``distutils.version.LooseVersion`` and nothing else."""
    package, module = types.ModuleType("distutils"), types.ModuleType("distutils.version")
    package.__path__ = []
    module.LooseVersion = _LooseVersion
    package.version = module
    sys.modules.update({"distutils": package, "distutils.version": module})


def alias_ndimage_filters() -> None:
    """Let ``scipy.ndimage.filters`` mean ``scipy.ndimage``, where its functions live."""
    sys.modules["scipy.ndimage.filters"] = importlib.import_module("scipy.ndimage")


def lmdb_opens_once() -> bool:
    """Whether py-lmdb refuses a second environment on one file in a process (it does since 2.0)."""
    try:
        import lmdb
    except ImportError:
        return False
    return int(re.match(r"\d+", lmdb.__version__).group()) >= 2


class _SharedEnv:
    """A read-only LMDB that every backend of this process shares, reopened after a fork.

    The environment is closed when its last user is gone, as it is with the host's own backend.
    """

    _open: WeakValueDictionary[tuple[int, str], lmdb.Environment] = WeakValueDictionary()

    def __init__(self, path: str, **options: object) -> None:
        self.path = os.path.realpath(path)
        self.options = options
        self._acquire()

    def _acquire(self) -> None:
        import lmdb

        self.pid = os.getpid()
        for (pid, path), inherited in list(self._open.items()):
            if path == self.path and pid != self.pid:
                inherited.close()
        env = self._open.get((self.pid, self.path))
        if env is None:
            env = lmdb.open(self.path, **self.options)
            self._open[self.pid, self.path] = env
        self.env = env

    def begin(self, *args: object, **kwargs: object) -> lmdb.Transaction:
        """``lmdb.Environment.begin`` on the environment of the calling process."""
        if self.pid != os.getpid():
            self._acquire()
        return self.env.begin(*args, **kwargs)


def patch_lmdb_backend() -> None:
    """Let training and validation sets of the host read one LMDB (``readonly=False`` stays as it was)."""
    from basicsr.utils.file_client import LmdbBackend

    stock = LmdbBackend.__init__

    def __init__(self, db_paths, client_keys="default", readonly=True, lock=False, readahead=False, **kwargs) -> None:
        if not readonly:
            stock(self, db_paths, client_keys, readonly, lock, readahead, **kwargs)
            return
        paths = db_paths if isinstance(db_paths, list) else [db_paths]
        keys = [client_keys] if isinstance(client_keys, str) else client_keys
        if len(paths) != len(keys):
            raise ValueError(
                f"LmdbBackend got {len(paths)} db_paths and {len(keys)} client_keys; give one key for each path."
            )
        self.db_paths = [str(path) for path in paths]
        options = dict(readonly=True, lock=lock, readahead=readahead, **kwargs)
        self._client = {key: _SharedEnv(path, **options) for key, path in zip(keys, self.db_paths)}

    LmdbBackend.__init__ = __init__


def no_cuda_device() -> bool:
    """Whether this machine (or ``CUDA_VISIBLE_DEVICES``) leaves no CUDA device; creates no CUDA context."""
    import torch

    return torch.cuda.device_count() == 0


def patch_init_dist() -> None:
    """Let ``--launcher pytorch`` start on a machine without GPU: gloo instead of NCCL, no device to choose."""
    from basicsr.utils import dist_util

    def _init_dist_pytorch(backend: str, **kwargs: object) -> None:
        dist_util.dist.init_process_group(backend="gloo" if backend == "nccl" else backend, **kwargs)

    dist_util._init_dist_pytorch = _init_dist_pytorch


def patch_model_to_device() -> None:
    """Wrap networks of a distributed run on CPU without asking for the current CUDA device."""
    from basicsr.models.base_model import BaseModel

    stock = BaseModel.model_to_device

    def model_to_device(self: BaseModel, net: nn.Module) -> nn.Module:
        """Move ``net`` to the device of this model and wrap it for a distributed run."""
        if not self.opt["dist"] or self.device.type != "cpu":
            return stock(self, net)
        from torch.nn.parallel import DistributedDataParallel

        unused = self.opt.get("find_unused_parameters", False)
        return DistributedDataParallel(net.to(self.device), find_unused_parameters=unused)

    BaseModel.model_to_device = model_to_device
