"""``qsr export``: a quantized network as a file for an engine, a small file, or a file for other programs."""

from __future__ import annotations

from enum import Enum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Optional

import typer
from rich.table import Table

from qsr_plugin import compat
from qsr_plugin.report_cli import console

if TYPE_CHECKING:
    from qsr_plugin.deploy.packed import PackedReport

Option = typer.Option


class Format(str, Enum):
    """Kinds of files."""

    ONNX = "onnx"
    PACKED = "packed"
    PLAIN = "plain"


_ENDINGS = {Format.ONNX: (".onnx",), Format.PACKED: (".safetensors",), Format.PLAIN: (".pth", ".safetensors")}
#: Options that only one format has.
_OWN = {
    **dict.fromkeys(("--input-size", "--bits", "--tail-images", "--signed"), Format.ONNX),
    **dict.fromkeys(("--half", "--collapse"), Format.PACKED),
}


def export(
    model: Annotated[Path, typer.Argument(metavar="FILE", help="Quantized .safetensors.")],
    out: Annotated[Path, Option("-o", "--out", help="File to write: .onnx, .safetensors (packed), .pth (plain).")],
    form: Annotated[
        Format,
        Option(
            "--format",
            help="onnx: for engines; packed: weights in as many bits as they have; plain: float weights with the "
            "quantized values, for other programs.",
        ),
    ],
    input_size: Annotated[
        Optional[tuple[int, int]],
        Option(metavar="H W", help="onnx: LR height and width to trace with; networks with windows keep them."),
    ] = None,
    bits: Annotated[
        Optional[int], Option(help="onnx: one width for places whose bits depend on the image: another network.")
    ] = None,
    tail_images: Annotated[
        Optional[Path],
        Option(
            help="onnx: folder of LR images, two or more; a collapsed tail then computes in 8 bits as well, unless "
            "they change too much."
        ),
    ] = None,
    signed: Annotated[
        bool, Option("--signed", help="onnx: signed bytes for activations, as TensorRT has them; slower on CPUs.")
    ] = False,
    half: Annotated[bool, Option("--half", help="packed: float layers in 16 bits; then not bit-exact.")] = False,
    collapse: Annotated[
        bool,
        Option("--collapse", help="packed: a linear tail as one convolution; the outermost pixels of images differ."),
    ] = False,
) -> None:
    """Write a quantized network for use elsewhere."""
    given = {
        "--input-size": input_size is not None,
        "--bits": bits is not None,
        "--tail-images": tail_images is not None,
        "--signed": signed,
        "--half": half,
        "--collapse": collapse,
    }
    for name, owner in _OWN.items():
        if given[name] and form is not owner:
            raise typer.BadParameter(f"{name} belongs to --format {owner.value}: leave it out for {form.value}")
    if out.suffix not in _ENDINGS[form]:
        raise typer.BadParameter(f"'{out}': --format {form.value} writes {' or '.join(_ENDINGS[form])} files")
    if model.suffix == ".onnx":
        raise typer.BadParameter(f"'{model}' is exported already: give the .safetensors that it was made from")
    if not model.is_file():
        raise typer.BadParameter(f"'{model}' is not there: give the .safetensors of 'qsr quantize' or of a training")
    if out.resolve() == model.resolve():
        raise typer.BadParameter(f"-o {out} is the file to export: choose another name")
    if input_size is not None and min(input_size) < 1:
        raise typer.BadParameter(f"--input-size is {input_size[0]} {input_size[1]}; give height and width in pixels")
    compat.import_host()
    from qsr_plugin import export_onnx, load_quantized
    from qsr_plugin.checkpoint import check_writable
    from qsr_plugin.data.calibration_set import crops_from_folder
    from qsr_plugin.deploy.packed import save_packed
    from qsr_plugin.deploy.plain import save_plain
    from qsr_plugin.deploy.tail_bits import TAIL_IMAGES

    check_writable(out)
    net = load_quantized(model)
    try:
        if form is Format.PACKED:
            report = save_packed(net, out, half=half, collapse=collapse)
            console.print(packed_table(report))
            said = "\n".join([*_collapsed(report), f"wrote {out}"])
        elif form is Format.PLAIN:
            said = str(save_plain(net, out))
        else:
            tail = None if tail_images is None else list(crops_from_folder(tail_images, images=TAIL_IMAGES, batch=1))
            said = str(export_onnx(net, out, input_size, bits=bits, tail_images=tail, signed=signed))
    except KeyboardInterrupt:
        console.print(f"interrupted: {out} is not written", highlight=False, markup=False, soft_wrap=True)
        raise
    for line in said.splitlines():
        console.print(line, highlight=False, markup=False, soft_wrap=True)


def _collapsed(report: PackedReport) -> list[str]:
    """What a collapsed tail means for the images."""
    if not report.collapsed:
        return []
    border = f"; the outermost {report.ring} pixels of images differ for that" if report.ring else ""
    return [f"tail: {', '.join(report.collapsed)} are one convolution{border}"]


def packed_table(report: PackedReport) -> Table:
    """What a packed file takes, beside what the network takes otherwise."""
    from qsr_plugin.report.tables import size

    def row(what: str, count: int, ratio: bool = False) -> None:
        table.add_row(what, size(8 * count), f"{report.float_bytes / count:.2f} x" if ratio else "")

    table = Table("", "Size", "Float / this", caption="1 MB is 10^6 bytes. Float: all parameters in 32 bits.")
    table.columns[1].justify = table.columns[2].justify = "right"
    row("Float weights", report.float_bytes)
    row("Quantized file with float weights", report.quantized_bytes, ratio=True)
    row("This file", report.file_bytes, ratio=True)
    row("  codes", sum(one.codes_bytes for one in report.rows))
    row("  grids of the codes", sum(one.side_bytes for one in report.rows))
    row(f"  float layers{', in 16 bits' if report.half else ''}", report.float_layer_bytes)
    row("  ranges, bit policies", report.range_bytes)
    row("  names, recipe", report.header_bytes)
    row("Stated by qsr report", report.stated_bytes, ratio=True)
    row("Parameters x weight bits / 32, in theory", report.theoretical_bytes, ratio=True)
    if report.in_float:
        table.add_row(f"[dim]{len(report.in_float)} layer(s) not packed, first {report.in_float[0]}[/dim]", "", "")
    return table
