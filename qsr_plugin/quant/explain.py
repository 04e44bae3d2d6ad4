"""Validation errors as sentences: the key's path, what is wrong, and near names for unknown keys."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping
from typing import Any, Union, get_args

from pydantic import BaseModel, ValidationError

from qsr_plugin.errors import suggest


def explain(error: ValidationError, model: type[BaseModel], data: Any, root: str = "recipe") -> str:
    """One line per problem.

    Args:
        error: What pydantic raised.
        model: The model that refused. A class below it may have ``options_model(value)``: the model of further keys.
        data: What it refused.
        root: What paths start with.
    """
    lines = []
    for item in error.errors(include_url=False):
        where = root + "".join(f"[{p}]" if isinstance(p, int) else f".{p}" for p in item["loc"])
        if item["type"] == "extra_forbidden":
            lines.append(
                f"{where}: unknown key. {suggest(str(item['loc'][-1]), _fields_at(model, data, item['loc'][:-1]))}"
            )
        elif item["type"] == "missing":
            lines.append(f"{where}: required, but not given")
        else:
            message = re.sub(r"^Value error, ", "", item["msg"])
            said = "Allowed" in message or repr(item["input"]) in message or isinstance(item["input"], Mapping)
            lines.append(f"{where}: {message}" + ("" if said else f" (got {item['input']!r})"))
    return "\n".join(lines)


def _fields_at(model: type[BaseModel], data: Any, loc: tuple[Union[int, str], ...]) -> list[str]:
    """Field names of the model at a location, to suggest from."""
    for part in loc:
        data = data[part]
        if part in model.model_fields:
            model = next(_models_in(model.model_fields[part].annotation), model)
            if hasattr(model, "options_model") and isinstance(data, Mapping) and "type" in data:
                model = model.options_model(data)
    return list(model.model_fields)


def _models_in(annotation: object) -> Iterator[type[BaseModel]]:
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        yield annotation
    for argument in get_args(annotation):
        yield from _models_in(argument)
