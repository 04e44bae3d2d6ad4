"""One forward of a network without data: what each module multiplies, and where its operands come from."""

from __future__ import annotations

import copy
from collections import defaultdict
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.modules.conv import _ConvNd
from torch.utils.flop_counter import FlopCounterMode

from qsr_plugin.quant.policy import BitDecision, BitPolicy, PolicyPart
from qsr_plugin.quant.quantizer import Quantizer
from qsr_plugin.quant.record import ForwardRecord
from qsr_plugin.quant.sites import MatMul, Site


@dataclass
class Use:
    """What a module did.

    Attributes:
        macs: Its own MACs.
        conv_biases: Additions of a bias, if it is a convolution.
        norm_values: Values of its result, if it is a convolution, that a batch norm read.
        operands: Per operand, the places its tensors came from (``None``: float).
    """

    macs: int = 0
    conv_biases: int = 0
    norm_values: int = 0
    operands: tuple[set[str | None], set[str | None]] = field(default_factory=lambda: (set(), set()))


class _NoChoice(PolicyPart):
    """Stands in for a policy: runs nothing that would be counted, and notes what it was asked for."""

    seen: ForwardRecord | None = None

    def __init__(self, policy: BitPolicy) -> None:
        super().__init__()
        self.policy, self.shapes = policy, []

    def decide(self, features: Tensor, record: ForwardRecord | None) -> BitDecision:
        self.shapes.append(features.shape)
        return BitDecision(max(self.policy.candidates))


class Probe:
    """A copy of a network that runs without data and counts.

    Attributes:
        overhead: Activation place that ran to the float operations its quantizer spends on ranges.
        policy_ops: Float operations of the bit policies.
    """

    def __init__(self, net: nn.Module) -> None:
        self._probe = _copy_without_data(net)
        self._uses: dict[nn.Module, Use] = defaultdict(Use)
        self._made: dict[int, tuple[Tensor, int, str]] = {}  # keeps the tensors, so that no id is used twice
        self._convolved: dict[int, tuple[Tensor, Use]] = {}
        self._running: list[list[int]] = []  # of every module now running: total at its start, what its children took
        self._counter = FlopCounterMode(display=False)
        self._times = 1
        self.overhead: dict[str, int] = {}
        self.policy_ops = 0
        for module in self._probe.modules():
            module.register_forward_pre_hook(self._before)
            module.register_forward_hook(self._after)

    def run(self, size: tuple[int, int], times: int) -> None:
        """Count one image of (height, width), as if there were so many."""
        self._times = times
        dtype = next((p.dtype for p in self._probe.parameters()), torch.float32)
        with torch.no_grad(), self._counter:
            self._probe(torch.zeros(1, 3, *size, dtype=dtype, device="meta"))
        asked = [part for part in self._probe.modules() if isinstance(part, _NoChoice) and part.shapes]
        self.policy_ops += times * sum(part.policy.overhead_ops(shape) for part in asked for shape in part.shapes)
        adaptive = [part.policy for part in asked if len(part.policy.candidates) > 1]
        self.policy_ops += times * adaptive[0].shared_ops(self._probe.last_record()) if adaptive else 0
        for part in asked:
            part.shapes.clear()

    def uses(self) -> dict[str, Use]:
        """What multiplies, by name in module order."""
        probe, uses = self._probe, self._uses
        inner = {part for m in probe.modules() if isinstance(m, (Quantizer, PolicyPart)) for part in m.modules()}
        return {name: uses[m] for name, m in probe.named_modules() if m not in inner and uses[m].macs}

    def _before(self, module: nn.Module, args: tuple[object, ...]) -> None:
        for operand, port, x in zip(self._uses[module].operands, operand_ports(module), args, strict=False):
            own = module.quantizer(port) if isinstance(module, Site) else None
            source = x if id(x) in self._made else getattr(x, "_base", None)
            tensor, version, place = self._made.get(id(source), (None, None, None))
            operand.add(own.site if own else place if tensor is not None and x._version == version else None)
        self._running.append([self._counter.get_total_flops(), 0])

    def _after(self, module: nn.Module, args: tuple[object, ...], out: object) -> None:
        start, children = self._running.pop()
        spent = self._counter.get_total_flops() - start
        self._uses[module].macs += self._times * (spent - children) // 2
        if self._running:
            self._running[-1][1] += spent
        if isinstance(module, _ConvNd):
            self._uses[module].conv_biases += self._times * out.numel() * (module.bias is not None)
            self._convolved[id(out)] = (out, self._uses[module])
        if isinstance(module, _BatchNorm) and id(args[0]) in self._convolved:
            self._convolved[id(args[0])][1].norm_values += self._times * out.numel()
        if isinstance(module, Quantizer) and module.role == "act":
            self._made[id(out)] = (out, out._version, module.site)
            more = self._times * module.overhead_ops(out.numel())
            self.overhead[module.site] = self.overhead.get(module.site, 0) + more


def _copy_without_data(net: nn.Module) -> nn.Module:
    """A copy on the meta device, in evaluation mode, with its quantizers ready to run and nothing to choose bits."""
    probe = copy.deepcopy(net).to("meta").eval()
    for module in probe.modules():
        plain = {key: value for key, value in vars(module).items() if isinstance(value, Tensor)}
        vars(module).update({key: value.to("meta") for key, value in plain.items()})
        if isinstance(module, Quantizer) and module.needs_calibration:
            module.mark_calibrated()  # what calibration decided is kept; numbers there are none
    for name, policy in [(name, m) for name, m in probe.named_modules() if isinstance(m, BitPolicy)]:
        parent, _, own = name.rpartition(".")
        setattr(probe.get_submodule(parent), own, _NoChoice(policy))
    return probe


def operand_ports(module: nn.Module) -> tuple[str, ...]:
    """Ports of the operands that are activations; none for modules that are no layer themselves."""
    if isinstance(module, MatMul):
        return ("left", "right")
    return ("input",) if isinstance(getattr(module, "weight", None), Tensor) else ()
