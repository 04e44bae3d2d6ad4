"""Surgery: a float network and a recipe in, the same network with quantizers at the recipe's places out."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any, Optional, Union

from torch import Tensor, nn

from qsr_plugin.quant.depth_surgery import add_depth, depth_keys, find_blocks
from qsr_plugin.quant.places import Index, Place, channels_at, find_places, places_named, roles_of
from qsr_plugin.quant.policy import BitPolicy, NetworkPolicy, PolicyPart, policy_class
from qsr_plugin.quant.quantizer import Quantizer, quantizer_class
from qsr_plugin.quant.recipe import RecipeError, load_recipe
from qsr_plugin.quant.record import RecordingRoot, record_root
from qsr_plugin.quant.schema import Recipe
from qsr_plugin.quant.sites import Site, site_class_for


def quantize_model(net: nn.Module, recipe: Union[Recipe, str, Mapping[str, Any]]) -> nn.Module:
    """Put a recipe's quantizers into a float network, in place.

    Float parameters keep their keys and values, the network still takes and returns one image tensor. Ranges are not
    set yet: call :func:`qsr_plugin.calibrate` next, or load a quantized checkpoint.

    Args:
        net: Float network. Modules at the recipe's places change their class; nothing is copied.
        recipe: A recipe, or what :func:`load_recipe` takes.

    Returns:
        ``net``, with ``last_record()`` and the attribute ``recipe``.

    Raises:
        RecipeError: If the recipe does not fit the network.
        RuntimeError: If the network is quantized or tapped already.
    """
    if getattr(net, "recipe", None) is not None:
        raise RuntimeError(
            f"{net.float_class.__name__} is already quantized with '{net.recipe.method}': build a fresh float "
            "network, load its weights and quantize that"
        )
    if isinstance(net, RecordingRoot):
        raise RuntimeError(f"{type(net).__name__} has taps already: quantize the network first, then tap it")
    recipe = recipe if isinstance(recipe, Recipe) else load_recipe(recipe)
    backbone = type(net)
    places = find_places(net, recipe)
    blocks = recipe.depth and find_blocks(Index.of(net), roles_of(net), recipe.depth, places, backbone.__name__)
    ports: dict[str, set[str]] = {}
    for place in places:
        ports.setdefault(place.name, set()).add(place.port)
    prepared = []
    for place in places:
        if isinstance(place.module, nn.Sequential):
            raise RecipeError(
                f"{place.name} is a Sequential, which runs all its children, so its quantizer would be one more layer: "
                f"match a module in it, e.g. '{place.name}.0'"
            )
        try:
            site_class = site_class_for(place.module, ports[place.name])
        except ValueError as error:
            raise RecipeError(f"{place.name}: {error}") from None
        prepared.append((place, site_class, *_parts(recipe, place, site_class.channel_axis)))
    shared = _network_policy(net, {f"{place.name}.{place.port}": policy for place, _, _, policy in prepared if policy})
    device = next((parameter.device for parameter in net.parameters()), None)
    for place, site_class, quantizer, policy in prepared:  # nothing fails from here on
        if not isinstance(place.module, Site):
            site_class.from_float(place.module, place.name)
        place.module.add_quantizer(place.port, quantizer.to(device), policy if policy is None else policy.to(device))
        place.module.train(place.module.training)  # the new parts as well
        if place.pad_first:
            place.module.pad_first = True
    if blocks:
        add_depth(net, blocks, recipe.depth.kept)
    if shared is not None:
        for spot in shared.taps:
            _tap(net, spot, spot)
        net.bit_policy = shared.to(device).train(net.training)
    net.float_class = backbone
    net.recipe = recipe
    return record_root(net)


def _parts(recipe: Recipe, place: Place, channel_axis: int) -> tuple[Quantizer, Optional[BitPolicy]]:
    candidates = place.bits if isinstance(place.bits, tuple) else (place.bits,)
    role = "weight" if place.port == "weight" else "act"
    if role == "weight":  # of transposed convolutions it is (in, out / groups, ...)
        axis = 1 if isinstance(place.module, nn.modules.conv._ConvTransposeNd) else 0
        channels = place.module.weight.shape[axis]
    else:
        axis, channels = channel_axis, channels_at(place.module, place.port)
    cls = quantizer_class(place.spec.type)
    extra = {"channels": channels} if role in cls.per_channel else {}
    quantizer = cls(cls.Options(**place.spec.extras()), candidates, role, axis, **extra)
    quantizer.counts_in_fab = role == "act" and not place.own_bits
    if role == "weight":
        return quantizer, None
    policy = policy_class("fixed" if len(candidates) == 1 else recipe.policy.type)
    if policy.per_channel and channels is None:
        raise RecipeError(
            f"{place.name}.{place.port}: policy '{recipe.policy.type}' has a number per channel, and "
            f"{type(place.module).__name__} does not say how many pass there: give this place bits of its own"
        )
    options = {} if len(candidates) == 1 else recipe.policy.extras()
    return quantizer, policy(policy.Options(**options), candidates, channels, axis)


def _network_policy(net: nn.Module, policies: Mapping[str, BitPolicy]) -> Optional[NetworkPolicy]:
    """What the policies of all places (name to policy) share, if they share anything."""
    asking = {place: policy for place, policy in policies.items() if policy.network is not None}
    if not asking:
        return None
    first = next(iter(asking.values()))
    tapped = [places_named(net, spot)[0] for spot in first.network.taps]
    channels = tuple(channels_at(module, port) for _, module, port in tapped)
    return first.network(first.options, first.candidates, tuple(asking), channels)


# -- looking at a quantized network ----------------------------------------------------------------------------------


def sites(net: nn.Module) -> Iterator[tuple[str, Site]]:
    """Sites of a network with their dotted names, in module order."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, Site))


def quantizers(net: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Quantizers of a network with their place ``site.port``, in module order."""
    return ((module.site, module) for module in net.modules() if isinstance(module, Quantizer))


def policies(net: nn.Module) -> Iterator[tuple[str, BitPolicy]]:
    """Bit policies of a network with their place ``site.port``, in module order."""
    return ((module.place, module) for module in net.modules() if isinstance(module, BitPolicy))


def plugin_keys(net: nn.Module) -> set[str]:
    """State-dict keys that quantizing added to those of the float network."""
    parts = [name for name, module in net.named_modules() if isinstance(module, (Quantizer, PolicyPart))]
    return {f"{name}.{key}" for name in parts for key in net.get_submodule(name).state_dict()} | depth_keys(net)


def rebuilt_buffers(net: nn.Module) -> frozenset[str]:
    """Names of buffers that building a network makes anew: files may lack them, and sizes do not count them.

    They are those in the attribute ``rebuilt_buffers`` of the network and of modules in it, as seen from there.
    """
    parts = ((name, getattr(part, "rebuilt_buffers", ())) for name, part in net.named_modules())
    return frozenset(f"{name}.{key}" if name else key for name, keys in parts for key in keys)


def persistent_state(net: nn.Module) -> dict[str, Tensor]:
    """State dict of a network without its :func:`rebuilt_buffers`."""
    rebuilt = rebuilt_buffers(net)
    return {key: value for key, value in net.state_dict().items() if key not in rebuilt}


def with_rebuilt(net: nn.Module, state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with the :func:`rebuilt_buffers` of a network that it lacks."""
    own = net.state_dict()
    return {**{key: own[key] for key in rebuilt_buffers(net) if key in own}, **state}


def tap(net: nn.Module, place: str, name: str) -> nn.Module:
    """Have a network write the tensors at a place into its record under ``name`` in every forward.

    Args:
        net: Float or quantized network.
        place: ``module:port`` with port input or output and wildcards allowed, a role of the network's backbone that
            says the port, or ``role:port``.
        name: Key in ``net.last_record().taps``; with several modules ``name[0]``, ``name[1]``, ...

    Returns:
        ``net``.

    Raises:
        RecipeError: If there is no such module or role.
    """
    _tap(net, place, name)
    return record_root(net)


def _tap(net: nn.Module, place: str, name: str) -> None:
    found = places_named(net, place)
    for index, (path, module, port) in enumerate(found):
        if not isinstance(module, Site):
            site_class_for(module, {port}).from_float(module, path)
        module.add_tap(port, name if len(found) == 1 else f"{name}[{index}]")
