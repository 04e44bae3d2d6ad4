"""Packaging of qsr_plugin.

``archs/`` and ``options/`` lie at the top level of the repository and are installed *inside* the package, as
``qsr_plugin.archs`` and ``qsr_plugin.options``: many super-resolution projects have top-level folders of these names.
"""

from __future__ import annotations

import re
from pathlib import Path

from setuptools import find_packages, setup

ROOT = Path(__file__).resolve().parent
VERSION = re.search(r'__version__ = "([^"]+)"', (ROOT / "qsr_plugin" / "__init__.py").read_text("utf-8")).group(1)
SPANDREL = ["spandrel>=0.4"]  # networks known from their weights alone
DEPLOY = ["onnx>=1.16", "onnxruntime>=1.18", "openvino>=2024.4", "onnxscript>=0.2"]  # engines, and files for them
MAPPED = {"qsr_plugin.archs": "archs", "qsr_plugin.options": "options", "qsr_plugin.assets": "assets"}


def requirements() -> list[str]:
    """Run-time requirements: those of ``requirements.txt`` plus the host itself."""
    lines = (ROOT / "requirements.txt").read_text("utf-8").splitlines()
    return ["basicsr>=1.4.2"] + [line for line in lines if line.strip() and not line.startswith("#")]


def mapped_packages() -> list[str]:
    """Names of the mapped packages and all folders below them."""
    names = []
    for package, folder in MAPPED.items():
        names.append(package)
        names += [f"{package}.{name}" for name in find_packages(str(ROOT / folder))]
    return names


setup(
    name="qsr_plugin",
    version=VERSION,
    description="Quantized image super-resolution for BasicSR: from a float network to a low-bit one, from a YAML",
    long_description=(ROOT / "README.md").read_text("utf-8"),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.10",
    packages=find_packages(include=["qsr_plugin", "qsr_plugin.*"]) + mapped_packages(),
    package_dir=MAPPED,
    package_data={
        "qsr_plugin.methods": ["*.md"],
        "qsr_plugin.report": ["*.md"],
        "qsr_plugin.options": ["**/*.yml"],
        "qsr_plugin.assets": ["*.safetensors", "*.md"],
    },
    install_requires=requirements(),
    extras_require={
        "spandrel": SPANDREL,
        "deploy": DEPLOY,
        "test": [
            "pytest>=7",
            "pytest-timeout",
            "pytest-xdist",
            "hypothesis",
            "build",
            "pip>=22.3",
            "setuptools>=70.1",
            *SPANDREL,
            *DEPLOY,
        ],
    },
    entry_points={"console_scripts": ["qsr = qsr_plugin.cli:main"]},
)
