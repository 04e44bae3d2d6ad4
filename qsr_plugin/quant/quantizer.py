"""Quantizer base class and the table of quantizers by name.

A quantizer is one module that does fake quantization for one port of one site: ``forward(x) -> x_q``. What it learns
are parameters, what it observes are buffers. Methods register a subclass; everything else finds it by name.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, ClassVar, Literal, Union

import torch
from pydantic import BaseModel, ConfigDict
from torch import Tensor, nn

from qsr_plugin.quant.observers import Observer, Range
from qsr_plugin.quant.ops import at_bits, per_sample
from qsr_plugin.quant.table import Table

if TYPE_CHECKING:
    from qsr_plugin.quant.schema import Stage

logger = logging.getLogger("qsr_plugin")

#: One bit width, one per image ``(N,)``, or ``None`` for the quantizer's own.
Bits = Union[int, Tensor, None]
Role = Literal["act", "weight"]


class NotCalibratedError(RuntimeError):
    """A quantizer was asked to quantize before its range was set."""


@dataclass(frozen=True)
class QParams:
    """Uniform grid of a quantizer at one bit width: ``value = (code - zero_point) * scale``.

    Attributes:
        scale: Distance between levels: a 0-d tensor, or ``(C,)`` for weights with a grid per channel.
        zero_point: Code of 0.0; real-valued where the grid does not contain zero.
        qmin: Smallest code.
        qmax: Largest code.
    """

    scale: Tensor
    zero_point: Tensor
    qmin: int
    qmax: int


class StrictOptions(BaseModel):
    """Options that refuse unknown keys and cannot be changed afterwards."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class Quantizer(nn.Module):
    """Base of all quantizers.

    Args:
        options: The class's own :class:`Options`.
        candidates: Bit widths this quantizer is asked for; one, or several in ascending order for a bit policy.
        role: ``act`` for activations, ``weight`` for weights.
        channel_axis: Axis of the channels in what it will see: 1 for NCHW, -1 for NLC, for weights that of the output.

    Attributes:
        site: Dotted name of the place, for messages; set when the network is quantized.
        counts_in_fab: Whether the feature average bit width counts this place; layers at bits of their own do not.
        bits_span: Smallest and largest bit width this class can do.
        only_read: Whether nobody changes its result in place, so that a backward pass may read it; set with ``site``.
    """

    Options: ClassVar[type[StrictOptions]] = StrictOptions
    bits_span: ClassVar[tuple[int, int]] = (2, 16)
    roles: ClassVar[tuple[Role, ...]] = ("act", "weight")
    #: False for quantizers that take their range from the tensor itself in every forward.
    needs_calibration: ClassVar[bool] = True
    #: How ranges can follow the training batches: a moving average, the mean of all batches, or not at all.
    tracking: ClassVar[Literal["momentum", "mean", None]] = None
    #: Whether there is a gate that can rescale the range for each image.
    gated: ClassVar[bool] = False
    only_read: bool = False
    #: 0-d bool buffers that calibration decides; the mirror ``_<name>`` of each spares forwards to ask the device.
    decisions: ClassVar[tuple[str, ...]] = ()
    #: Roles in which there is a number per channel: the constructor then takes how many as ``channels``.
    per_channel: ClassVar[tuple[Role, ...]] = ()

    calibrated: Tensor

    def __init__(self, options: StrictOptions, candidates: tuple[int, ...], role: Role, channel_axis: int) -> None:
        super().__init__()
        self.options, self.candidates, self.role, self.channel_axis = options, candidates, role, channel_axis
        self.site = ""
        self.counts_in_fab = role == "act"
        self._observer: Observer | None = None
        self._tracking: float | str | None = None
        self._ready = not self.needs_calibration
        if self.needs_calibration:
            self.register_buffer("calibrated", torch.tensor(False))

    def forward(self, x: Tensor, bits: Bits = None) -> Tensor:
        """Fake-quantize ``x``.

        Args:
            x: Float tensor of any shape.
            bits: Bit width: an int, ``(N,)`` one per image, or ``None`` for the only candidate.

        Returns:
            Tensor of the same shape and dtype.

        Raises:
            NotCalibratedError: If the range was never set.
        """
        return self.prepare(x)(x, self.candidates[0] if bits is None and len(self.candidates) == 1 else bits)

    def prepare(self, x: Tensor) -> Callable[[Tensor, int | Tensor], Tensor]:
        """What quantizes ``x`` at any bit width; follows its range first where ranges are tracked.

        Raises:
            NotCalibratedError: If the range was never set.
        """
        if self._tracking is not None and self.training:
            self.track(x, self._tracking)
            return self.quantize_tracked
        if not self._ready:
            raise NotCalibratedError(
                f"not calibrated: {self.site or type(self).__name__}. Run qsr_plugin.calibrate(net, images) before the "
                "first forward, or load a quantized checkpoint."
            )
        return self.quantize

    # -- what a method writes ----------------------------------------------------------------------------------------

    def quantize(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize with a set range; see :meth:`forward`."""
        raise NotImplementedError

    def make_observer(self) -> Observer:
        """A fresh observer for one calibration. Only for classes that need calibration."""
        raise NotImplementedError

    def set_range(self, low: Tensor, high: Tensor) -> None:
        """Turn an observed range (0-d tensors) into this quantizer's parameters."""
        raise NotImplementedError

    def track(self, x: Tensor, momentum: float | str) -> None:
        """Follow the range of the training batches; only called on classes that declare :attr:`tracking`."""
        raise NotImplementedError

    def quantize_tracked(self, x: Tensor, bits: int | Tensor) -> Tensor:
        """Fake-quantize the tensor that :meth:`track` has just seen."""
        return self.quantize(x, bits)

    def fit(self, x: Tensor, bits: int | Tensor) -> None:
        """Fit a range that calibration has set to ``x``, which comes from quantized layers, and to a bit width."""

    @classmethod
    def settle(cls, parts: Sequence[Quantizer]) -> None:
        """Decide what needs all quantizers of this class in a network; called after each calibration."""

    def on_grid(self, x: Tensor) -> Tensor:
        """The tensor that the grid applies to: ``x`` itself, unless something is added to it first."""
        return x

    def idle_parameters(self) -> list[nn.Parameter]:
        """Parameters that take part in nothing, and so must not be trained."""
        return []

    def qparams(self, bits: int | None = None) -> QParams:
        """Grid at one bit width.

        Raises:
            NotImplementedError: If the quantizer is not uniform per tensor, so that no integer engine can run it.
        """
        raise NotImplementedError(f"{type(self).__name__} is not uniform per tensor; it has no scale and zero point")

    def range_parameters(self) -> list[nn.Parameter]:
        """Parameters that take the learning rate of the ``ranges`` group."""
        return []

    def project(self) -> None:
        """Bring range parameters back into the legal set; called after each optimiser step."""

    def extra_storage_bits(self) -> int:
        """Bits that a stored model spends on this quantizer besides the quantized values: 32 per range number."""
        return 32 * sum(p.numel() for p in self.range_parameters())

    def overhead_ops(self, numel: int) -> int:
        """Float operations on a tensor of ``numel`` elements that a range known beforehand would not need."""
        return 0

    # -- calibration -------------------------------------------------------------------------------------------------

    def begin_calibration(self) -> None:
        """Start observing; quantization is off until :meth:`end_calibration`."""
        if self.needs_calibration:
            self._observer = self.make_observer()

    def observe(self, x: Tensor) -> None:
        """Take a tensor into account if a calibration is going on."""
        if self._observer is not None:
            try:
                self._observer.update(x)
            except ValueError as error:
                raise ValueError(f"{self.site}: {error}") from None

    def observed_range(self) -> Range | None:
        """What the calibration going on has seen so far, ``None`` without one.

        Raises:
            RuntimeError: If this site saw no data.
        """
        if self._observer is None:
            return None
        try:
            return self._observer.range()
        except RuntimeError as error:
            raise RuntimeError(f"{self.site}: {error}") from None

    def end_calibration(self, *, keep: bool = True) -> None:
        """Stop observing and set the range from what was seen.

        Args:
            keep: False drops what was seen and leaves the range as it was (a calibration that failed).

        Raises:
            RuntimeError: If this site saw no data.
        """
        found = self.observed_range() if keep else None
        self._observer = None
        if found is None:
            return
        low, high = found
        if bool((high <= low).all()):
            told = "%s: all observed values are %g, so its range fits no others; if there are any, use more images"
            logger.warning(told, self.site, high.max())
        with torch.no_grad():
            self.set_range(low, high)
        self.mark_calibrated()

    def mark_calibrated(self) -> None:
        """Declare the range parameters valid."""
        self.calibrated.fill_(True)
        self._ready = True

    @property
    def is_calibrated(self) -> bool:
        """Whether :meth:`forward` may quantize."""
        return self._ready

    def follow(self, other: Quantizer) -> None:
        """Take over whether ``other`` is calibrated; its tensors are copied by whoever averages them."""
        self._ready = other._ready
        for name in self.decisions:
            setattr(self, f"_{name}", getattr(other, f"_{name}"))

    def enter_stage(self, stage: Stage) -> None:
        """Take on what a stage of the training says about ranges."""
        kind = "mean" if stage.track_ranges == "mean" else "momentum"
        self._tracking = stage.track_ranges if self.tracking == kind else None

    def expand(self, bits: int | Tensor, x: Tensor) -> int | Tensor:
        """Bit widths ready to be broadcast over ``x``: ints stay, ``(N,)`` becomes ``(M, 1, ..., 1)``."""
        return per_sample(bits, x) if isinstance(bits, Tensor) and bits.dim() else bits

    def select(self, values: Tensor, bits: int | Tensor, x: Tensor) -> tuple[Tensor, int | Tensor]:
        """Range of the bit widths (``values`` is 0-d, or has one number per candidate) and the widths, to broadcast."""
        if values.dim():
            self.check_candidate(bits)
            values = at_bits(values, self.candidates, bits)
        return self.expand(values, x), self.expand(bits, x)

    def moving_average(self, old: Tensor, new: Tensor, momentum: float) -> Tensor:
        """``momentum * old + (1 - momentum) * new`` for :meth:`track`; a range that was never set has no past."""
        past = momentum * self.calibrated.float()  # a tensor, so that no device has to be asked
        return past * old + (1.0 - past) * new

    def check_candidate(self, bits: int | Tensor) -> None:
        """Refuse a bit width there is no range for; those in a tensor are not looked at."""
        if isinstance(bits, int) and bits not in self.candidates:
            raise ValueError(f"{self.site}: {bits} bits are not among its candidates {list(self.candidates)}")

    def _load_from_state_dict(self, state_dict, prefix, *args) -> None:
        super()._load_from_state_dict(state_dict, prefix, *args)
        if self.needs_calibration:
            self._ready = bool(self.calibrated)
        for name in self.decisions:
            setattr(self, f"_{name}", bool(getattr(self, name)))

    def extra_repr(self) -> str:
        """Bits and role, for printing a network."""
        return f"bits={'/'.join(map(str, self.candidates))}, role={self.role}"


QUANTIZERS: Table[Quantizer] = Table("quantizer")
register_quantizer = QUANTIZERS.register
quantizer_class = QUANTIZERS.find
