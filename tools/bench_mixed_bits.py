"""Cost of bits that differ from image to image: one batch at mixed widths beside the same batch at one width.

    python tools/bench_mixed_bits.py --batch 16 --size 48 --json mixed.json

One network runs in turn at one width (an int at every place) and otherwise, in ABBA groups: with the candidates mixed
over the images of the batch, which is what the mechanism costs; and, for recipes, with their own bit policy, which adds
what the choice costs, and in training the branches that are not chosen. ``inference`` is a forward without graph;
``training`` is forward, L1 loss, backward and Adam.
"""

from __future__ import annotations

import statistics
import sys
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Annotated, Any, Optional

import torch
import typer
from rich.console import Console
from rich.table import Table
from torch import nn

from qsr_plugin import calibrate, compat, list_methods, load_recipe, quantize_model
from qsr_plugin.errors import UserError
from qsr_plugin.progress import track
from qsr_plugin.quant.policy import POLICIES, BitDecision, BitPolicy
from qsr_plugin.quant.recipe import register_parts
from qsr_plugin.quant.surgery import policies
from qsr_plugin.report.result_io import write_results
from qsr_plugin.report.result_schema import Result, ResultTable, package_versions

console = Console(highlight=False)
CANDIDATES = (4, 6, 8)


class GivenBits(BitPolicy):
    """Has no opinion; :func:`decide` tells it what to answer."""


def adaptive_methods() -> list[str]:
    """Shipped recipes whose bits a policy chooses."""
    return [name for name in list_methods() if isinstance(load_recipe(name).act_widths, tuple)]


def recipe_of(quantizer: str) -> dict[str, Any]:
    """Input and weight of the convolutions of all blocks, bits given."""
    rules = [{"role": "block.conv", "port": port} for port in ("input", "weight")]
    return {
        "method": quantizer, "bits": {"weight": 8, "act": list(CANDIDATES)}, "policy": "given", "placement": "body",
        "quantizers": {"act": quantizer, "weight": "maxabs"}, "placements": {"body": rules},
    }  # fmt: skip


def decide(net: nn.Module, batch: int, kind: str) -> None:
    """Have the places that choose answer with the middle candidate (``fixed``), all in turn (``mixed``), or themselves.

    Args:
        net: Quantized network.
        batch: Images per batch.
        kind: ``fixed``, ``mixed`` or ``policy``.
    """
    for _, policy in policies(net):
        policy.__dict__.pop("decide", None)
        if kind == "policy" or len(policy.candidates) == 1:
            continue
        bits: Any = policy.candidates[len(policy.candidates) // 2]
        if kind == "mixed":
            device = next(net.parameters()).device
            widths = [policy.candidates[index % len(policy.candidates)] for index in range(batch)]
            bits = torch.tensor(widths, dtype=torch.float32, device=device)
        policy.__dict__["decide"] = _always(BitDecision(bits))


def _always(decision: BitDecision) -> Callable[..., BitDecision]:
    return lambda features, record: decision


def runner(net: nn.Module, x: torch.Tensor, kind: str, training: bool) -> Callable[[], None]:
    """One inference or one training step, at the bits told by ``kind``."""
    if not training:

        def infer() -> None:
            decide(net, x.shape[0], kind)
            with torch.no_grad():
                net.eval()(x)

        return infer
    optimizer = torch.optim.Adam(net.parameters(), lr=1e-6)
    with torch.no_grad():
        target = torch.rand_like(net(x))

    def train() -> None:
        decide(net, x.shape[0], kind)
        optimizer.zero_grad()
        nn.functional.l1_loss(net.train()(x), target).backward()
        optimizer.step()

    return train


def measure(
    backbone: Mapping[str, Any], recipe: Any, kinds: tuple[str, ...], x: torch.Tensor, groups: int
) -> list[dict]:
    """Rows of one network: every kind, in inference and in training, beside the fixed width."""
    from qsr_plugin.archs.quant_net_arch import build_backbone

    from qsr_plugin.models.step_cost import time_in_groups

    recipe = load_recipe(recipe)
    torch.manual_seed(0)
    net = quantize_model(build_backbone(dict(backbone)).to(x.device), recipe)
    calibrate(net, [x])
    rows = []
    for training in (False, True):
        fixed = runner(net, x, "fixed", training)
        for kind in kinds:
            times = time_in_groups(runner(net, x, kind, training), fixed, groups)
            run = "training" if training else "inference"
            rows.append({"network": recipe.method, "bits": kind, "run": run, "times": times.to_dict()})
    return rows


def to_table(rows: list[dict[str, Any]], title: str) -> Table:
    """Rows for the terminal."""
    failed = [f"{row['network']}: {row['failed']}" for row in rows if "failed" in row]
    table = Table("Network", "Bits", "Run", title=title, caption="\n".join(failed) or None, caption_justify="left")
    for heading in ("/ one width", "min", "max", "one width, s"):
        table.add_column(heading, justify="right", no_wrap=True)
    for row in rows:
        if "failed" in row:
            table.add_row(row["network"], "", "failed", style="red")
            continue
        ratios = row["times"]["ratios"]
        figures = statistics.median(ratios), min(ratios), max(ratios), row["times"]["median_plain"]
        table.add_row(row["network"], row["bits"], row["run"], *(f"{figure:.3f}" for figure in figures))
    return table


def result_of(row: dict[str, Any]) -> Result:
    """A row of the result file; the times are its details."""
    label = " ".join(row[name] for name in ("network", "bits", "run") if name in row)
    told = {"note": row.get("failed", ""), "versions": package_versions()}
    return Result(label=label, method=row["network"], details=row, **told)


def main(
    quantizers: Annotated[str, typer.Option(help="Quantizers, separated by commas.")] = "pams,asymmetric,rlq",
    methods: Annotated[
        Optional[str], typer.Option(help="Recipes or recipe files.", show_default="all shipped that choose bits")
    ] = None,
    backbone: Annotated[
        str, typer.Option(help="Shipped backbone (see 'qsr list') or a YAML file.")
    ] = "edsr_baseline_x4",
    groups: Annotated[int, typer.Option(min=1, help="ABBA groups that are counted.")] = 7,
    batch: Annotated[int, typer.Option(min=1, help="Images per batch.")] = 16,
    size: Annotated[int, typer.Option(min=8, help="Side of the LR crop.")] = 48,
    threads: Annotated[int, typer.Option(min=1, help="CPU threads.")] = 1,
    json: Annotated[Optional[Path], typer.Option(help="Write everything as JSON.")] = None,
) -> None:
    """Compare batches at mixed bit widths with batches at one width."""
    try:
        compat.import_host()
        register_parts()
        POLICIES["given"] = GivenBits
        from qsr_plugin.memory import keep_freed_memory
        from qsr_plugin.options_file import backbone_options

        torch.set_num_threads(threads)
        keep_freed_memory()
        options = backbone_options(backbone)
        names = adaptive_methods() if methods is None else [name for name in methods.split(",") if name]
        jobs: list[tuple[str, Any, tuple[str, ...]]] = [
            *((name, recipe_of(name), ("mixed",)) for name in quantizers.split(",") if name),
            *((name, name, ("mixed", "policy")) for name in names),
        ]
        device = "cuda" if torch.cuda.is_available() else "cpu"
        x = torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(0)).to(device)
        rows: list[dict[str, Any]] = []
        for name, recipe, kinds in track(jobs, "measuring", console):
            try:
                rows += measure(options, recipe, kinds, x, groups)
            except (UserError, ValueError, RuntimeError) as error:  # the other rows go on, and the table says it
                rows.append({"network": name, "failed": f"{type(error).__name__}: {error}"})
    except (UserError, ValueError) as error:
        Console(stderr=True).print(f"error: {error}", style="red", markup=False, highlight=False, soft_wrap=True)
        sys.exit(1)
    where = torch.cuda.get_device_name() if device == "cuda" else f"CPU, {threads} thread(s)"
    console.print(to_table(rows, f"mixed bits / one width, {backbone}, batch {batch} x {size} x {size}, {where}"))
    if json is not None:
        work = {"backbone": options, "batch": batch, "lq_size": size, "groups": groups, "threads": threads}
        write_results(ResultTable(rows=tuple(map(result_of, rows)), settings={"workload": work, "device": where}), json)


if __name__ == "__main__":
    typer.run(main)
