"""Other packages may own the plain names: ours carry a suffix, and both orders of import work."""

from __future__ import annotations

from collections.abc import Callable

import pytest

OTHER = """
from basicsr.utils.registry import ARCH_REGISTRY
class SRResNet: pass
class HAT: pass
ARCH_REGISTRY.register(SRResNet)
ARCH_REGISTRY.register(HAT)
"""

CHECK = """
from qsr_plugin import compat
compat.import_host()
from basicsr.utils.registry import ARCH_REGISTRY
from qsr_plugin.archs.quant_net_arch import build_backbone
assert ARCH_REGISTRY.get("SRResNet").__module__ == "__main__"
assert ARCH_REGISTRY.get("SRResNet_qsr").__module__ == "qsr_plugin.archs.srresnet_arch"
assert type(build_backbone({"type": "SRResNet_qsr", "num_block": 1})).__module__ == "qsr_plugin.archs.srresnet_arch"
print("both")
"""


@pytest.mark.parametrize("ours_first", [True, False])
def test_other_owner_of_the_plain_names(run_python: Callable[..., str], ours_first: bool) -> None:
    ours = "import qsr_plugin\nfrom qsr_plugin import compat\n"
    start = (
        ours + "compat.import_host()\n" if ours_first else ours + "compat.prepare()\nimport basicsr.utils.registry\n"
    )
    assert run_python(start + OTHER + CHECK).strip().endswith("both")
