"""Cost of one quantized training step beside the float step: ABBA pairs in one run, medians and ranges of the ratio."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from typing import Annotated

import torch
import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table

from qsr_plugin import calibrate, compat, load_recipe, quantize_model
from qsr_plugin.memory import keep_freed_memory


def make_step(net: torch.nn.Module, lq: torch.Tensor, gt: torch.Tensor) -> Callable[[], None]:
    """A full training step: forward, L1 loss, backward, Adam, and the projection of ranges as in QuantSRModel."""
    from qsr_plugin.quant.surgery import quantizers

    optimizer = torch.optim.Adam(net.parameters(), lr=1e-5, foreach=False)
    parts = [quantizer for _, quantizer in quantizers(net)]
    net.train()

    def step() -> None:
        optimizer.zero_grad()
        torch.nn.functional.l1_loss(net(lq), gt).backward()
        optimizer.step()
        for part in parts:
            part.project()

    return step


def timed(step: Callable[[], None]) -> float:
    """Seconds of one step."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    step()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start


def main(
    recipe: Annotated[str, typer.Option(help="Shipped recipe or YAML file.")] = "pams",
    bits: Annotated[int, typer.Option(help="Bits of weights and activations.")] = 4,
    pairs: Annotated[int, typer.Option(help="ABBA groups that are counted.")] = 15,
    batch: Annotated[int, typer.Option(help="Images per batch.")] = 4,
    size: Annotated[int, typer.Option(help="Side of the LR crop.")] = 48,
    threads: Annotated[int, typer.Option(help="CPU threads.")] = 1,
) -> None:
    """Compare the training step of EDSR-baseline (16 blocks x 64 features, x4) with and without quantizers."""
    torch.set_num_threads(threads)
    keep_freed_memory()  # as the training entry does
    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import build_backbone

    device = "cuda" if torch.cuda.is_available() else "cpu"
    options = {"type": "EDSR", "num_in_ch": 3, "num_out_ch": 3, "num_feat": 64, "num_block": 16, "upscale": 4}
    lq, gt = torch.rand(batch, 3, size, size, device=device), torch.rand(batch, 3, 4 * size, 4 * size, device=device)
    plain = build_backbone(options).to(device)
    quantized = quantize_model(build_backbone(options), load_recipe(recipe, weight_bits=bits, act_bits=bits)).to(device)
    calibrate(quantized, [lq])
    a, b = make_step(quantized, lq, gt), make_step(plain, lq, gt)
    for _ in range(2):
        a(), b()
    ratios, seconds = [], ([], [])
    for _ in track(range(pairs), description="ABBA"):
        first, second, third, fourth = timed(a), timed(b), timed(b), timed(a)
        ratios.append((first + fourth) / (second + third))
        seconds[0].append((first + fourth) / 2)
        seconds[1].append((second + third) / 2)
    table = Table(
        title=f"training step, EDSR-baseline x4, batch {batch} x {size} x {size}, {threads} thread(s), {device}"
    )
    for column in ("what", "median", "min", "max"):
        table.add_column(column)
    rows = (
        (f"{recipe} W{bits}A{bits} / float", ratios),
        (f"{recipe} step, s", seconds[0]),
        ("float step, s", seconds[1]),
    )
    for name, values in rows:
        table.add_row(name, *(f"{value:.3f}" for value in (statistics.median(values), min(values), max(values))))
    Console().print(table)


if __name__ == "__main__":
    typer.run(main)
