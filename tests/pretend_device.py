"""A second device without hardware: tensors say ``pretend``, their data are on the CPU, and mixing the two fails.

It shows code that makes a tensor on the wrong device, as a GPU would. Values are those of the CPU. A process has it once
:func:`install` was called, and cannot lose it again, so that it is for processes of their own::

    python -m tests.pretend_device recipes BACKBONE [METHOD...]    # what became of each, as JSON
    python -m tests.pretend_device qsr COMMAND...                  # the command line with one more device
"""

from __future__ import annotations

import json
import sys
import traceback
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map

NAME = "pretend"
#: Operations of PyTorch that would look at the strides of a pretend tensor, or would not find their way to its data.
_OWN = (
    "slice.Tensor select.int expand permute transpose.int t unsqueeze squeeze squeeze.dim squeeze.dims split.Tensor "
    "split_with_sizes diagonal unfold constant_pad_nd view unbind.int _reshape_alias quantile "
    "convolution_overrideable convolution_backward_overrideable"
)
#: Operations that take tensors of both devices.
_BOTH = ("copy_", "_to_copy", "_copy_from", "_copy_from_and_resize", "index", "index_put_", "_index_put_impl_")

#: Data by the identity of a pretend tensor's storage, which all its aliases share.
_data: dict[int, Tensor] = {}
_libraries: list[torch.library.Library] = []


def install() -> None:
    """Register the device with PyTorch."""
    from torch.utils.backend_registration import _setup_privateuseone_for_python_backend

    _setup_privateuseone_for_python_backend(NAME)
    getattr(torch, NAME).get_amp_supported_dtype = lambda: [torch.float16]
    everything, aten = torch.library.Library("_", "IMPL"), torch.library.Library("aten", "IMPL")
    everything.fallback(_run, "PrivateUse1")
    for name in _OWN.split():
        packet, _, overload = name.partition(".")
        aten.impl(name, _named(getattr(getattr(torch.ops.aten, packet), overload or "default")), "PrivateUse1")
    _libraries.extend((everything, aten))
    torch.Tensor.__deepcopy__ = _copier(torch.Tensor.__deepcopy__)


def _named(operator: Any) -> Callable[..., Any]:
    return lambda *args, **kwargs: _run(operator, *args, **kwargs)


def _copier(usual: Callable[[Tensor, dict], Tensor]) -> Callable[[Tensor, dict], Tensor]:
    """Pretend tensors have storages without bytes, which cannot be copied."""

    def copy(self: Tensor, memo: dict) -> Tensor:
        if self.device.type != NAME:
            return usual(self, memo)
        if id(self) not in memo:
            memo[id(self)] = self.detach().clone().requires_grad_(self.requires_grad)
        return memo[id(self)]

    return copy


def _pretend(value: Any) -> Any:
    """A tensor of the CPU as one of the device; anything else as it is."""
    if not isinstance(value, Tensor):
        return value
    made = torch._C._acc.create_empty_tensor(tuple(value.shape), value.dtype)
    _data[made.untyped_storage()._cdata] = value
    return made


def _kept(tensor: Tensor) -> Tensor:
    return _data[tensor.untyped_storage()._cdata]


def _real(value: Any, operation: str) -> Any:
    """The data of a pretend tensor; the CPU for the device itself.

    Raises:
        RuntimeError: For a tensor of the CPU with axes, where devices cannot be mixed.
    """
    if isinstance(value, torch.device):
        return torch.device("cpu") if value.type == NAME else value
    if not isinstance(value, Tensor):
        return value
    if value.device.type == NAME:
        data = _kept(value)
        return data if data.shape == value.shape else data.reshape(value.shape)  # an alias of another shape
    if value.dim() and operation not in _BOTH:
        raise RuntimeError(f"{operation}: a tensor {tuple(value.shape)} on the CPU among those on '{NAME}'")
    return value


def _run(operator: Any, *args: Any, **kwargs: Any) -> Any:
    """An operation on the data of its arguments."""
    name = operator._schema.name.partition("::")[2]
    given, options = (tree_map(lambda value: _real(value, name), part) for part in (args, kwargs))
    if name in ("_copy_from", "_copy_from_and_resize"):
        given[1].copy_(given[0])
        return args[1]
    if name == "convolution_overrideable":
        return _pretend(torch.ops.aten.convolution.default(*given))
    if name == "convolution_backward_overrideable":
        *tensors, stride, padding, dilation, transposed, padded, groups, wanted = given
        bias = [tensors[2].shape[1] * groups if transposed else tensors[2].shape[0]]
        rest = (bias, stride, padding, dilation, transposed, padded, groups, wanted)
        return tuple(map(_pretend, torch.ops.aten.convolution_backward.default(*tensors, *rest)))
    if name == "as_strided":  # strides are those of a contiguous tensor, which the data need not be
        given = (given[0].contiguous(), *given[1:])
    if name in ("view", "_unsafe_view", "_reshape_alias") and not isinstance(given[1], torch.dtype):
        return _pretend(given[0].reshape(given[1]))
    found = operator(*given, **options)
    if not any(one.alias_info is not None and one.alias_info.is_write for one in operator._schema.returns):
        return tree_map(_pretend, found)
    written = [
        kwargs[one.name] if one.name in kwargs else args[number]
        for number, one in enumerate(operator._schema.arguments)
        if one.alias_info is not None and one.alias_info.is_write
    ]
    for tensor in written:
        if tensor.device.type == NAME and tensor.shape != (data := _kept(tensor)).shape:
            tensor.data = _pretend(data)  # an empty one was given for the result
    return written[0] if len(operator._schema.returns) == 1 else tuple(written)


# -- recipes on it ----------------------------------------------------------------------------------------------------


def _passed(net: nn.Module, method: str, device: str) -> Tensor:
    """The output of a quantized and calibrated network; copies of it run all stages forward and backward, and are tuned.

    Args:
        net: Float, on the CPU; not changed.
        method: Name of a recipe.
        device: Where all of it takes place.
    """
    from qsr_plugin import calibrate, quantize_model
    from qsr_plugin.models.tuning import tune
    from tests import recipes

    torch.manual_seed(1)
    images, float_net = torch.rand(2, 3, 16, 16), deepcopy(net).to(device)
    recipe = recipes.shipped(method, net)
    made = quantize_model(deepcopy(net), recipe).to(device).eval()
    calibrate(made, [images, images.flip(0) / 2])
    trained = deepcopy(made).train()
    for stage in recipe.stages:
        for part in trained.modules():
            if hasattr(part, "enter_stage"):
                part.enter_stage(stage)
        trained(images.to(device)).abs().mean().backward()
    if recipe.tuning is not None:
        short = recipe.model_copy(
            update={"stages": tuple(one.model_copy(update={"iters": 1}) for one in recipe.stages)}
        )
        tuned = quantize_model(deepcopy(float_net), short).eval()
        calibrate(tuned, images)
        tune(tuned, float_net, images)
    with torch.no_grad():
        return made(images.to(device)).cpu()


def run_recipes(backbone: str, *methods: str) -> dict[str, float | str]:
    """Run recipes, all if none is named, on both devices.

    Returns:
        By recipe the largest difference of the outputs, or what went wrong.
    """
    from qsr_plugin.archs.quant_net_arch import build_backbone

    from tests import recipes
    from tests.backbones import tiny_options

    torch.manual_seed(0)
    net = build_backbone(tiny_options(backbone)).eval()
    found: dict[str, float | str] = {}
    for method in methods or recipes.METHODS:
        try:
            plain, other = (_passed(net, method, device) for device in ("cpu", NAME))
            found[method] = float((plain - other).abs().max())
        except Exception:  # whatever it is, the test says it
            found[method] = traceback.format_exc()
    return found


def main(what: str, *arguments: str) -> None:
    """Install the device, then run recipes or a command."""
    from qsr_plugin import cli, compat

    compat.import_host()
    install()
    if what == "qsr":
        cli.app(arguments)
    else:
        print(json.dumps(run_recipes(*arguments)))


if __name__ == "__main__":
    main(*sys.argv[1:])
