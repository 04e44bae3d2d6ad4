"""Make the README's table of speeds: EDSR-baseline x4, quantized to W8A8 and W4A4, beside float, in several engines.

    python tools/bench_engines.py -o engines

The network has 16 blocks of 64 features and random weights with seed 0: speed does not depend on their values. It is
quantized by the recipe ``auto`` without its tuning, on synthetic images. Measured are images of 96x96 with one thread
(CPU time) and of 180x320 with two (wall time), each variant in turn with the float network in OpenVINO; ``qsr bench``
does the same with a network of yours. The folder then holds ``engines.md``, and for each bit width and size the
results as JSON and a plot.
"""

from __future__ import annotations

import sys
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any

import torch
import typer
from rich.console import Console
from torch import nn

from qsr_plugin import compat
from qsr_plugin.checkpoint import check_writable, write_atomically
from qsr_plugin.deploy.bench import bench, check_variants
from qsr_plugin.deploy.bench_machine import described, engine_versions, machine
from qsr_plugin.deploy.bench_names import DEFAULT, INT8, INT8_PLAIN, INT8_TAIL, QUANTIZED
from qsr_plugin.deploy.bench_plot import bench_plot
from qsr_plugin.deploy.bench_rows import Protocol, Row, legend, result_of, speed_text, threads_text, to_table
from qsr_plugin.deploy.bench_variants import Models
from qsr_plugin.deploy.comparison import synthetic_images
from qsr_plugin.errors import UserError
from qsr_plugin.options_file import parse_bits
from qsr_plugin.progress import track
from qsr_plugin.report.result_io import write_results
from qsr_plugin.report.result_schema import ResultTable

console = Console(highlight=False)

#: Height, width and threads.
CASES = ((96, 96, 1), (180, 320, 2))
_IMAGES, _SIDE = 4, 48
_SPREAD = 0.2  # standard deviation of the output, that of usual images
_WEAK_BLOCKS = 0.1  # BasicSR's own factor for the weights in blocks


def float_network(features: int, blocks: int) -> nn.Module:
    """EDSR x4 with He weights, seed 0, scaled so that the output is in the range of images."""
    from qsr_plugin.archs.quant_net_arch import build_backbone

    sizes = {"num_in_ch": 3, "num_out_ch": 3, "num_feat": features, "num_block": blocks, "upscale": 4}
    net = build_backbone({"type": "EDSR", **sizes}).eval()
    torch.manual_seed(0)
    with torch.no_grad():
        for name, module in net.named_modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight)
                nn.init.zeros_(module.bias)
                module.weight *= _WEAK_BLOCKS if name.startswith("body") else 1
        net.conv_last.weight *= _SPREAD / net(synthetic_images(_IMAGES, (_SIDE, _SIDE))).std()
    return net


def quantized(float_net: nn.Module, bits: str) -> nn.Module:
    """The network by ``auto``, only calibrated; its linear tail stays float and is collapsed."""
    from qsr_plugin import load_recipe
    from qsr_plugin.post_training import post_train

    weight_bits, act_bits = parse_bits(bits)
    recipe = load_recipe(
        "auto", weight_bits=weight_bits, act_bits=act_bits, placement="trunk", tuning=None, fragile=None
    )
    return post_train(float_net, recipe, [synthetic_images(_IMAGES, (_SIDE, _SIDE))]).net


def to_markdown(found: Mapping[tuple[str, int, int, int], Sequence[Row]]) -> str:
    """One row for each variant and bit width, one column for each size; float variants from the first bit width."""
    columns = list(dict.fromkeys(key[1:] for key in found))
    first, lines = next(iter(found))[0], []
    for bits in dict.fromkeys(key[0] for key in found):
        by_case = {key[1:]: {row.name: row for row in rows} for key, rows in found.items() if key[0] == bits}
        for name, row in by_case[columns[0]].items():
            if bits != first and name not in QUANTIZED:
                continue
            own = [by_case[case][name].speeds.get(case[:2]) for case in columns]
            label = f"{name}, {bits}" if name in QUANTIZED else name
            figures = [row.note or "-" if speed is None else speed_text(speed) for speed in own]
            size = f"{row.file_bytes / 1e6:.2f}" if row.file_bytes else "-"
            lines.append(f"| {' | '.join((f'`{label}`', *figures, size))} |")
    heads = [f"{height}x{width}, {threads_text(threads)}" for height, width, threads in columns]
    return "\n".join([f"| | {' | '.join(heads)} | MB |", f"|---|{'---|' * len(heads)}---|", *lines])


def main(
    out: Annotated[Path, typer.Option("-o", "--out", help="Folder for the table, results and plots.")],
    bits: Annotated[str, typer.Option(help="Weight and activation bits, separated by commas.")] = "W8A8,W4A4",
    rounds: Annotated[int, typer.Option(min=1, help="How often each variant is paired with the reference.")] = 5,
    seconds: Annotated[float, typer.Option(min=0.0, help="Least time of one measurement.")] = 0.5,
    small: Annotated[bool, typer.Option("--small", help="Try it: 2 blocks of 8 features, 48x48, one thread.")] = False,
    memory: Annotated[bool, typer.Option("--memory", help="Peak memory as well.")] = False,
) -> None:
    """Measure EDSR-baseline x4, float and quantized, in several engines."""
    compat.import_host()
    try:
        check_writable(out / "engines.md")
        cases = ((48, 48, 1),) if small else CASES
        features, blocks = (8, 2) if small else (64, 16)
        float_net, found = float_network(features, blocks), {}
        for width in bits.split(","):
            net = quantized(float_net, width)
            names = check_variants(DEFAULT if not found else [INT8_PLAIN, INT8, INT8_TAIL])
            for height, side, threads in cases:
                protocol = Protocol(((height, side),), threads, rounds, seconds)
                found[width, height, side, threads] = measured(net, float_net, names, protocol, memory)
                save(
                    found[width, height, side, threads],
                    net,
                    protocol,
                    f"EDSR {blocks}x{features} x4, {width}",
                    out,
                    width,
                )
    except (UserError, ValueError, OSError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    versions = ", ".join(
        f"{name} {number}" for name, number in {"torch": torch.__version__, **engine_versions()}.items()
    )
    text = f"{to_markdown(found)}\n\n{described(machine())}; {versions}.\n"
    write_atomically(out / "engines.md", lambda path: path.write_text(text, "utf-8"))
    console.print(text, markup=False, soft_wrap=True)
    console.print(f"wrote engines.md, results and plots to {out}", markup=False, soft_wrap=True)


def measured(net: nn.Module, float_net: nn.Module, names: list[str], protocol: Protocol, memory: bool) -> list[Row]:
    """The rows of one size."""
    with tempfile.TemporaryDirectory(prefix="qsr_bench_") as folder:
        models = Models(net, float_net, Path(folder), threads=protocol.threads)
        return bench(models, names, protocol, memory=memory, progress=lambda items, what: track(items, what, console))


def save(rows: list[Row], net: nn.Module, protocol: Protocol, title: str, out: Path, bits: str) -> None:
    """Show the rows of one size, and write them as JSON and as a plot."""
    (size,) = protocol.sizes
    console.print(to_table(rows, size, title))
    console.print("\n".join(legend(rows, protocol)), markup=False, soft_wrap=True)
    stem = f"{bits.lower()}_{size[0]}x{size[1]}_{protocol.threads}t"
    settings: dict[str, Any] = {"machine": machine(), "protocol": str(protocol), "threads": protocol.threads}
    results = tuple(result_of(row, net, "") for row in rows)
    write_results(ResultTable(rows=results, settings=settings), out / f"{stem}.json")
    told = f"{title}, {threads_text(protocol.threads)}"
    bench_plot(rows, protocol.sizes, out / f"{stem}.png", title=told, below=described(machine()))


if __name__ == "__main__":
    typer.run(main)
