"""What a complexity report says: one row per layer, and the totals of a network."""

from __future__ import annotations

from dataclasses import asdict, dataclass

from qsr_plugin.data.patches import PatchOptions, protocol

#: LR size (height, width) of 1280x720 at scale 4, the size the papers count at.
DEFAULT_SIZE = (180, 320)


@dataclass(frozen=True)
class Convention:
    """One way of counting bit operations.

    Attributes:
        text: What is summed, for the reader of a report.
        factor: Times MACs x weight bits x activation bits.
        float_layers: Whether layers without quantization take part, as 32 x 32.
    """

    text: str
    factor: float
    float_layers: bool


#: Ways to count BitOPs. Figures of two conventions must not be compared; for one set of layers they differ by 512.
CONVENTIONS = {
    "macs-bits": Convention("MACs x weight bits x activation bits, all layers, float ones as 32 x 32", 1.0, True),
    # Hong et al., ECCV 2022: scaled so that a 32-bit network has as many BitOPs as FLOPs.
    "cadyq": Convention("2 x MACs x weight bits / 32 x activation bits / 32, quantized layers only", 2 / 1024, False),
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


@dataclass(frozen=True)
class ComplexityReport:
    """Costs of one network for one image of one size.

    What depends on bits that a policy chooses is ``None`` as long as there is no record of them.

    Attributes:
        network: Class of the float network.
        method: Recipe and bits, or ``float``.
        input_size: Low-resolution (height, width) the MACs and BitOPs are for.
        convention: Key of :data:`CONVENTIONS` that ``bitops`` follows.
        fab: Mean bits over the counted activation places that ran; 32 for a float network.
        weighted_fab: The same, each place weighted by the MACs of the layers it feeds; ``fab`` if they feed none.
        bitops: Bit operations by the convention.
        bitops_quantized: Those of the quantized layers alone.
        macs: Multiply-accumulates of all layers.
        parameters: Numbers a float model learns, quantizers left out.
        storage_bits: Size of a stored model with its weights packed; see :mod:`qsr_plugin.report.storage`.
        float_storage_bits: The same for the float network.
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
    sites: tuple[SiteCost, ...]
    overhead: int = 0
    blocks: tuple[int, int] | None = None
    policy_ops: int = 0
    patches: PatchOptions | None = None

    def to_dict(self) -> dict[str, object]:
        """Plain data for JSON; the convention is spelt out as ``convention_text``, the patches as ``protocol``."""
        texts = {"convention_text": CONVENTIONS[self.convention].text, "protocol": protocol(self.patches)}
        return {**asdict(self), **texts, "patches": self.patches and self.patches.to_dict()}
