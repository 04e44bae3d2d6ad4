"""Every repair that makes the host importable: it removes the fault, and it stays away from a healthy stack."""

from __future__ import annotations

import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest


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
    """Turning pictures grey needs the module that torchvision removed; the report names all repairs."""
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
