"""Result files: one JSON object in the form of :mod:`qsr_plugin.report.result_schema`.

``schema`` says that it is a result file, and of which version; the rest is a :class:`Result`, or with ``rows`` a
:class:`ResultTable`. Every command writes its results here, and whatever uses them reads them here. Infinity and NaN
are the strings ``inf`` and ``nan``.

Unknown keys are refused, so the version rises with every change of the keys, also when one is added that may be left
out.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeVar, Union

from pydantic import ValidationError

from qsr_plugin import __version__
from qsr_plugin.errors import UserError
from qsr_plugin.quant.explain import explain
from qsr_plugin.report.result_schema import Result, ResultTable

#: What ``schema`` says in every result file.
SCHEMA, VERSION = "qsr-results", 1

_OTHER_VERSION = f"Written by another version of qsr_plugin? This is {__version__}: make the results again with it"

Document = TypeVar("Document", Result, ResultTable)


class ResultError(UserError, ValueError):
    """A result file that cannot be used; the message names the file, what is wrong, and what to do."""


class NoResultFile(ResultError):
    """A JSON file that holds something else."""


def write_results(document: Union[Result, ResultTable], path: str | Path) -> None:
    """Write a result file, whole or not at all.

    Raises:
        OSError: If it cannot be written.
    """
    from qsr_plugin.report.tables import write_json

    write_json({"schema": {"name": SCHEMA, "version": VERSION}, **document.model_dump()}, path)


def read_results(path: str | Path) -> list[Result]:
    """All networks of a result file, each after the float one it was made from.

    Raises:
        ResultError: If the file is missing, no JSON, no result file, of a newer version, or against the schema.
    """
    data = _opened(path)
    results = _as(ResultTable, data, path).rows if "rows" in data else [_as(Result, data, path)]
    return [one for result in results for one in (result.reference, result) if one is not None]


def read_table(path: str | Path) -> ResultTable:
    """A result file with several networks; errors as in :func:`read_results`."""
    return _as(ResultTable, _opened(path), path)


def _opened(path: str | Path) -> dict[str, Any]:
    """What is in a file of this version, without its ``schema``."""
    try:
        data = json.loads(Path(path).read_text("utf-8"))
    except OSError as error:
        raise ResultError(f"{path} cannot be read ({error.strerror}): give a JSON file with results") from None
    except ValueError as error:
        raise ResultError(f"{path} is no JSON ({error}): give a file that a command wrote with its results") from None
    schema = data.pop("schema", None) if isinstance(data, dict) else None
    if not isinstance(schema, Mapping) or schema.get("name") != SCHEMA:
        found = (
            f"the keys {', '.join(list(data)[:8]) or '(none)'}" if isinstance(data, Mapping) else type(data).__name__
        )
        raise NoResultFile(
            f"{path} is no result file: expected schema '{SCHEMA}', found {found}. Files of qsr_plugin before this "
            "schema are not read: make the results again"
        )
    number = schema.get("version")
    if number != VERSION:
        newer = isinstance(number, int) and number > VERSION
        remedy = "update qsr_plugin" if newer else "make the results again"
        reads = f"qsr_plugin {__version__} reads version {VERSION}"
        raise ResultError(f"{path} has results of schema version {number!r}, {reads}: {remedy}")
    return data


def _as(kind: type[Document], data: dict[str, Any], path: str | Path) -> Document:
    try:
        return kind.model_validate(data)
    except ValidationError as error:
        unknown = any(item["type"] == "extra_forbidden" for item in error.errors(include_url=False))
        told = f"{path}: {explain(error, kind, data, 'results')}"
        raise ResultError(f"{told} {_OTHER_VERSION}" if unknown else told) from None
