"""Places: which (module, port) pairs of a network the rules of a recipe choose, by role tables and wildcards."""

from __future__ import annotations

import difflib
import logging
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Optional, Union

from torch import nn

from qsr_plugin.errors import suggest
from qsr_plugin.quant.generic_roles import GENERIC_ROLES, generic_roles
from qsr_plugin.quant.quantizer import quantizer_class
from qsr_plugin.quant.recipe import RecipeError, register_parts
from qsr_plugin.quant.schema import FLOAT_BITS, QuantizerSpec, Recipe, Rule
from qsr_plugin.quant.sites import all_ports, site_class_for, told_channels

logger = logging.getLogger("qsr_plugin")

#: Role -> places, each ``"pattern"`` or ``"pattern:port"``. An empty tuple says that the backbone has no such place, so
#: a rule for it is skipped.
RoleTable = Mapping[str, tuple[str, ...]]
_TableOf = Callable[[nn.Module], Optional[RoleTable]]

#: Backbone class name -> its table, or what makes it for a network where constructor arguments decide; ``None`` is for
#: a network that only has the name.
ROLE_TABLES: dict[str, Union[RoleTable, _TableOf]] = {}


def register_roles(backbone: str, roles: Union[RoleTable, _TableOf]) -> None:
    """Make a backbone's role table known under its class name, or what makes the table of a network of this class."""
    ROLE_TABLES[backbone] = roles


def roles_of(net: nn.Module) -> RoleTable:
    """Roles of a network: the table of its class or of a base class, or else what its structure shows.

    The latter takes a forward of a small image, the first time; the network and its copies remember the answer.

    Raises:
        LayerTraceError: If there is no table, and the network takes no small image.
    """
    return guessed_roles(net) if (table := _table_of(net)) is None else table


def guessed_roles(net: nn.Module) -> Optional[RoleTable]:
    """What the structure of a network without a role table shows; ``None`` for one with a table.

    Raises:
        LayerTraceError: If the network takes no small image.
    """
    if _table_of(net) is not None:
        return None
    found = net.__dict__.get("found_roles")
    if found is None or not _names_in(found) <= {name for name, _ in net.named_modules()}:
        found = net.__dict__["found_roles"] = dict(generic_roles(net))
    return found


def _table_of(net: nn.Module) -> Optional[RoleTable]:
    register_parts()
    table = next((ROLE_TABLES[cls.__name__] for cls in type(net).__mro__ if cls.__name__ in ROLE_TABLES), None)
    return table(net) if callable(table) else table


def _names_in(roles: Mapping[str, tuple[str, ...]]) -> set[str]:
    return {place.partition(":")[0] for places in roles.values() for place in places}


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
        own_bits: The rule gave bits that leave this place out of FAB.
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
class Index:
    """All names of all modules; a module shared in several places has several."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    first: dict[int, str] = field(default_factory=dict)

    @classmethod
    def of(cls, net: nn.Module) -> Index:
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
    index, roles = Index.of(net), roles_of(net) if any(rule.role for rule in recipe.rules) else {}
    chosen: dict[tuple[str, str], Place] = {}
    later: dict[tuple[str, str], str] = {}
    for number, rule in enumerate(recipe.rules):
        for place in _places_of_rule(index, roles, recipe, rule, number, type(net).__name__):
            key = (place.name, place.port)
            if key in chosen and rule.match != place.name:
                later[key] = f"{place.name}.{place.port} (rule {number} instead of {chosen[key].rule})"
            chosen[key] = place
    if later:
        logger.info("%d place(s) are decided by a later rule: %s", len(later), ", ".join(list(later.values())[:5]))
    order = {name: position for position, name in enumerate(index.modules)}
    places = [place for place in chosen.values() if place.spec is not None and place.bits != FLOAT_BITS]
    return sorted(places, key=lambda place: order[place.name])


def _places_of_rule(
    index: Index, roles: Mapping[str, tuple[str, ...]], recipe: Recipe, rule: Rule, number: int, backbone: str
) -> Iterator[Place]:
    where = f"rule {number} of placement '{recipe.placement}' ({rule.role or rule.match})"
    if rule.role is not None and rule.role not in roles:
        raise RecipeError(f"{where}: {_no_role(rule.role, roles, recipe, backbone)}")
    patterns = (rule.match or "",) if rule.role is None else roles[rule.role]
    missing = []
    for pattern in patterns:
        pattern, _, port_of_role = pattern.partition(":")
        port, found = rule.port or port_of_role, False
        if not port and not rule.keep_float:
            raise RecipeError(f"{where}: say the port, one of input, weight, output")
        for name, module in index.matching(pattern, rule.type):
            found = True
            for one in [port] if port else all_ports(module):
                yield _place(recipe, rule, number, name, module, one, where)
        missing += [] if found else [pattern]
    if missing and (rule.type is None or len(missing) == len(patterns)):  # the type chooses among a role's modules
        kind = f" of type {rule.type}" if rule.type else ""
        near = difflib.get_close_matches(missing[0], index.modules, n=5, cutoff=0.4) or list(index.modules)[:5]
        raise RecipeError(f"{where}: '{missing[0]}'{kind} matches no module of {backbone}. Near: {', '.join(near)}.")


def _no_role(role: str, roles: Mapping[str, tuple[str, ...]], recipe: Recipe, backbone: str) -> str:
    if not roles:
        return (
            f"{backbone} has no role table, and no convolution or linear layer that a role could be found for. Known "
            f"backbones: {', '.join(sorted(ROLE_TABLES))}. Write rules with 'match', or register a table."
        )
    fitting = [name for name, rules in recipe.placements.items() if {rule.role for rule in rules} <= {*roles, None}]
    instead = f"take a placement it has all roles for ({', '.join(fitting)}), or " if fitting else ""
    return f"{backbone} has no role '{role}'. {suggest(role, roles)} To go on, {instead}write rules with 'match'."


def _place(recipe: Recipe, rule: Rule, number: int, name: str, module: nn.Module, port: str, where: str) -> Place:
    if rule.keep_float:
        return Place(name, module, port, number, None)
    try:
        site_class_for(module, {port})
    except ValueError as error:
        raise RecipeError(f"{where}: {name}: {error}") from None
    weight = port == "weight"
    spec = rule.quantizer or (recipe.quantizers.weight if weight else recipe.quantizers.act)
    chosen = recipe.act_widths if rule.adapt else recipe.bits.act
    bits = rule.bits if rule.bits is not None else (recipe.bits.weight if weight else chosen)
    if not rule.adapt and isinstance(bits, tuple):
        raise RecipeError(f"{where}: adapt: false needs one width, and bits.act is {list(bits)}: give 'bits' instead")
    cls, role = quantizer_class(spec.type), "weight" if weight else "act"
    low, high = cls.bits_span
    widths = bits if isinstance(bits, tuple) else (bits,)
    if any(not low <= width <= high for width in widths if width != FLOAT_BITS):
        raise RecipeError(f"{where}: quantizer '{spec.type}' does {low} to {high} bits, asked for {bits}")
    if role not in cls.roles:
        raise RecipeError(f"{where}: quantizer '{spec.type}' is for {', '.join(cls.roles)}, port '{port}' needs {role}")
    if role in cls.per_channel and not weight and channels_at(module, port) is None:
        raise RecipeError(
            f"{where}: quantizer '{spec.type}' has a number per channel, and {name} ({type(module).__name__}) does not "
            f"say how many pass its port '{port}': give it a place at a convolution or linear layer"
        )
    if rule.pad_first and not (port == "input" and isinstance(module, (nn.Conv2d, nn.ConvTranspose2d, nn.Linear))):
        raise RecipeError(
            f"{where}: pad_first is for the input of a convolution (a linear layer ignores it), and this is port "
            f"'{port}' of {name}"
        )
    pad_first = rule.pad_first and isinstance(module, nn.Conv2d)  # the others add no zeros
    own_bits = rule.bits is not None and not rule.in_fab
    return Place(name, module, port, number, spec, bits, own_bits, pad_first)


def places_named(net: nn.Module, place: str) -> list[tuple[str, nn.Module, str]]:
    """Modules and ports that one string names: ``pattern:port``, a role that says its ports, or ``role:port``.

    Returns:
        (dotted name, module, port) of each, in the order of the network's modules.

    Raises:
        RecipeError: If there is no such module, role, or port input or output.
    """
    role, _, port = place.partition(":")
    index, roles = Index.of(net), _table_of(net)
    if roles is None:
        roles = roles_of(net) if role in GENERIC_ROLES and role not in index.modules else {}
    patterns = roles.get(place) or [f"{pattern.partition(':')[0]}:{port}" for pattern in roles.get(role, ())] or [place]
    found = {
        (name, spot.partition(":")[2]): module
        for spot in patterns
        for name, module in index.matching(spot.partition(":")[0], None)
    }
    if not found or any(port not in ("input", "output") for _, port in found):
        near = difflib.get_close_matches(role, [*(roles or GENERIC_ROLES), *index.modules], n=5, cutoff=0.4)
        raise RecipeError(
            f"cannot tap '{place}' of {getattr(net, 'float_class', type(net)).__name__}: give 'module:input' or "
            f"'module:output', or a role. Near: {', '.join(near) or 'nothing'}."
        )
    order = {name: position for position, name in enumerate(index.modules)}
    return sorted(((name, module, port) for (name, port), module in found.items()), key=lambda one: order[one[0]])


def channels_at(module: nn.Module, port: str) -> Optional[int]:
    """How many channels the tensors at a port have, as far as the module or the layers in it say.

    What :func:`told_channels` says goes before.
    """
    if port in (told := told_channels(module)):
        return told[port]
    names = ("out_channels", "out_features") if port == "output" else ("in_channels", "in_features")
    parts = list(module.modules())  # of a block: its first layer tells the input, its last one the output
    parts = parts if port != "output" else [module, *reversed(parts[1:])]
    found = (getattr(part, name, None) for part in parts for name in (*names, "num_features"))
    return next((number for number in found if isinstance(number, int)), None)
