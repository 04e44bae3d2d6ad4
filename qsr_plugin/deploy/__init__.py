"""Quantized networks as products: exact rewrites, files for engines, packed files, and a runner for images."""
