"""Published costs beside ours: every row of the tables in ``qsr_plugin/report/conventions.md`` is computed here."""

from __future__ import annotations

import re
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path

import pytest
import torch
from qsr_plugin.archs.quant_net_arch import build_backbone
from torch import nn

import qsr_plugin
from qsr_plugin import complexity, load_recipe, quantize_model, set_depth
from qsr_plugin.options_file import backbone_options
from qsr_plugin.quant.policy import PolicyPart
from qsr_plugin.quant.surgery import quantizers
from qsr_plugin.report.complexity_types import ComplexityReport

PAGE = Path(qsr_plugin.__file__).parent / "report" / "conventions.md"
NETWORKS = {
    "EDSR": ("edsr_baseline_x4", {}),
    "EDSR x2": ("edsr_baseline_x4", {"upscale": 2}),
    "EDSR x2, 32 blocks": ("edsr_baseline_x4", {"upscale": 2, "num_block": 32}),
    "SRResNet": ("srresnet_x4", {}),
    "CARN": ("carn_x4", {}),
    "IDN": ("idn_x4", {"num_in_ch": 3, "rgb": False}),
    "EDSR-full": ("edsr_x4", {}),
    "RDN": ("rdn_x4", {}),
    "SwinIR": ("swinir_light_x4", {}),
    "SwinIR x2": ("swinir_light_x2", {}),
    "HAT-S": ("hat_s_x4", {}),
}
#: One seam of 6 pixels in 180 x 320, as patches of 160 make it, and the released cropping.
SEAM = (("size", 160), ("overlap", 6), ("last", "enlarge"))
RELEASED = (("size", 96), ("overlap", 6), ("last", "enlarge"))
FOUR_K = 9  # times 180 x 320


_PORTS = ("input", "weight")


@cache
def network(backbone: str, method: str, bits: int | None, also: str) -> nn.Module:
    """A network, without data where that is possible: float, or with convolutions quantized.

    These are those of its body and of the role ``also``. Without ``bits`` the recipe's own; ``also`` has 8 then.
    """
    name, changes = NETWORKS[backbone]
    with torch.random.fork_rng():
        net = build_backbone({**backbone_options(name), **changes})
    net = net if method == "quantsr" else net.to("meta")  # choosing a depth reads the order of the blocks
    if not method:
        return net
    own, widths = ({"bits": 8}, {}) if bits is None else ({}, {"weight_bits": bits, "act_bits": bits})
    body = load_recipe(method).to_dict()["placements"]["body"]
    rules = [*body, *({"role": also, "port": port, **own} for port in _PORTS if also)]
    return quantize_model(net, load_recipe(method, placement="counted", placements={"counted": rules}, **widths))


@cache
def costs(
    convention: str,
    backbone: str,
    method: str = "",
    bits: float = 8,
    *,
    also: str = "",
    depth: int | None = None,
    size: tuple[int, int] | None = None,
    patches: tuple[tuple[str, object], ...] = (),
) -> ComplexityReport:
    """Costs of a network.

    Args:
        convention: How to count.
        backbone: Key of :data:`NETWORKS`.
        method: Recipe; none for the float network.
        bits: Of weights and activations; where CADyQ chooses, the mean at all places, beside 8-bit weights.
        also: Role of more layers that are quantized, at 8 bits under CADyQ.
        depth: Blocks that run.
        size: LR (height, width).
        patches: How an image is cut, as pairs.
    """
    net = set_depth(network(backbone, method, None if method == "cadyq" else bits, also), depth)
    chosen = {place: bits for place, quantizer in quantizers(net) if len(quantizer.candidates) > 1}
    return complexity(net, size, convention=convention, bits=chosen or None, patches=dict(patches) or None)


def cadyq(backbone: str, method: str = "pams", bits: float = 8, **more: object) -> float:
    return costs("cadyq", backbone, method, bits, **more).bitops


def quantsr_c(figure: str, bits: int, blocks: int, convention: str) -> float:
    report = costs(convention, "EDSR x2, 32 blocks", "quantsr", bits, also="body_end", depth=blocks)
    return getattr(report, figure)


def quantsr_t(figure: str, bits: int, blocks: int, convention: str) -> float:
    return getattr(costs(convention, "SwinIR x2", "quantsr", bits, depth=blocks), figure)


def table_2(kind: str, figure_of: Callable[..., float], depths: tuple[int, ...]) -> dict[str, Callable[[], float]]:
    """Both figures of a table's rows by the rows' names; ``figure_of`` takes figure, bits, blocks and convention."""
    return {
        f"{kind}, {bits} bits, {blocks} {'block' if blocks == 1 else 'blocks'}, {name}, {convention}": partial(
            figure_of, figure, bits, blocks, convention
        )
        for bits, convention in ((4, "quantsr"), (2, "quantsr-printed"), (2, "quantsr"))
        for blocks in depths
        for name, figure in (("Params", "scaled_parameters"), ("Ops", "bitops"))
    }


def saved(figure: str, digits: int | None = None) -> float:
    """What QuantSR-C with 16 blocks and 2 bits saves of the float network, of a figure rounded to these digits."""
    left = quantsr_c(figure, 2, 16, "quantsr-printed")
    return 1 - (left if digits is None else round(left, digits)) / getattr(costs("quantsr", "EDSR x2"), figure)


def carn_4k(bits: float = 8, selectors: str = "") -> float:
    """One seam; selectors are free, cost what reports say, or as many operations per pixel as they have numbers."""
    report = costs("cadyq", "CARN", "cadyq", bits, patches=SEAM)
    spent = {"": 0, "reports": report.policy_ops, "per pixel": 18 * selector() * 180 * 326}[selectors]
    return FOUR_K * (report.bitops + spent)


def swinir_once_more(bits: int) -> float:
    """BitOPs with two things more: the last convolution of a block again, 5 operations per value of 48 layer norms."""
    report = costs("odm", "SwinIR", *(("odm", bits) if bits < 32 else ()))
    again = sum(site.macs for site in report.sites if re.fullmatch(r"layers\.\d\.conv", site.name))
    return report.bitops + again * bits**2 + 5 * 48 * 60 * 64 * 64 * 32**2


@cache
def selector() -> int:
    """Numbers in a selector of 64 channels."""
    parts = network("EDSR", "cadyq", None, "").modules()
    one = next(part for part in parts if isinstance(part, PolicyPart) and list(part.parameters()))
    return sum(p.numel() for p in one.parameters())


def corrections(backbone: str, also: str = "") -> float:
    """Numbers that ODM learns for weights."""
    parts = (part for _, part in quantizers(network(backbone, "odm", 2, also)) if part.role == "weight")
    return sum(p.numel() for part in parts for p in part.parameters())


def compression(bits: int) -> float:
    """2DQuant: linear layers of attention and MLP, ranges free; position tables do not count."""
    report = costs("odm", "SwinIR")
    linears = sum(s.weights for s in report.sites if re.search(r"attn\.(qkv|proj)|mlp", s.name) and s.kind == "Linear")
    total = report.parameters - 24 * 6 * 15 * 15
    return total / (total - linears * (1 - bits / 32))


def edsr_1080p(method: str = "", bits: int = 32) -> float:
    return 2 * costs("macs-bits", "EDSR", *((method, bits) if method else ()), size=(270, 480)).bitops


def whole_edsr(bits: float) -> float:
    """All layers at one width."""
    return 2 * costs("macs-bits", "EDSR").macs * (bits / 32) ** 2


EDSR_PARAMETERS, BODY_WEIGHTS, BODY_BIASES = 1_517_571, 32 * 36864, 32 * 64

#: Our figure by the first cell of a row.
OURS: dict[str, Callable[[], float]] = {
    # CADyQ
    "EDSR-baseline, 32 bits": lambda: 16 * cadyq("EDSR"),
    "EDSR-baseline, W8A8": lambda: cadyq("EDSR"),
    "SRResNet, 32 bits": lambda: 16 * cadyq("SRResNet"),
    "IDN, 32 bits": lambda: 16 * cadyq("IDN", also="head"),
    "EDSR-baseline, FQR 6.09, patches": lambda: cadyq("EDSR", "cadyq", 6.09, patches=SEAM),
    "SRResNet, FQR 5.73, patches": lambda: cadyq("SRResNet", "cadyq", 5.73, patches=SEAM),
    "IDN, FQR 5.78, patches": lambda: cadyq("IDN", "cadyq", 5.78, also="head", patches=SEAM),
    "CARN, FQR 5.32, patches": lambda: cadyq("CARN", "cadyq", 5.32, patches=SEAM),
    "IDN, parameters": lambda: costs("cadyq", "IDN", "cadyq", also="head").scaled_parameters,
    "EDSR-baseline, parameters": lambda: costs("cadyq", "EDSR", "cadyq").scaled_parameters,
    "EDSR-baseline, parameters, 16 selectors": lambda: EDSR_PARAMETERS + 16 * selector() + 3 * 32 + 16,
    "selector of 64 channels, numbers": selector,
    "SRResNet, parameters": lambda: costs("cadyq", "SRResNet", "cadyq").scaled_parameters,
    "CARN, 4K, W8A8": lambda: cadyq("CARN", size=(540, 960)),
    "CARN, 4K, W8A8, patches": lambda: cadyq("CARN", size=(540, 960), patches=RELEASED),
    "CARN, 4K, W8A8, patches, one seam": carn_4k,
    "CARN, 4K, W8A8, patches and selectors": lambda: carn_4k(selectors="reports"),
    "CARN, 4K, W8A8, patches and selectors, per pixel": lambda: carn_4k(selectors="per pixel"),
    "CARN, 4K, FQR 4.5": lambda: carn_4k(4.5, "per pixel"),
    "EDSR-baseline, all layers, 32 bits": lambda: whole_edsr(32),
    "EDSR-baseline, all layers, W8A8": lambda: whole_edsr(8),
    "EDSR-baseline, all layers, FQR 5.90": lambda: (317.5e9 - 16 * cadyq("EDSR")) / 16 + cadyq("EDSR", "cadyq", 5.9),
    # QuantSR
    **table_2("C", quantsr_c, (32, 16, 8)),
    "C, 2 bits, 16 blocks, Params saved": lambda: saved("scaled_parameters", -3),
    "C, 2 bits, 16 blocks, Ops saved": lambda: saved("bitops"),
    "QuantSR+, 2 bits, 16 blocks, Params saved": lambda: saved("scaled_parameters"),
    "QuantSR+, 2 bits, 16 blocks, Ops saved": lambda: saved("bitops"),
    "T, 32 bits, 4 blocks, Params": lambda: costs("odm", "SwinIR").scaled_parameters,
    "T, 32 bits, 4 blocks, Ops": lambda: costs("quantsr", "SwinIR x2").bitops,
    **table_2("T", quantsr_t, (4, 2, 1)),
    # ODM
    **{
        f"SwinIR-light, 2 bits, storage, {method.upper()}": lambda method=method: (
            costs("odm", "SwinIR", method, 2).scaled_parameters
        )
        for method in ("odm", "pams", "daq")
    },
    "SwinIR-light, 32 bits, BitOPs": lambda: costs("odm", "SwinIR").bitops,
    "SwinIR-light, 2 bits, BitOPs": lambda: costs("odm", "SwinIR", "odm", 2).bitops,
    "SwinIR-light, 2 bits, BitOPs, DAQ": lambda: costs("odm", "SwinIR", "daq", 2).bitops,
    "SwinIR-light, 32 bits, BitOPs, with more": lambda: swinir_once_more(32),
    "SwinIR-light, 2 bits, BitOPs, with more": lambda: swinir_once_more(2),
    "RDN, 2 bits, corrections of weights": lambda: corrections("RDN", "body_end"),
    "EDSR-baseline, 2 bits, corrections of weights": lambda: corrections("EDSR"),
    "EDSR-full, 2 bits, corrections of weights": lambda: corrections("EDSR-full"),
    # others
    "EDSR-baseline, 32 bits, parameters": lambda: costs("macs-bits", "EDSR").parameters,
    "EDSR-baseline, W8A8, parameters": lambda: costs("odm", "EDSR", "pams", 8).scaled_parameters,
    "EDSR-baseline, W8A8, parameters, biases too": lambda: EDSR_PARAMETERS - 0.75 * (BODY_WEIGHTS + BODY_BIASES),
    "EDSR-baseline, 32 bits, BitOPs": edsr_1080p,
    "EDSR-baseline, PAMS, BitOPs": lambda: edsr_1080p("pams", 8),
    **{f"SwinIR-light, W{b}A{b}, compression": lambda b=b: compression(b) for b in (4, 3, 2)},
}
UNITS = {"": 1.0, "x": 1.0, "%": 0.01, "K": 1e3, "G": 1e9, "T": 1e12}
VERDICTS = ("reproduced", "fits", "open")


@pytest.mark.parametrize(("backbone", "padded"), [("SwinIR", (184, 320)), ("HAT-S", (192, 320))])
def test_windows_are_counted_on_the_padded_image(backbone: str, padded: tuple[int, int]) -> None:
    counted = [costs("macs-bits", backbone, size=size).macs for size in ((180, 320), padded, (padded[0] + 1, 320))]
    assert counted[0] == counted[1] < counted[2]


def rows() -> list[tuple[str, str, str, str]]:
    """Figure, published, ours, verdict."""
    lines = (re.split(r" *\| *", line.strip("| ")) for line in PAGE.read_text("utf-8").splitlines() if line[:1] == "|")
    return [(cells[0], cells[1], cells[2], cells[3]) for cells in lines if len(cells) > 3 and cells[3] in VERDICTS]


def test_page_and_tests_have_the_same_rows() -> None:
    names = [name for name, *_ in rows()]
    assert len(names) == len(set(names)) and set(names) == set(OURS)


@pytest.mark.parametrize(("name", "published", "ours", "verdict"), rows(), ids=[name for name, *_ in rows()])
def test_row_of_the_page(name: str, published: str, ours: str, verdict: str) -> None:
    number, unit = re.fullmatch(r"([\d.]+) ?([%xKGT]?)", published).groups()
    decimals = len(number.partition(".")[2])
    assert ours == f"{OURS[name]() / UNITS[unit]:.{decimals}f}{f' {unit}' if unit else ''}"
    assert (ours == published) == (verdict != "open")
