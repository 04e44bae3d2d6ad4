"""Passes that differ from a float pass in a few layers take the results of those before them from it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Collection, Iterator
from contextlib import contextmanager
from functools import partial

from torch import Tensor, nn

from qsr_plugin.memory import free_memory
from qsr_plugin.quant.record import float_mode, only_places
from qsr_plugin.quant.sites import QuantConv2d, QuantLinear, Site
from qsr_plugin.quant.surgery import sites

#: Share of the free memory for results; layers whose result does not fit run again.
KEPT_SHARE = 0.25


class FloatPrefix:
    """Results of the convolutions and linear layers of one batch, in float.

    Until the first layer that quantizes is reached, a pass does what the float pass did, so that its control flow and
    its tensors are the same, bit for bit. Made by :func:`float_prefix`.
    """

    def __init__(self, net: nn.Module) -> None:
        self._net = net
        self._kept: dict[tuple[str, int], Tensor] = {}
        self._room = 0.0
        self._keeping = False
        self._quantized: frozenset[str] = frozenset()
        self._calls: Counter[str] = Counter()
        self._shared = False

    def float_output(self, images: Tensor) -> Tensor:
        """Output for images (N, 3, H, W) with no place quantizing; later calls of :meth:`output` are about these."""
        self._kept.clear()
        self._room = KEPT_SHARE * free_memory(images.device)
        self._keeping = True
        try:
            with float_mode():
                return self._pass(images, frozenset())
        finally:
            self._keeping = False

    def output(self, images: Tensor, places: Collection[str]) -> Tensor:
        """Output for the same images if only some places ``site.port`` quantize."""
        with only_places(places):
            return self._pass(images, frozenset(place.rpartition(".")[0] for place in places))

    def _pass(self, images: Tensor, quantized: frozenset[str]) -> Tensor:
        self._quantized, self._shared = quantized, True
        self._calls.clear()
        return self._net(images)

    def through(self, site: Site, forward: Callable[..., Tensor], *args, **kwargs) -> Tensor:
        """Stands in for the forward of a site."""
        name = site.site_name
        self._shared = self._shared and name not in self._quantized
        if not self._shared or not isinstance(site, (QuantConv2d, QuantLinear)):
            return forward(*args, **kwargs)
        call = name, self._calls[name]
        self._calls[name] += 1
        if not self._keeping and call in self._kept:
            return self._kept[call].clone()  # what comes next may work in place
        result = forward(*args, **kwargs)
        size = result.numel() * result.element_size()
        if self._keeping and size <= self._room:
            self._room -= size
            self._kept[call] = result.clone()
        return result


@contextmanager
def float_prefix(net: nn.Module) -> Iterator[FloatPrefix]:
    """Inside the ``with`` block the network's sites take results from the float pass where they can."""
    prefix, before = FloatPrefix(net), {site: vars(site).get("forward") for _, site in sites(net)}
    for site in before:
        site.forward = partial(prefix.through, site, site.forward)
    try:
        yield prefix
    finally:
        for site, own in before.items():
            del site.forward
            if own is not None:
                site.forward = own
