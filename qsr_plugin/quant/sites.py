"""Sites: modules that carry quantizers at named ports.

A module becomes a site by swapping its class for a subclass that adds :class:`Site`; parameters, hooks and state-dict
keys stay as they are, and a site's quantizers are child modules named ``<port>_quantizer``. ``Conv2d`` and ``Linear``
get the ordinary classes below; every other module gets a generated subclass whose own forward is untouched.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import ClassVar

from torch import Tensor, nn
from torch.nn import functional as F

from qsr_plugin.quant.policy import EXPECTED_BITS, BitPolicy, quantize_with
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.record import current_record, fitting_on, quantizes
from qsr_plugin.quant.visits import visited, watched

_DERIVED: dict[tuple[type, type], type] = {}


def derived_class(mixin: type, base: type) -> type:
    """The class ``mixin`` over ``base``, made once per pair and named after both."""
    key = (mixin, base)
    if key not in _DERIVED:
        _DERIVED[key] = type(f"{mixin.__name__}{base.__name__}", (mixin, base), {"__module__": base.__module__})
    return _DERIVED[key]


class Site:
    """Mixin of all sites.

    Attributes:
        site_name: Dotted name in the network.
        ports: Ports this class can quantize.
        read_ports: Ports whose tensor is only read afterwards, never changed in place.
        channel_axis: Axis of the channels in its activations: 1 for NCHW, -1 for NLC.
    """

    ports: ClassVar[tuple[str, ...]] = ("input", "output")
    read_ports: ClassVar[tuple[str, ...]] = ()
    channel_axis: ClassVar[int] = 1
    site_name: str

    def add_quantizer(self, port: str, quantizer: Quantizer, policy: BitPolicy | None) -> None:
        """Put a quantizer (and, for activations, its bit policy) at a port."""
        quantizer.site = f"{self.site_name}.{port}"
        quantizer.only_read = port in (*self.read_ports, "weight")
        self.add_module(f"{port}_quantizer", quantizer)
        if policy is not None:
            policy.place = quantizer.site
            self.add_module(f"{port}_policy", policy)

    def add_tap(self, port: str, name: str) -> None:
        """Write the tensor at ``port`` into the record under ``name`` in every forward."""
        names = self.__dict__.setdefault("_taps", {}).setdefault(port, [])
        if name not in names:
            names.append(name)

    def quantizer(self, port: str) -> Quantizer | None:
        """The quantizer at a port, or ``None``."""
        return self._modules.get(f"{port}_quantizer")

    def at_port(self, port: str, x: Tensor, operand: str = "") -> Tensor:
        """Pass an activation through a port: tap it, quantize it, record its bits.

        Windows that are folded into the batch, image after image, are quantized together: statistics of an image, where
        a quantizer or policy takes some, are those of all its windows.

        Args:
            port: Name of the port.
            x: The activation.
            operand: Tells apart the tensors of a port that several pass through.
        """
        record = current_record()
        taps = self.__dict__.get("_taps")
        if taps and port in taps and record is not None:
            record.taps.update((name, x) for name in taps[port])
            if port not in self.read_ports:
                x = x.clone()  # what comes next may work in place
        quantizer = self._modules.get(f"{port}_quantizer")
        if quantizer is None:
            return x
        policy = self._modules[f"{port}_policy"]
        known = policy.seen if record is None else record
        whole = x if self.channel_axis == 1 or known is None else _by_image(x, known.images)
        if not quantizes(quantizer.site):
            if watched():
                quantizer.observe(whole)
                policy.observe(whole)
            visited(quantizer.site)
            return x
        if fitting_on():
            quantizer.fit(whole, policy.usual_bits())
        decision = policy.decide(whole, known)
        if record is not None:
            policy.seen = record
            record.bits[quantizer.site] = decision.bits
            if decision.expected is not None:
                record.signal(EXPECTED_BITS, quantizer.site, decision.expected)
        out = quantize_with(quantizer, whole, decision)
        keep = record is not None and record.keep_pairs
        if keep:
            record.pairs[quantizer.site + operand] = (whole, out)
        out = out if whole is x else out.flatten(0, 1)
        return out.clone() if keep and port not in self.read_ports else out  # what comes next may work in place

    def quantized_weight(self) -> Tensor:
        """The weight as the layer uses it: quantized if the port has a quantizer, else the float master weight."""
        quantizer = self._modules.get("weight_quantizer")
        if quantizer is None or not quantizes(quantizer.site):
            return self.weight
        out, record = quantizer(self.weight), current_record()
        if record is not None and record.keep_pairs:
            record.pairs[quantizer.site] = (self.weight, out)
        return out

    @classmethod
    def channels_of(cls, module: nn.Module) -> Mapping[str, int]:
        """Port to channels of a float module, for ports where none of its layers tells."""
        return {}

    @classmethod
    def from_float(cls, module: nn.Module, name: str = "") -> nn.Module:
        """Turn a float module into a site of this class, in place, keeping parameters, hooks and keys.

        Args:
            module: Instance of the float class this site class is derived from.
            name: Dotted name in the network, for messages and records.

        Returns:
            The same object.
        """
        module.__class__ = cls
        module.site_name = name
        return module


def _by_image(x: Tensor, images: int) -> Tensor:
    """(N * windows, ..., C) as (N, windows, ..., C); ``x`` itself where the batch is the images, or no multiple."""
    return x if x.shape[0] == images or x.shape[0] % images else x.unflatten(0, (images, -1))


class QuantConv2d(Site, nn.Conv2d):
    """``nn.Conv2d`` with ports input, weight and output. All strides, groups, dilations and padding modes work."""

    ports = ("input", "weight", "output")
    read_ports = ("input",)
    #: Pad the input before it is quantized, so that the zeros of the padding go through the quantizer as well.
    pad_first: bool = False

    def forward(self, x: Tensor) -> Tensor:
        """Convolve ``x`` (N, C, H, W)."""
        if self.pad_first:
            mode = "constant" if self.padding_mode == "zeros" else self.padding_mode
            x = F.pad(x, self._reversed_padding_repeated_twice, mode=mode)
            x, weight = self.at_port("input", x), self.quantized_weight()
            out = F.conv2d(x, weight, self.bias, self.stride, 0, self.dilation, self.groups)
        else:
            out = self._conv_forward(self.at_port("input", x), self.quantized_weight(), self.bias)
        return self.at_port("output", out)


class QuantLinear(Site, nn.Linear):
    """``nn.Linear`` with ports input, weight and output; channels are the last axis."""

    ports = ("input", "weight", "output")
    read_ports = ("input",)
    channel_axis = -1

    def forward(self, x: Tensor) -> Tensor:
        """Multiply ``x`` (..., C)."""
        x = self.at_port("input", x)
        return self.at_port("output", F.linear(x, self.quantized_weight(), self.bias))


class MatMul(nn.Module):
    """Matrix product as a module, so that its two operands can be quantized (attention)."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` for (..., M, K) and (..., K, N)."""
        return left @ right


class QuantMatMul(Site, MatMul):
    """:class:`MatMul` with ports left, right and output; channels are the last axis."""

    ports = ("left", "right", "output")
    read_ports = ("left", "right")
    channel_axis = -1

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        """``left @ right`` for (..., M, K) and (..., K, N)."""
        return self.at_port("output", super().forward(self.at_port("left", left), self.at_port("right", right)))


class PortSite(Site):
    """Ports around any module: first argument in, result out, the module's own forward in between."""

    def forward(self, x: Tensor, *args, **kwargs):
        """Run the wrapped class's forward with its input and output passed through the ports."""
        x = self.at_port("input", x)
        return self.at_port("output", super().forward(x, *args, **kwargs))


class WeightedPortSite(PortSite):
    """Ports around a module whose own forward reads ``self.weight`` (transposed or custom convolutions)."""

    ports = ("input", "weight", "output")

    def forward(self, x: Tensor, *args, **kwargs):
        """As :class:`PortSite`; the quantized weight stands in for the parameter while the forward runs."""
        quantizer = self.quantizer("weight")
        if quantizer is None or not quantizes(quantizer.site):
            return super().forward(x, *args, **kwargs)
        self.__dict__["weight"] = self.quantized_weight()  # found before the registered parameter
        try:
            return super().forward(x, *args, **kwargs)
        finally:
            del self.__dict__["weight"]


def all_ports(module: nn.Module) -> tuple[str, ...]:
    """Every port that rules may have asked of a float module, in any combination."""
    registered = _SITE_CLASSES.get(type(module), PortSite)
    return tuple(dict.fromkeys((*WeightedPortSite.ports, *registered.ports)))


def told_channels(module: nn.Module) -> Mapping[str, int]:
    """Port to channels, as a module itself says in its attribute ``port_channels``, or else its site class for it."""
    kind = type(module) if isinstance(module, Site) else _SITE_CLASSES.get(type(module), Site)
    return getattr(module, "port_channels", None) or kind.channels_of(module)


_SITE_CLASSES: dict[type, type[Site]] = {nn.Conv2d: QuantConv2d, nn.Linear: QuantLinear, MatMul: QuantMatMul}


def register_site_class(float_class: type, site_class: type[Site]) -> None:
    """Use ``site_class``, a subclass of both Site and ``float_class``, for exact instances of ``float_class``.

    Raises:
        TypeError: If it is not.
    """
    if not (issubclass(site_class, Site) and issubclass(site_class, float_class)):
        raise TypeError(f"{site_class.__name__} must derive from Site and {float_class.__name__}, in this order")
    _SITE_CLASSES[float_class] = site_class


def site_class_for(module: nn.Module, ports: set[str]) -> type[Site]:
    """The site class that gives ``module`` the ports asked for.

    A class registered for the exact type is used where it is needed, for its ports or its channel axis; else one is
    generated from the module's type, without touching its forward.

    Args:
        module: Float module.
        ports: Names of the ports needed.

    Raises:
        ValueError: If the module cannot offer one of them.
    """
    kind = type(module)
    if "weight" in ports and isinstance(getattr(kind, "weight", None), property):
        raise ValueError(
            f"the weight of this {kind.__name__} is computed by a property: remove the parametrization first, "
            "torch.nn.utils.parametrize.remove_parametrizations(module, 'weight')"
        )
    generic = PortSite if not isinstance(getattr(module, "weight", None), Tensor) else WeightedPortSite
    chosen = _SITE_CLASSES.get(kind)
    suits = chosen is QuantConv2d or (chosen is not None and chosen.channel_axis != generic.channel_axis)
    if chosen is None or (ports <= set(generic.ports) and not suits):
        chosen = derived_class(generic, kind)
    missing = sorted(ports - set(chosen.ports))
    if missing:
        raise ValueError(
            f"{kind.__name__} has no port '{missing[0]}'. Ports of this module: {', '.join(chosen.ports)}."
        )
    return chosen
