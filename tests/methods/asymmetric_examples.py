"""Worked examples of the asymmetric grid between two bounds, with all gradients (AdaBM, CVPR 2024), for two tests."""

from __future__ import annotations

#: Arguments of a test: bounds, bits, values, what they become, and the gradients of their sum.
NAMES = ("low", "high", "bits", "x", "values", "dx", "dl", "du", "db")
EXAMPLES = [
    (
        -0.6, 1.2, 2,
        [-1.2, -0.5, 0.03, 0.5, 1.0, 2.4], [-0.6, -0.6, 0.0, 0.6, 1.2, 1.2],
        [0, 1, 1, 1, 1, 0], 0.905556, 1.094444, -0.157113,
    ),
    (
        -0.25, 1.5, 4,
        [-0.5, 0.1, 0.73, 1.9], [-0.25, 0.1, 0.683333, 1.5],
        [0, 1, 1, 0], 1.026667, 0.973333, 0.034503,
    ),
]  # fmt: skip
