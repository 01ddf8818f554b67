"""Turns pydantic's errors on a configuration into one line each: key path, what was found and is allowed."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import BaseModel, ValidationError
from pydantic_core import ErrorDetails, PydanticCustomError

KeyPath = tuple[str, ...]
"""Keys from the top of the file, such as `("parallel", "tp_degree")`."""

_MAX_SHOWN = 100
_TYPE_NAMES = {
    bool: "a boolean",
    int: "an integer",
    float: "a number",
    str: "a string",
    dict: "a section",
    list: "a list",
    type(None): "nothing",
}
_SCHEMA_TYPE_NAMES = {"integer": "an integer", "number": "a number", "string": "a string", "null": "null"}
_RANGE_WORDS = {"minimum": ">=", "exclusiveMinimum": ">", "maximum": "<=", "exclusiveMaximum": "<"}


@dataclass(frozen=True)
class Problem:
    """One thing wrong with a configuration."""

    path: KeyPath
    text: str


def refusal(message: str, at: str = "") -> PydanticCustomError:
    """What a validator raises: `at` is the key, relative to the validated section, the problem belongs to."""
    # pydantic formats the template; the message may hold braces of its own, so it goes in as a value
    return PydanticCustomError("refused", "{message}", {"message": message, "at": at})


def problems_of(error: ValidationError, model: type[BaseModel]) -> list[Problem]:
    """Every problem in `error`, in the order of the model's fields."""
    schema = model.model_json_schema()
    problems = [_problem(details, schema) for details in error.errors(include_url=False)]
    return list(dict.fromkeys(problems))  # a key that takes several types has an error for each


def suggestion(word: str, known: Sequence[str]) -> str:
    """`; did you mean X?` for the closest known word, or nothing."""
    close = difflib.get_close_matches(word, known, n=1)
    return f"; did you mean {close[0]}?" if close else ""


def found(value: object) -> str:
    """A value as the user wrote it, with its kind: `"2" (a string)`."""
    if isinstance(value, dict | list) or value is None:
        return _TYPE_NAMES[type(value)]
    shown = json.dumps(value) if isinstance(value, str | bool) else str(value)
    shown = shown if len(shown) <= _MAX_SHOWN else f"{shown[:_MAX_SHOWN]}..."
    return f"{shown} ({_TYPE_NAMES.get(type(value), 'a ' + type(value).__name__)})"


def _problem(details: ErrorDetails, schema: dict[str, object]) -> Problem:
    path = _key_path(details, schema)
    match details["type"]:
        case "refused":
            context = details["ctx"]
            at = tuple(part for part in context["at"].split(".") if part)
            return Problem(path + at, context["message"])
        case "extra_forbidden" | "invalid_key":
            known = list(_node_at(schema, path[:-1]).get("properties", {}))
            hint = suggestion(path[-1], known)
            return Problem(path, f"unknown key{hint or ';'} allowed: {', '.join(known)}")
        case _:
            node = _node_at(schema, path)
            value = details["input"]
            hint = suggestion(value, node.get("enum", [])) if isinstance(value, str) else ""
            return Problem(path, f"found {found(value)}{hint or ';'} allowed: {_allowed(node, schema)}")


def _key_path(details: ErrorDetails, schema: dict[str, object]) -> KeyPath:
    """Where the problem is, without the branches of unions that pydantic adds to it."""
    path = tuple(str(part) for part in details["loc"])
    for length in range(1, len(path)):
        if not {"properties", "items"} & _node_at(schema, path[:length]).keys():
            return path[:length]
    return path


def _node_at(schema: dict[str, object], path: KeyPath) -> dict[str, Any]:
    """The JSON schema of one key, or of a list's item; an optional section is looked through."""
    node: Mapping[str, Any] = schema
    for key in path:
        node = _resolve(node["items"] if "items" in node else node["properties"][key], schema)
        for choice in node.get("anyOf", ()):
            resolved = _resolve(choice, schema)
            if "properties" in resolved:
                node = resolved
    return dict(node)


def _resolve(node: dict[str, Any], schema: dict[str, Any]) -> dict[str, Any]:
    reference = node.get("$ref")
    return schema["$defs"][reference.rsplit("/", 1)[-1]] if reference else node


def _allowed(node: dict[str, Any], schema: dict[str, Any]) -> str:
    """What a key takes, in words, read from its JSON schema."""
    if "anyOf" in node:
        choices = " or ".join(_allowed(_resolve(choice, schema), schema) for choice in node["anyOf"])
        return choices + "".join(f', such as "{example}"' for example in node.get("examples", ()))
    if "enum" in node:
        return f"one of {', '.join(node['enum'])}"
    if "const" in node:
        return str(node["const"])
    if "properties" in node:
        return f"a section with the keys {', '.join(node['properties'])}"
    if "items" in node:
        return f"a list, of which each is {_allowed(_resolve(node['items'], schema), schema)}"
    if node.get("type") == "boolean":
        return "true or false"
    limits = " and ".join(f"{word} {node[key]:g}" for key, word in _RANGE_WORDS.items() if key in node)
    return f"{_SCHEMA_TYPE_NAMES[node['type']]} {limits}".strip()
