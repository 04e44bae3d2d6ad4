"""The forward record: what one forward pass decided and showed, kept apart from the network's return value.

The outermost forward of a quantized network opens a record in a context variable; sites write into it by their own
name, so running a block twice (activation checkpointing) does not count twice, and threads do not see each other's.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from contextlib import AbstractContextManager, contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, TypeVar

from torch import Tensor, nn
from torch.autograd.graph import saved_tensors_hooks

from qsr_plugin.quant.visits import watched

if TYPE_CHECKING:
    from qsr_plugin.quant.policy import NetworkPolicy

T = TypeVar("T")

_CURRENT: ContextVar[ForwardRecord | None] = ContextVar("qsr_forward_record", default=None)
#: Places that quantize; all of them if ``None``.
_CHOSEN: ContextVar[frozenset[str] | None] = ContextVar("qsr_chosen_places", default=None)
_FITTING: ContextVar[bool] = ContextVar("qsr_fitting", default=False)


def _itself(value: T) -> T:
    return value


@dataclass
class ForwardRecord:
    """Results of one forward pass beside its output.

    Attributes:
        images: Number of images in the batch.
        pixels: Number of low-resolution pixels in it, all images together.
        bits: Site and port name to bit width: an int, or ``(N,)`` one per image.
        keep_pairs: Whether sites are to fill ``pairs``, which holds on to every quantized tensor.
        taps: Name to tapped feature tensor (with graph, for losses).
        pairs: Site and port name to (tensor, quantized tensor), both with graph.
        signals: Kind to site to tensor: what the parts of a method show to its losses.
        image: The low-resolution batch (N, 3, H, W) as the network got it, without graph.
        policy: What the bit policies of the network share, if they share anything.
    """

    images: int
    pixels: int = 0
    keep_pairs: bool = False
    bits: dict[str, int | Tensor] = field(default_factory=dict)
    taps: dict[str, Tensor] = field(default_factory=dict)
    pairs: dict[str, tuple[Tensor, Tensor]] = field(default_factory=dict)
    signals: dict[str, dict[str, Tensor]] = field(default_factory=dict)
    image: Tensor | None = None
    policy: NetworkPolicy | None = None
    _made: dict[Callable, object] = field(default_factory=dict)

    def once(self, make: Callable[[ForwardRecord], T]) -> T:
        """``make(record)``, computed at the first request of this forward and kept for the others, with its graph."""
        if make not in self._made:
            # A block under activation checkpointing that runs again finds it made, so its graph keeps its own tensors.
            with saved_tensors_hooks(_itself, _itself):
                self._made[make] = make(self)
        return self._made[make]

    def tapped(self, name: str) -> list[Tensor]:
        """The tensors of a tap, one for each module it is at, in module order."""
        if name in self.taps:
            return [self.taps[name]]
        return [self.taps[f"{name}[{index}]"] for index in range(sum(key.startswith(f"{name}[") for key in self.taps))]

    def signal(self, kind: str, site: str, value: Tensor) -> None:
        """Show a tensor to the losses."""
        self.signals.setdefault(kind, {})[site] = value

    def __deepcopy__(self, memo: dict) -> ForwardRecord:
        """A copied network starts with an empty record: graph tensors cannot be copied."""
        return ForwardRecord(self.images)


def current_record() -> ForwardRecord | None:
    """The record of the forward pass this code runs in, or ``None`` outside of one."""
    return _CURRENT.get()


def quantizes(place: str) -> bool:
    """Whether the quantizer at a place ``site.port`` is switched on in this context."""
    chosen = _CHOSEN.get()
    return chosen is None or place in chosen


def float_mode_on() -> bool:
    """Whether all quantizers are switched off in this context."""
    return _CHOSEN.get() == frozenset()


def float_mode() -> AbstractContextManager[None]:
    """Run quantized networks as their float originals inside the ``with`` block."""
    return only_places(())


def only_places(places: Collection[str]) -> AbstractContextManager[None]:
    """Inside the ``with`` block only these places quantize; all others hand tensors through as they are.

    Args:
        places: Names ``site.port``, as :func:`qsr_plugin.quant.surgery.quantizers` gives them. Others have no effect.
    """
    return _switched(_CHOSEN, frozenset(places))


def fitting_on() -> bool:
    """Whether quantizers fit their ranges to the tensors they are about to quantize in this context."""
    return _FITTING.get()


def fitting() -> AbstractContextManager[None]:
    """Inside the ``with`` block every quantizer fits its range before it quantizes, one after the other."""
    return _switched(_FITTING, True)


@contextmanager
def _switched(switch: ContextVar[T], value: T) -> Iterator[None]:
    token = switch.set(value)
    try:
        yield
    finally:
        switch.reset(token)


@contextmanager
def evaluating(net: nn.Module) -> Iterator[None]:
    """Evaluation mode inside the ``with`` block, every module's own mode again after it."""
    training = {module: module.training for module in net.modules()}
    net.eval()
    try:
        yield
    finally:
        for module, mode in training.items():  # frozen batch norm layers stay frozen
            module.training = mode


class RecordingRoot:
    """Mixin for the class of a network's root module: its forward opens and keeps the record."""

    _last_record: ForwardRecord | None = None
    #: Set on a network to have its records keep every (tensor, quantized tensor).
    keep_pairs: bool = False

    def forward(self, x: Tensor, *args, **kwargs):
        """Run the network's own forward inside a record (its own, or that of an enclosing network)."""
        if (record := current_record()) is not None:
            self._share_policy(record, x)
            return super().forward(x, *args, **kwargs)
        if self._last_record is not None:  # its tensors hold as much memory as those of the forward to come
            self._last_record.pairs.clear()
            self._last_record.taps.clear()
        pixels = x.shape[0] * x.shape[-2:].numel()
        record = ForwardRecord(images=x.shape[0], pixels=pixels, keep_pairs=self.keep_pairs, image=x.detach())
        self._share_policy(record, x)
        token = _CURRENT.set(record)
        try:
            out = super().forward(x, *args, **kwargs)
        finally:
            _CURRENT.reset(token)
        self._last_record = record
        return out

    def _share_policy(self, record: ForwardRecord, x: Tensor) -> None:
        """Let the record know what the bit policies of this network share, and the image they look at."""
        if getattr(self, "recipe", None) is None:
            return
        record.policy, record.image = self._modules.get("bit_policy"), x.detach()
        if record.policy is not None and float_mode_on() and watched():
            record.policy.observe(record.image)

    def drop_pairs(self) -> None:
        """Let go of the pairs of the last forward, and keep none from now on."""
        self.keep_pairs = False
        if self._last_record is not None:
            self._last_record.pairs.clear()

    def last_record(self) -> ForwardRecord:
        """Record of the last completed forward.

        Raises:
            RuntimeError: If the network has not run yet.
        """
        if self._last_record is None:
            raise RuntimeError("no forward was recorded yet: run the network once, then ask for last_record()")
        return self._last_record


def record_root(net: nn.Module) -> nn.Module:
    """Make ``net`` open a record in its forward; does nothing if it already does. Returns ``net``."""
    from qsr_plugin.quant.sites import derived_class  # the class factory is shared with sites

    if not isinstance(net, RecordingRoot):
        net.__class__ = derived_class(RecordingRoot, type(net))
    return net
