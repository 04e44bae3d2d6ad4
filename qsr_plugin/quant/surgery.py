"""Surgery: a float network and a recipe in, the same network with quantizers at the recipe's places out."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any, Optional, Union

from torch import nn

from qsr_plugin.errors import suggest
from qsr_plugin.quant.depth_surgery import add_depth, depth_keys, find_blocks
from qsr_plugin.quant.policy import BitPolicy, policy_class
from qsr_plugin.quant.quantizer import Quantizer, quantizer_class
from qsr_plugin.quant.recipe import RecipeError, load_recipe, register_parts
from qsr_plugin.quant.record import RecordingRoot, record_root
from qsr_plugin.quant.schema import FLOAT_BITS, QuantizerSpec, Recipe, Rule
from qsr_plugin.quant.sites import Site, all_ports, site_class_for

logger = logging.getLogger("qsr_plugin")

#: Backbone class name -> role -> places, each ``"pattern"`` or ``"pattern:port"``. An empty tuple says that the
#: backbone has no such place, so a rule for it is skipped.
ROLE_TABLES: dict[str, Mapping[str, tuple[str, ...]]] = {}


def register_roles(backbone: str, roles: Mapping[str, tuple[str, ...]]) -> None:
    """Make a backbone's role table known under its class name."""
    ROLE_TABLES[backbone] = roles


def roles_of(net: nn.Module) -> Mapping[str, tuple[str, ...]]:
    """Role table of a network, found by its class name or that of a base class; empty if there is none."""
    register_parts()
    return next((ROLE_TABLES[cls.__name__] for cls in type(net).__mro__ if cls.__name__ in ROLE_TABLES), {})


@dataclass
class Place:
    """One (module, port) pair chosen by rules.

    Attributes:
        name: Dotted module name.
        module: The module itself.
        port: Port name.
        rule: Index of the rule that decided.
        spec: Quantizer to put there, ``None`` to leave it float.
        bits: Bit width, or candidates of the bit policy.
        own_bits: The rule gave its own bits: not adaptive, and left out of FAB.
        pad_first: Quantize the zeros of a convolution's padding together with its input.
    """

    name: str
    module: nn.Module
    port: str
    rule: int
    spec: Optional[QuantizerSpec]
    bits: Union[int, tuple[int, ...]] = FLOAT_BITS
    own_bits: bool = False
    pad_first: bool = False


@dataclass
class _Index:
    """All names of all modules; a module shared in several places has several."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    first: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, net: nn.Module) -> _Index:
        index = cls()
        for name, module in net.named_modules(remove_duplicate=False):
            if name:
                index.modules[name] = module
                index.first.setdefault(id(module), name)
        return index

    def matching(self, pattern: str, kind: Optional[str]) -> Iterator[tuple[str, nn.Module]]:
        regex, seen = _wildcard(pattern), set()
        for name, module in self.modules.items():
            fits = kind is None or kind in {cls.__name__ for cls in type(module).__mro__}
            if fits and regex.fullmatch(name) and id(module) not in seen:
                seen.add(id(module))
                yield self.first[id(module)], module


def _wildcard(pattern: str) -> re.Pattern[str]:
    """``*`` and ``?`` within one dotted part, ``**`` across parts."""
    parts = re.split(r"(\*\*|\*|\?)", pattern)
    table = {"**": ".*", "*": "[^.]*", "?": "[^.]"}
    return re.compile("".join(table.get(part, re.escape(part)) for part in parts))


def find_places(net: nn.Module, recipe: Recipe) -> list[Place]:
    """Which places of a network a recipe quantizes, in the order of the network's modules.

    Raises:
        RecipeError: If a rule matches nothing, names an unknown role or a port the module does not have.
    """
    index, roles = _Index.of(net), roles_of(net)
    chosen: dict[tuple[str, str], Place] = {}
    for number, rule in enumerate(recipe.rules):
        for place in _places_of_rule(index, roles, recipe, rule, number, type(net).__name__):
            key = (place.name, place.port)
            if key in chosen:
                logger.info("%s.%s: rule %d takes the place of rule %d", *key, number, chosen[key].rule)
            chosen[key] = place
    order = {name: position for position, name in enumerate(index.modules)}
    places = [place for place in chosen.values() if place.spec is not None and place.bits != FLOAT_BITS]
    return sorted(places, key=lambda place: order[place.name])


def _places_of_rule(
    index: _Index, roles: Mapping[str, tuple[str, ...]], recipe: Recipe, rule: Rule, number: int, backbone: str
) -> Iterator[Place]:
    where = f"rule {number} of placement '{recipe.placement}' ({rule.role or rule.match})"
    if rule.role is not None:
        if not roles:
            raise RecipeError(
                f"{where}: no role table is registered for {backbone}. "
                f"Known backbones: {', '.join(sorted(ROLE_TABLES))}. Write rules with 'match', or register a table."
            )
        if rule.role not in roles:
            raise RecipeError(f"{where}: {backbone} has no role '{rule.role}'. {suggest(rule.role, roles)}")
        patterns = roles[rule.role]
    else:
        patterns = (rule.match or "",)
    for pattern in patterns:
        pattern, _, port_of_role = pattern.partition(":")
        port, found = rule.port or port_of_role, False
        if not port and not rule.keep_float:
            raise RecipeError(f"{where}: say the port, one of input, weight, output")
        for name, module in index.matching(pattern, rule.type):
            found = True
            for one in [port] if port else all_ports(module):
                yield _place(recipe, rule, number, name, module, one, where)
        if not found:
            kind = f" of type {rule.type}" if rule.type else ""
            near = difflib.get_close_matches(pattern, index.modules, n=5, cutoff=0.4) or list(index.modules)[:5]
            raise RecipeError(f"{where}: '{pattern}'{kind} matches no module of {backbone}. Near: {', '.join(near)}.")


def _place(recipe: Recipe, rule: Rule, number: int, name: str, module: nn.Module, port: str, where: str) -> Place:
    if rule.keep_float:
        return Place(name, module, port, number, None)
    try:
        site_class_for(module, {port})
    except ValueError as error:
        raise RecipeError(f"{where}: {name}: {error}") from None
    weight = port == "weight"
    spec = rule.quantizer or (recipe.quantizers.weight if weight else recipe.quantizers.act)
    bits = rule.bits if rule.bits is not None else (recipe.bits.weight if weight else recipe.bits.act)
    cls, role = quantizer_class(spec.type), "weight" if weight else "act"
    low, high = cls.bits_span
    widths = bits if isinstance(bits, tuple) else (bits,)
    if any(not low <= width <= high for width in widths if width != FLOAT_BITS):
        raise RecipeError(f"{where}: quantizer '{spec.type}' does {low} to {high} bits, asked for {bits}")
    if role not in cls.roles:
        raise RecipeError(f"{where}: quantizer '{spec.type}' is for {', '.join(cls.roles)}, port '{port}' needs {role}")
    if cls.per_channel and not weight and _channels(module, port) is None:
        raise RecipeError(
            f"{where}: quantizer '{spec.type}' has a number per channel, and {name} ({type(module).__name__}) does not "
            f"say how many pass its port '{port}': give it a place at a convolution or linear layer"
        )
    if rule.pad_first and not (port == "input" and isinstance(module, nn.Conv2d)):
        raise RecipeError(f"{where}: pad_first is for the input of a Conv2d, this is port '{port}' of {name}")
    return Place(name, module, port, number, spec, bits, rule.bits is not None, rule.pad_first)


def _channels(module: nn.Module, port: str) -> Optional[int]:
    """How many channels the tensors at a port have, as far as the module or the layers in it say."""
    names = ("out_channels", "out_features") if port == "output" else ("in_channels", "in_features")
    parts = list(module.modules())  # of a block: its first layer tells the input, its last one the output
    parts = parts if port != "output" else [module, *reversed(parts[1:])]
    found = (getattr(part, name, None) for part in parts for name in (*names, "num_features"))
    return next((number for number in found if isinstance(number, int)), None)


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
    blocks = recipe.depth and find_blocks(_Index.of(net), roles_of(net), recipe.depth, places, backbone.__name__)
    ports: dict[str, set[str]] = {}
    for place in places:
        ports.setdefault(place.name, set()).add(place.port)
    prepared = []
    for place in places:
        try:
            site_class = site_class_for(place.module, ports[place.name])
        except ValueError as error:
            raise RecipeError(f"{place.name}: {error}") from None
        prepared.append((place, site_class, *_parts(recipe, place, site_class.channel_axis)))
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
    net.float_class = backbone
    net.recipe = recipe
    return record_root(net)


def _parts(recipe: Recipe, place: Place, channel_axis: int) -> tuple[Quantizer, Optional[BitPolicy]]:
    candidates = place.bits if isinstance(place.bits, tuple) else (place.bits,)
    role = "weight" if place.port == "weight" else "act"
    axis = 0 if role == "weight" else channel_axis
    cls = quantizer_class(place.spec.type)
    extra = {"channels": _channels(place.module, place.port)} if cls.per_channel and role == "act" else {}
    quantizer = cls(cls.Options(**place.spec.extras()), candidates, role, axis, **extra)
    quantizer.counts_in_fab = role == "act" and not place.own_bits
    if role == "weight":
        return quantizer, None
    policy = policy_class("fixed" if len(candidates) == 1 else recipe.policy.type)
    options = {} if len(candidates) == 1 else recipe.policy.extras()
    return quantizer, policy(policy.Options(**options), candidates)


# -- looking at a quantized network ----------------------------------------------------------------------------------


def sites(net: nn.Module) -> Iterator[tuple[str, Site]]:
    """Sites of a network with their dotted names, in module order."""
    return ((name, module) for name, module in net.named_modules() if isinstance(module, Site))


def quantizers(net: nn.Module) -> Iterator[tuple[str, Quantizer]]:
    """Quantizers of a network with their place ``site.port``, in module order."""
    return ((module.site, module) for module in net.modules() if isinstance(module, Quantizer))


def plugin_keys(net: nn.Module) -> set[str]:
    """State-dict keys that quantizing added to those of the float network."""
    parts = [name for name, module in net.named_modules() if isinstance(module, (Quantizer, BitPolicy))]
    return {f"{name}.{key}" for name in parts for key in net.get_submodule(name).state_dict()} | depth_keys(net)


def tap(net: nn.Module, place: str, name: str) -> nn.Module:
    """Have a network write the tensor at a place into its record under ``name`` in every forward.

    Args:
        net: Float or quantized network.
        place: ``module:port`` with port input or output, or a role of the network's backbone that is one such place.
        name: Key in ``net.last_record().taps``.

    Returns:
        ``net``.

    Raises:
        RecipeError: If there is no such module or role.
    """
    index, roles = _Index.of(net), roles_of(net)
    pattern, _, port = (roles[place][0] if roles.get(place) else place).partition(":")
    if pattern not in index.modules or port not in ("input", "output"):
        near = difflib.get_close_matches(pattern, [*roles, *index.modules], n=5, cutoff=0.4)
        raise RecipeError(
            f"cannot tap '{place}' of {getattr(net, 'float_class', type(net)).__name__}: give 'module:input' or "
            f"'module:output', or a role. Near: {', '.join(near) or 'nothing'}."
        )
    module = index.modules[pattern]
    if not isinstance(module, Site):
        site_class_for(module, {port}).from_float(module, pattern)
    module.add_tap(port, name)
    return record_root(net)


__all__ = ["ROLE_TABLES", "Place", "find_places", "plugin_keys", "quantize_model", "quantizers"]
__all__ += ["register_roles", "roles_of", "sites", "tap"]
