"""One import of the package repairs the host and registers with it, whichever of the two comes first."""

from __future__ import annotations

import ast
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path

import pytest

import qsr_plugin
from qsr_plugin import compat

EVENTS = """
    import sys, types
    events = []
    for name, functions in {"compat": ("prepare", "repair_host"), "register": ("register_all",)}.items():
        double = types.ModuleType(f"qsr_plugin.{name}")
        for function in functions:
            setattr(double, function, lambda function=function: events.append(function))
        sys.modules[double.__name__] = double
    sys.events = events
"""


@pytest.fixture
def host(tmp_path: Path) -> Path:
    """A folder with a small ``basicsr`` that notes when it is executed."""
    package = tmp_path / "hosts" / "basicsr"
    package.mkdir(parents=True)
    (package / "__init__.py").write_text("import sys\nsys.events.append('host')\n", "utf-8")
    (package / "part.py").write_text("", "utf-8")
    return package.parent


def script(body: str) -> str:
    """``body`` after doubles of the repairs and the registration have been put in place."""
    return textwrap.dedent(EVENTS) + textwrap.dedent(body)


def test_import_is_cheap(run_python: Callable[..., str]) -> None:
    code = """
        import sys
        import qsr_plugin
        heavy = {"torch", "torchvision", "numpy", "cv2", "basicsr", "pydantic", "yaml", "mmengine", "typer"}
        assert not heavy & set(sys.modules), heavy & set(sys.modules)
        assert {"load_recipe", "quantize_model", "__version__"} <= set(dir(qsr_plugin))
    """
    run_python(textwrap.dedent(code))


def test_plugin_first(host: Path, run_python: Callable[..., str]) -> None:
    code = """
        import importlib.util
        import qsr_plugin
        spec = importlib.util.find_spec("basicsr")
        assert spec.origin.endswith("__init__.py") and events == [], events  # looking is not importing
        import basicsr.part
        assert events == ["prepare", "host", "repair_host", "register_all"], events
        assert type(basicsr.__spec__.loader) is type(basicsr.part.__spec__.loader)
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("qsr_plugin")]
        import importlib
        importlib.reload(basicsr)
        assert events[4:] == ["host"], events
    """
    run_python(script(code), path=(host,))


def test_host_first(host: Path, run_python: Callable[..., str]) -> None:
    code = """
        import basicsr
        import qsr_plugin
        assert events == ["host", "prepare", "repair_host", "register_all"], events
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("qsr_plugin")]
    """
    run_python(script(code), path=(host,))


def test_second_attempt_after_a_failing_host(host: Path, run_python: Callable[..., str]) -> None:
    source = "import sys\nsys.events.append('host')\nif sys.events.count('host') == 1: raise RuntimeError('no')\n"
    (host / "basicsr" / "__init__.py").write_text(source, "utf-8")
    code = """
        import qsr_plugin
        try:
            import basicsr
        except RuntimeError:
            assert events == ["prepare", "host"], events
        else:
            raise AssertionError("the host was to fail")
        del events[:-1]
        import basicsr
        assert events == ["host", "prepare", "host", "repair_host", "register_all"], events
    """
    run_python(script(code), path=(host,))


def test_registration_waits_for_a_half_executed_module(host: Path, run_python: Callable[..., str]) -> None:
    """A module of the package that is the first to import the host is complete before everything is registered."""
    own = "import sys\nimport basicsr\nsys.events.append('own')\n"
    (host / "works.py").write_text(own, "utf-8")
    (host / "fails.py").write_text(own + "raise RuntimeError('no')\n", "utf-8")
    code = """
        import qsr_plugin
        qsr_plugin.__path__.append({host!r})
        if {failing}:
            try:
                import qsr_plugin.fails
            except RuntimeError:
                assert events == ["prepare", "host", "repair_host", "own"], events
                del events[-1]
        import qsr_plugin.works
        assert events == ["prepare", "host", "repair_host", "own", "register_all"], events
        assert not [finder for finder in sys.meta_path if type(finder).__module__.startswith("qsr_plugin")]
    """
    for failing in (False, True):
        run_python(script(code.format(failing=failing, host=str(host))), path=(host,))


REGISTERED = """
    from basicsr.utils.registry import ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY
    for registry in (ARCH_REGISTRY, LOSS_REGISTRY, MODEL_REGISTRY):
        ours = [name for name, item in registry if item.__module__.startswith("qsr_plugin.")]
        assert ours, registry._name
    assert "QuantNet" in ARCH_REGISTRY
    from qsr_plugin import compat
    compat.require_registered("arch", "QuantNet")
    compat.require_registered("dataset", "RealESRGANDataset")  # the host finds it with its own suffix
"""


@pytest.mark.parametrize(
    "first",
    [
        "import qsr_plugin\nimport basicsr",
        "import qsr_plugin.models\nimport basicsr.train",
        "from qsr_plugin.archs import quant_net_arch",
        "from qsr_plugin import compat\nsys.meta_path[:] = [f for f in sys.meta_path if f is not import_hook._finder]\n"
        "compat.prepare()\nimport basicsr\nimport_hook.arm()",
    ],
    ids=["plugin-first", "subpackage-first", "own-module-first", "host-first"],
)
def test_registration_with_the_real_host(first: str, run_python: Callable[..., str]) -> None:
    header = "import sys\nfrom qsr_plugin import import_hook\n" if "import_hook" in first else ""
    run_python(header + first + textwrap.dedent(REGISTERED))


def test_without_host(run_python: Callable[..., str]) -> None:
    code = """
        import sys
        class NotInstalled:
            def find_spec(self, name, path, target=None):
                if name.split(".")[0] == "basicsr":
                    raise ModuleNotFoundError(f"No module named {name!r}", name=name)
        sys.meta_path[:] = [NotInstalled(), *sys.meta_path]
        import qsr_plugin, qsr_plugin.quant
        from qsr_plugin import compat
        assert qsr_plugin.load_recipe("minmax")
        try:
            compat.import_host("basicsr.train")
        except ImportError as error:
            text = str(error)
        else:
            raise AssertionError("there is no host")
        assert compat.INSTALL_HELP == text
        for line in ("pip install torch", "pip install --no-build-isolation --no-deps basicsr==1.4.2", "pip install -e ."):
            assert line in text, line
        assert compat.describe_host() == "No basicsr is installed."
    """
    run_python(textwrap.dedent(code))


def test_host_that_does_not_import(host: Path, run_python: Callable[..., str]) -> None:
    (host / "basicsr" / "part.py").write_text("import a_module_nobody_has", "utf-8")
    (host / "basicsr" / "__init__.py").write_text("", "utf-8")
    code = """
        import sys
        from qsr_plugin import compat, import_hook
        sys.meta_path.remove(import_hook._finder)
        try:
            compat.import_host("basicsr.part")
        except ImportError as error:
            assert "a_module_nobody_has" in str(error) and compat.describe_host() in str(error), error
        else:
            raise AssertionError("the import was to fail")
    """
    run_python(textwrap.dedent(code), path=(host,))


def test_second_basicsr_is_named(host: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    used = compat.host_location()
    monkeypatch.setattr(sys, "path", [*sys.path, str(host)])
    assert compat.describe_host() == f"basicsr in use: {used}. It hides another copy: {host / 'basicsr'}."
    with pytest.raises(LookupError) as caught:
        compat.require_registered("model", "SRModell")
    message = str(caught.value)
    for part in ("'SRModell'", "Did you mean 'SRModel'?", str(used), str(host / "basicsr"), "import qsr_plugin"):
        assert part in message


def test_shadowing_copy_is_the_one_in_use(host: Path, run_python: Callable[..., str]) -> None:
    code = f"""
        from qsr_plugin import compat
        assert compat.host_location().samefile({str(host / "basicsr")!r})
        assert "It hides another copy: " in compat.describe_host()
    """
    run_python(textwrap.dedent(code), path=(host,))


def test_unknown_name_suggests_a_public_one() -> None:
    with pytest.raises(AttributeError, match="Did you mean 'quantize_model'"):
        qsr_plugin.quantise_model  # noqa: B018


def test_public_names_resolve() -> None:
    for name in qsr_plugin.__all__:
        assert getattr(qsr_plugin, name) is not None
    assert set(qsr_plugin.__all__) <= set(dir(qsr_plugin))


def test_names_for_editors_match_the_lazy_ones() -> None:
    tree = ast.parse(Path(qsr_plugin.__file__).read_text("utf-8"))
    block = next(node for node in tree.body if isinstance(node, ast.If))
    shown = {alias.name: node.module for node in block.body for alias in node.names}
    assert shown == qsr_plugin._HOME
