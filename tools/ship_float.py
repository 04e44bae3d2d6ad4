"""Turn a float training into a shipped network: bare weights as .safetensors and a model card with measured scores."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated

import torch
import typer
from rich.console import Console
from safetensors.torch import save as safetensors_bytes

from qsr_plugin import compat, complexity
from qsr_plugin.checkpoint import load_float_weights, write_atomically
from qsr_plugin.options_file import load_options
from qsr_plugin.progress import track
from qsr_plugin.report.evaluate import evaluate

CARD = """# {name}

{kind}, scale {scale}: {parameters:,} parameters, {macs:.2f} GMACs for an LR image of 180 x 320. Float weights (EMA).

| | |
|---|---|
| Arguments | `{arguments}` |
| Trained by | `python -m qsr_plugin.train -opt {options}` |
| Data | {data} |
| Length | {iterations:,} iterations of batch {batch}, HR crops of {crop} px, L1 loss, seed {seed} |
| Optimiser | {optimiser} with {scheduler} |

PSNR / SSIM on Y, {scale} pixels left out on each side, measured by `tools/ship_float.py`:

| Set | Images | PSNR | SSIM |
|---|---|---|---|
{rows}

{note}
"""


def main(
    weights: Annotated[Path, typer.Argument(help="net_g_latest.pth of the training.")],
    out: Annotated[Path, typer.Argument(help="File to write, .safetensors; the card goes beside it as .md.")],
    options: Annotated[str, typer.Option(help="Option file of the training.")],
    benchmarks: Annotated[Path, typer.Option(help="Folder with NAME/HR and NAME/LRbicx<scale>.")],
    sets: Annotated[str, typer.Option(help="Benchmarks, separated by commas.")] = "Set5,Set14,B100",
    data: Annotated[str, typer.Option(help="What the network was trained on, for the card.")] = "not stated",
    note: Annotated[str, typer.Option(help="Last paragraph of the card.")] = "",
) -> None:
    """Write weights and card."""
    compat.import_host()
    from qsr_plugin.archs.quant_net_arch import build_backbone

    torch.set_grad_enabled(False)
    opt = load_options(options)
    network, train = opt["network_g"], opt["datasets"]["train"]
    net = build_backbone(network).eval()
    load_float_weights(net, weights, prefer="params_ema")
    rows = []
    for name in sets.split(","):
        folder = benchmarks / name
        hr, lr = folder / "HR", folder / f"LRbicx{opt['scale']}"
        score = evaluate(net, hr, lr, opt["scale"], progress=lambda pairs, name=name: track(pairs, name, Console()))
        rows.append(f"| {name} | {len(score.images)} | {score.psnr:.2f} | {score.ssim:.4f} |")
    report = complexity(net)
    card = CARD.format(
        name=out.stem, kind=network["type"], scale=opt["scale"], parameters=report.parameters, macs=report.macs / 1e9,
        arguments=json.dumps({k: v for k, v in network.items() if k != "type"}), options=options, data=data,
        iterations=opt["train"]["total_iter"], batch=train["batch_size_per_gpu"], crop=train["gt_size"],
        seed=opt["manual_seed"], optimiser=json.dumps(opt["train"]["optim_g"]),
        scheduler=json.dumps(opt["train"]["scheduler"]), rows="\n".join(rows), note=note,
    )  # fmt: skip
    tensors = {key: value.contiguous().clone() for key, value in net.state_dict().items()}
    content = safetensors_bytes(tensors, metadata={"backbone": json.dumps(network), "scale": str(opt["scale"])})
    write_atomically(out, lambda path: path.write_bytes(content))
    write_atomically(out.with_suffix(".md"), lambda path: path.write_text(card.rstrip() + "\n", "utf-8"))
    Console().print(card, markup=False)


if __name__ == "__main__":
    typer.run(main)
