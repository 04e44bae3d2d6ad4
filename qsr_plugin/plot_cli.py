"""``qsr plot``: pictures of chosen bits, and of quality over cost."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Optional

import typer
from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.table import Table

from qsr_plugin import compat

app = typer.Typer(help="Draw the bits a network chooses, and quality over cost.", no_args_is_help=True)
console = Console()

Out = Annotated[list[Path], typer.Option("-o", "--out", help="Picture, .png or .svg; may be repeated.")]


@app.command()
def bits(
    context: typer.Context,
    image: Annotated[Path, typer.Argument(help="Low-resolution image that the network enlarges.")],
    model: Annotated[list[Path], typer.Option(help="Quantized .safetensors; may be repeated to compare.")],
    out: Out,
    patch: Annotated[int, typer.Option(help="Side of a patch in pixels of the image.")] = 96,
    overlap: Annotated[int, typer.Option(help="Pixels that neighbouring patches share.")] = 6,
    last: Annotated[str, typer.Option(help="Last patch of a row: enlarge it, or shift it back.")] = "enlarge",
    batch: Annotated[int, typer.Option(help="Patches of equal size that run together.")] = 16,
    whole: Annotated[bool, typer.Option("--whole", help="Run the whole image as one patch.")] = False,
    data: Annotated[Optional[Path], typer.Option(help="Write the numbers as JSON.")] = None,
) -> None:
    """Draw the bits of every patch over the image, and the share of each width in every layer."""
    compat.import_host()
    from qsr_plugin import load_quantized
    from qsr_plugin.data.images import read_rgb, to_tensor, to_uint8
    from qsr_plugin.options_file import scale_of
    from qsr_plugin.report.bit_maps import labels_of, observe_bits, patch_gradients
    from qsr_plugin.report.bit_plots import save_bits
    from qsr_plugin.report.plots import check_ending
    from qsr_plugin.report.result_io import write_results
    from qsr_plugin.report.result_schema import Result, ResultTable, described, of_backbone, package_versions

    cut = {"size": patch, "overlap": overlap, "last": last, "batch": batch}
    said = [name for name in ("patch", "overlap", "last", "batch") if _given(context, name)]
    if whole and said:
        given = ", ".join(f"--{name}" for name in said)
        raise typer.BadParameter(f"--whole is one patch, but {given} says how to cut: leave out --whole, or {given}")
    for path in out:
        check_ending(path)
    pixels = read_rgb(image)
    lr = to_tensor(pixels).unsqueeze(0)
    maps, gradients, results = [], [], []
    for path, label in zip(model, labels_of(model)):
        net = load_quantized(path)
        maps.append(observe_bits(net, lr, scale_of(net.backbone_options), label, **({} if whole else cut)))
        gradients.append(patch_gradients(lr, maps[-1].patches))
        known = {**described(net.recipe), "label": label, **of_backbone(net.backbone_options), "model": str(path)}
        results.append(Result(**known, versions=package_versions(), details=maps[-1].to_dict(gradients[-1])))
    for path in out:
        save_bits(path, to_uint8(pixels), maps)
    if data is not None:
        shared = {"image": str(image), "patches": "whole image" if whole else cut}
        write_results(ResultTable(rows=tuple(results), settings=shared), data)
    console.print(_bits_table(maps, gradients))
    console.print(f"wrote {', '.join(map(str, [*out, *([data] if data else [])]))}", highlight=False, soft_wrap=True)


def _given(context: typer.Context, option: str) -> bool:
    """Whether an option stands on the command line, be it with its default."""
    return context.get_parameter_source(option).name == "COMMANDLINE"


#: A terminal of 80 columns has no room for the shares of more widths side by side.
_MOST_COLUMNS = 4


def _bits_table(maps: list, gradients: list[list[float]]) -> Table:
    """One row per network: mean bits, share of each width, and whether smooth patches get fewer."""
    from qsr_plugin.report.bit_maps import LEAST_FOR_QUARTERS

    widths = sorted({width for one in maps for width in one.widths})
    few = min(len(one.patches) for one in maps) < LEAST_FOR_QUARTERS
    caption = f"fewer than {LEAST_FOR_QUARTERS} patches have no quarters to compare" if few else None
    table = Table(caption=caption, box=SIMPLE_HEAD)
    table.add_column("Network", overflow="fold")
    apart = len(widths) <= _MOST_COLUMNS
    share_columns = [f"{width} bits" for width in widths] if apart else ["bits: share"]
    for heading in ("Patches", "FAB", *share_columns, "Smooth quarter", "Textured quarter"):
        table.add_column(heading.replace(" ", "\n", 1), justify="right", no_wrap=True)
    for one, slopes in zip(maps, gradients):
        percents = {width: f"{100 * share:.0f} %" for width, share in zip(one.widths, one.shares.mean(0))}
        listed = "\n".join(f"{width}: {percent:>5}" for width, percent in percents.items())
        table.add_row(
            one.label, str(len(one.patches)), f"{one.fab:.2f}",
            *([percents.get(width, "") for width in widths] if apart else [listed]),
            *(f"{mean:.2f}" for mean in one.quarters(slopes) or ()),
        )  # fmt: skip
    return table


_AXES = {"fab": "fab", "bitops": "bitops", "size": "storage_bits"}


@app.command()
def tradeoff(
    results: Annotated[
        list[str],
        typer.Argument(help="Result files of any command; or LABEL=FILE."),
    ],
    out: Out,
    x: Annotated[str, typer.Option("--x", help="What it costs: fab, bitops or size.")] = "fab",
    test: Annotated[
        Optional[str], typer.Option("--set", help="Test set.", show_default="the first all files have")
    ] = None,
    front: Annotated[bool, typer.Option("--front", help="Draw the Pareto front.")] = False,
    title: Annotated[Optional[str], typer.Option(help="Above the plot.", show_default="the test set")] = None,
) -> None:
    """Draw PSNR over what it costs. Networks whose labels differ in the last word only are joined by a line."""
    from qsr_plugin.errors import suggest
    from qsr_plugin.report.plots import check_ending, tradeoff_plot
    from qsr_plugin.report.result_files import choose_set, read_points, rename, rows_of
    from qsr_plugin.report.result_schema import FLOAT

    if x not in _AXES:
        raise typer.BadParameter(f"--x is '{x}'. {suggest(x, _AXES)}")
    for path in out:
        check_ending(path)
    points = []
    for text in results:
        label, equals, file = ("", "", text) if Path(text).exists() else text.rpartition("=")
        read = read_points(Path(file))
        points += rename(read, label) if equals else read
    chosen = choose_set(points, test)
    rows = rows_of(chosen, _AXES[x])
    name, way = chosen[0].test, next((point.way for point in chosen if point.label != FLOAT), None)
    texts = {
        "title": name if title is None else title,
        "below": f"{way.unit} of one image ({way})" if way and x == "bitops" else "",
    }
    for path in out:
        tradeoff_plot(rows, _AXES[x], "psnr", path, front=front, **texts)
    console.print(_points_table(chosen, name))
    console.print(f"wrote {', '.join(map(str, out))}", highlight=False, soft_wrap=True)


def _points_table(points: list, title: str) -> Table:
    from qsr_plugin.report.tables import quantity, size

    forms = {"psnr": "{:.2f} dB".format, "fab": "{:.2f}".format, "bitops": quantity, "storage_bits": size}
    table = Table(title=title or None)
    table.add_column("Network", overflow="fold")
    for heading in ("PSNR", "FAB", "BitOPs", "Size"):
        table.add_column(heading, justify="right", no_wrap=True)
    rows = [
        (point.label, *(form(point.figures[key]) if key in point.figures else "" for key, form in forms.items()))
        for point in points
    ]
    for row in dict.fromkeys(rows):  # the float network is in several files
        table.add_row(*row)
    return table
