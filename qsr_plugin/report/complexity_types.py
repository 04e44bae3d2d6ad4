"""What a complexity report says: one row per layer, the totals of a network, and by which convention they count."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from typing import Literal, Optional

from qsr_plugin.data.patches import PatchOptions, protocol
from qsr_plugin.quant.schema import FLOAT_BITS

#: LR size (height, width) of 1280x720 at scale 4, the size most papers count at.
DEFAULT_SIZE = (180, 320)


@dataclass(frozen=True)
class Convention:
    """One way of counting operations and parameters. Which papers count so: ``conventions.md`` in this folder.

    Attributes:
        text: What its operations are, for the reader of a report.
        params_text: What its parameters are.
        params: ``stored``: all that a file needs, its bits over 32; ``learned``: learned numbers, those of quantized
            weights times their share; ``unscaled``: learned numbers; ``weights``: weights of the layers that run, times
            their share, and biases of float layers.
        unit: What its operations are called.
        input_size: LR (height, width) of its published figures, the size to count at if none is asked for.
        per_mac: Operations of one multiply-accumulate of 32 x 32 bits.
        per_norm: The same of one value of the batch norm that follows a layer.
        per_bias: The same of one addition of a bias in a convolution.
        act_bits: Whether operations shrink with the bits of activations, too, or with those of weights alone.
        float_layers: Whether layers without quantization take part.
        products: Whether products of two activations take part.
        shares: Bits to their share of 32 bits where it is not bits / 32.
    """

    text: str
    params_text: str
    params: Literal["stored", "learned", "unscaled", "weights"]
    unit: str = "BitOPs"
    input_size: tuple[int, int] = DEFAULT_SIZE
    per_mac: int = FLOAT_BITS**2
    per_norm: int = 0
    per_bias: int = 0
    act_bits: bool = True
    float_layers: bool = True
    products: bool = True
    shares: Mapping[float, float] = field(default_factory=dict)

    def share(self, bits: float) -> float:
        """What a number of so many bits counts beside one of 32."""
        return self.shares.get(bits, bits / FLOAT_BITS)

    def operations(self, row: SiteCost) -> Optional[float]:
        """Operations of one layer; ``None`` if its bits are not known."""
        if not (row.quantized or self.float_layers) or not (row.weights or self.products):
            return 0.0
        if None in (row.weight_bits, row.act_bits):
            return None
        work = self.per_mac * row.macs + self.per_norm * row.norm_values + self.per_bias * row.conv_biases
        return work * self.share(row.weight_bits) * (self.share(row.act_bits) if self.act_bits else 1.0)

    def numbers(self, row: SiteCost) -> float:
        """What the parameters of one layer amount to where only layers count."""
        biases = 0 if row.quantized else row.parameters - row.weights
        return row.weights * self.share(row.weight_bits) + biases if row.weights else 0.0

    @property
    def stated(self) -> str:
        """Both texts, as reports say them."""
        return f"{self.text}; Params: {self.params_text}"


_ALL_LAYERS = "MACs x weight bits x activation bits, all layers, float ones as 32 x 32"
_QUANTSR = {
    "unit": "Ops",
    "input_size": (256, 256),
    "params": "weights",
    "per_mac": 1,
    "per_bias": 1,
    "act_bits": False,
    "products": False,
}

#: Ways to count by name. Figures of two of them must not be compared: BitOPs of the same layers differ by 512.
CONVENTIONS = {
    "macs-bits": Convention(_ALL_LAYERS, "bits of a file with packed weights / 32", "stored"),
    # Hong et al., ECCV 2022: scaled so that a 32-bit network has as many BitOPs as FLOPs.
    "cadyq": Convention(
        "2 x (MACs + values of a batch norm right behind) x weight bits / 32 x activation bits / 32, quantized layers "
        "only",
        "numbers that are learned, ranges and selectors among them, whatever their bits",
        "unscaled",
        per_mac=2,
        per_norm=2,
        float_layers=False,
    ),
    # Hong and Lee, ECCV 2024.
    "odm": Convention(
        _ALL_LAYERS,
        "numbers that are learned, ranges among them, those of quantized weights x bits / 32",
        "learned",
        input_size=(64, 64),
    ),
    # Qin et al., NeurIPS 2023: by the rule of the text, and as the figures of the table come about.
    "quantsr": Convention(
        "(MACs + additions of biases in convolutions) x weight bits / 32, without products of two activations",
        "of the layers that run, weights x bits / 32, and biases of float ones; no ranges",
        **_QUANTSR,
    ),
    "quantsr-printed": Convention(
        "(MACs + additions of biases in convolutions) x weight bits / 32, but 1 / 128 for 2 bits; without products of "
        "two activations",
        "of the layers that run, weights x bits / 32, but 1 / 128 for 2 bits, and biases of float ones; no ranges",
        **_QUANTSR,
        shares={2: 1 / 128},
    ),
}


@dataclass(frozen=True)
class SiteCost:
    """One layer, or the plain matrix products and convolutions in one module's own forward.

    Attributes:
        name: Dotted module name; ``(network)`` for expressions in the network's own forward.
        kind: Class of the float module; ``expression`` for plain expressions.
        macs: Multiply-accumulates for one image.
        weight_bits: Bits of the weight; of the right operand in a matrix product.
        act_bits: Bits of the input; a mean over images where a policy chooses, ``None`` if it has not yet.
        parameters: Numbers in weight and bias.
        storage_bits: Weight (packed), bias, and what its own quantizers store.
        quantized: Whether weight or input has fewer than 32 bits, or bits that a policy chooses.
        in_fab: Whether the place that quantizes its input counts in FAB.
        weights: Numbers in the weight alone; 0 for products of two activations.
        conv_biases: Additions of a bias, in a convolution.
        norm_values: Values of its result that go right into a batch norm.
    """

    name: str
    kind: str
    macs: int
    weight_bits: float | None
    act_bits: float | None
    parameters: int
    storage_bits: int
    quantized: bool
    in_fab: bool
    weights: int = 0
    conv_biases: int = 0
    norm_values: int = 0


@dataclass(frozen=True)
class ComplexityReport:
    """Costs of one network for one image of one size.

    What depends on bits that a policy chooses is ``None`` as long as there is no record of them.

    Attributes:
        network: Class of the float network.
        method: Recipe and bits, or ``float``.
        input_size: Low-resolution (height, width) the MACs and BitOPs are for.
        convention: Key of :data:`CONVENTIONS` that ``bitops`` and ``scaled_parameters`` follow.
        fab: Mean bits over the counted activation places that ran; 32 for a float network.
        weighted_fab: The same, each place weighted by the MACs of the layers it feeds; ``fab`` if they feed none.
        bitops: Operations by the convention.
        bitops_quantized: Those of the quantized layers alone.
        macs: Multiply-accumulates of all layers.
        parameters: Numbers a float model learns, quantizers left out.
        storage_bits: Size of a stored model with its weights packed; see :mod:`qsr_plugin.report.storage`.
        float_storage_bits: The same for the float network.
        scaled_parameters: How many numbers of 32 bits the parameters amount to by the convention: ``Params`` of papers.
        sites: One row per layer that ran, in module order.
        overhead: Float operations that quantizers spend at run time on ranges they take from the image; not part of
            ``bitops``. The ``cadyq`` convention counts a float operation as one, so there the two may be added.
        policy_ops: Float operations that bit policies spend on choosing, counted like ``overhead``.
        patches: How the image is cut; ``None`` if it runs whole.
        blocks: How many of the blocks that can be left out ran, and how many are stored; ``None`` without such.
    """

    network: str
    method: str
    input_size: tuple[int, int]
    convention: str
    fab: float | None
    weighted_fab: float | None
    bitops: float | None
    bitops_quantized: float | None
    macs: int
    parameters: int
    storage_bits: int
    float_storage_bits: int
    scaled_parameters: float
    sites: tuple[SiteCost, ...]
    overhead: int = 0
    blocks: tuple[int, int] | None = None
    policy_ops: int = 0
    patches: PatchOptions | None = None

    @property
    def quantized_share(self) -> float:
        """Part of the MACs that quantized layers do, 0 to 1; 0 of a network without any."""
        return sum(row.macs for row in self.sites if row.quantized) / self.macs if self.macs else 0.0

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; the convention is spelt out as ``convention_text``, the patches as ``protocol``."""
        texts = {"convention_text": CONVENTIONS[self.convention].stated, "protocol": protocol(self.patches)}
        return {**asdict(self), **texts, "patches": self.patches and self.patches.to_dict()}
