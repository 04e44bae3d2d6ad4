"""CADyQ: content-aware dynamic quantization (Hong et al., ECCV 2022, arXiv 2207.10345).

A place holds one PAMS quantizer per candidate bit width and a linear *selector* that chooses one of them for each image
(or patch) from two cheap cues: how strong the gradients of the image are, and how far each channel of the place's input
spreads. Written as a bit policy, it works with any quantizer that can do several bit widths. The losses are
``WeightedBitLoss``, ``SKTLoss`` and ``BlockSKTLoss``; placement and schedule are in the recipe.
"""

from __future__ import annotations

import torch
from pydantic import Field
from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin.quant.image_stats import GRADIENT_OPS, gradient_magnitudes
from qsr_plugin.quant.policy import BitDecision, BitPolicy, choose, register_policy
from qsr_plugin.quant.quantizer import StrictOptions
from qsr_plugin.quant.record import ForwardRecord


class _WideLinear(nn.Linear):
    """In the type of its input, whatever that of the network is: rows of W differ by less than 16 bits resolve."""

    def forward(self, x: Tensor) -> Tensor:
        with torch.autocast(x.device.type, enabled=False):
            return F.linear(x, self.weight.to(x.dtype), self.bias.to(x.dtype))


@register_policy("selector")
class BitSelector(BitPolicy):
    """Bits of each image from ``softmax(W f + b)`` over the candidates, ``f = [g_x, g_y, sigma_1 .. sigma_C]``.

    ``g`` are the mean gradient magnitudes of the low-resolution image times ``gradient_scale``, ``sigma`` the standard
    deviations of the channels of the place's float input. Neither passes a gradient on. The most probable candidate is
    used; its gradient is that of the mixture of all. At first all rows of W are the same and only the last bias is 1,
    so that every image gets the most bits, with the probabilities 0.2119, 0.2119, 0.5761 of three candidates.
    """

    class Options(StrictOptions):
        """Options of :class:`BitSelector`.

        Attributes:
            gradient_scale: Factor of the gradient magnitudes (luminance in 0..1 per pixel). Published is 1000, and 1
                for one network. With 1000 a photo's two are tens each; the deviations they stand beside are from
                hundredths to tens each, by network and place, but as many as there are channels.
        """

        gradient_scale: float = Field(1000.0, gt=0)

    per_channel = True

    def __init__(
        self, options: Options, candidates: tuple[int, ...], channels: int | None = None, channel_axis: int = 1
    ) -> None:
        super().__init__(options, candidates, channels, channel_axis)
        self.linear = _WideLinear(channels + 2, len(candidates))
        with torch.no_grad():
            self.linear.weight.fill_(1.0)
            self.linear.bias.zero_()[-1] = 1.0

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        """Choose bits for each image.

        Args:
            features: ``(M, C, ...)``, or ``(M, ..., C)`` where channels are last; windows of an image are looked at
                together.
            record: Record of the forward, which has the image.

        Raises:
            RuntimeError: Outside of a quantized network's forward.
        """
        if record is None or record.image is None:
            raise RuntimeError(f"{self.place}: bits follow the image: run the whole quantized network, not this part")
        gradients = record.once(_gradients) * self.options.gradient_scale
        wide = torch.promote_types(features.dtype, torch.float32)
        spread = deviations(features.detach().to(wide), record.images, self.channel_axis)
        cues = torch.cat([gradients.to(wide), spread], 1)
        return choose(self.linear(cues).softmax(1), self.candidates)

    def overhead_ops(self, shape: torch.Size) -> int:
        """A sum and a sum of squares over the tensor, and the linear layer."""
        return 3 * shape.numel() + 2 * self.linear.weight.numel()

    def shared_ops(self, record: ForwardRecord) -> int:
        """The gradients of the image."""
        return GRADIENT_OPS * record.image[:, 0].numel()


def _gradients(record: ForwardRecord) -> Tensor:
    return gradient_magnitudes(record.image)


def deviations(x: Tensor, images: int, channel_axis: int) -> Tensor:
    """Standard deviation of every channel over all positions of an image.

    Two plain passes: on a CPU the library's own reduction takes ten times as long.

    Args:
        x: ``(M, C, ...)`` or ``(M, ..., C)``, M a multiple of the number of images, image after image.
        images: Number of images N.
        channel_axis: 1 or -1.

    Returns:
        ``(N, C)``, unbiased; 0 where there is only one position.
    """
    x = x.unflatten(0, (images, -1))
    channel = 2 if channel_axis == 1 else x.dim() - 1
    positions = [axis for axis in range(1, x.dim()) if axis != channel]
    count = x[0].numel() // x.shape[channel]
    squares = (x - x.mean(positions, keepdim=True)).square_()
    return (squares.sum(positions) / max(count - 1, 1)).sqrt_()
