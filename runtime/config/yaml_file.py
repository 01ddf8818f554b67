"""Reads a run configuration from YAML; every error names the file, the line and the key path."""

from __future__ import annotations

from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml
from pydantic import ValidationError

from crossdock.runtime.config.bounded_files import printable, read_bounded
from crossdock.runtime.config.problems import KeyPath, Problem, problems_of
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import ConfigError

MAX_YAML_BYTES = 2**16
"""A configuration has a few hundred."""
_MAX_BITS = 128
_MAX_PROBLEMS, _MAX_KEY, _MAX_LINE = 12, 100, 500
_MAP_TAG = "tag:yaml.org,2002:map"
_NULL_TAG = "tag:yaml.org,2002:null"
_SEQUENCE_TAG = "tag:yaml.org,2002:seq"


def load_config(path: Path) -> RunConfig:
    """Read `path`. An empty file is a run with all defaults, on one rank.

    Raises `ConfigError`: one line for each problem, `file:line: key path: what is wrong`.
    """
    document = _Document(path)
    data = document.read()
    if document.problems:
        raise document.error(document.problems)
    try:
        return RunConfig.model_validate(data)
    except ValidationError as error:
        raise document.error(problems_of(error, RunConfig)) from None


def locate(path: Path, key: str) -> str:
    """`file:line` of a key path such as `parallel.tp_degree`, or of the closest section that the file has."""
    document = _Document(path)
    document.read()
    return f"{path}:{document.line_of(tuple(key.split('.')))}"


def config_schema() -> dict[str, Any]:
    """The JSON schema of the file, for editors."""
    schema = {"$schema": "https://json-schema.org/draft/2020-12/schema", **RunConfig.model_json_schema()}
    schema["title"] = "crossdock run configuration"
    return schema


class _Document:
    """One YAML file: its plain data, and the line of every key path.

    PyYAML's own constructor keeps the last of two equal keys and drops the lines; hence this walk over nodes.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.lines: dict[KeyPath, int] = {}
        self.problems: list[Problem] = []
        self._loader = yaml.SafeLoader("")
        self._nodes_left = 0  # each node that is written takes a character; an alias can stand for any number

    def read(self) -> dict[str, Any]:
        """The top-level mapping; `{}` for an empty file."""
        try:
            self._loader = yaml.SafeLoader(self._text())
            root = self._loader.get_single_node()
            if root is None or root.tag == _NULL_TAG:
                return {}
            if not isinstance(root, yaml.MappingNode):
                keys = ", ".join(RunConfig.model_fields)
                line = root.start_mark.line + 1
                raise ConfigError(f"{self.path}:{line}: found {_kind(root)} at the top; allowed: the keys {keys}")
            return self._mapping(root, ())
        except yaml.MarkedYAMLError as error:
            raise ConfigError(f"{self.path}{_line(error)}: not valid YAML: {_reason(error)}") from None
        except yaml.YAMLError as error:
            raise ConfigError(f"{self.path}: not valid YAML: {str(error).splitlines()[0]}") from None
        except RecursionError:
            raise ConfigError(f"{self.path}: not valid YAML: nested too deeply") from None

    def error(self, problems: list[Problem]) -> ConfigError:
        """All problems, by line."""
        located = sorted(((self.line_of(p.path), p) for p in problems), key=lambda pair: pair[0])
        lines = [f"{self.path}:{line}: {'.'.join(p.path)[:_MAX_KEY]}: {p.text[:_MAX_LINE]}" for line, p in located]
        more = len(lines) - _MAX_PROBLEMS
        return ConfigError("\n".join(lines[:_MAX_PROBLEMS] + [f"{self.path}: and {more} more problems"] * (more > 0)))

    def _text(self) -> str:
        try:
            text = read_bounded(self.path, MAX_YAML_BYTES).decode("utf-8")
            self._nodes_left = len(text) + 1
            return text
        except FileNotFoundError:
            raise ConfigError(f"{self.path}: no such file") from None
        except IsADirectoryError:
            raise ConfigError(f"{self.path}: is a directory; give a YAML file") from None
        except OSError as error:
            raise ConfigError(f"{self.path}: cannot be read: {error.strerror}") from None
        except UnicodeDecodeError as error:
            line = error.object[: error.start].count(b"\n") + 1
            raise ConfigError(f"{self.path}:{line}: not UTF-8: {error.reason}") from None
        except ValueError as error:
            raise ConfigError(f"{self.path}: {error}") from None

    def _mapping(self, node: yaml.MappingNode, path: KeyPath) -> dict[str, Any]:
        data: dict[str, Any] = {}
        for key_node, value_node in node.value:
            key = self._key(key_node)
            here = (*path, key)
            line = key_node.start_mark.line + 1
            if key in data:
                self.problems.append(Problem(here, f"given twice, on lines {self.lines[here]} and {line}"))
                continue
            self.lines[here] = line
            data[key] = self._value(value_node, here)
        return data

    def _key(self, node: yaml.Node) -> str:
        # a key that YAML reads as another type (2, true, null) is unknown in any case: keep its spelling
        return printable(node.value) if isinstance(node, yaml.ScalarNode) else f"<{_kind(node)}>"

    def _value(self, node: yaml.Node, path: KeyPath) -> Any:
        self._nodes_left -= 1
        if self._nodes_left < 0:
            raise ConfigError(f"{self.path}: its aliases (*name) stand for more than the file has; write it out")
        if isinstance(node, yaml.MappingNode) and node.tag == _MAP_TAG:
            return self._mapping(node, path)
        if isinstance(node, yaml.SequenceNode) and node.tag == _SEQUENCE_TAG:
            return [self._item(item, (*path, str(number))) for number, item in enumerate(node.value)]
        try:
            value: Hashable = self._loader.construct_object(node)
        except yaml.YAMLError:
            raise
        except Exception as error:  # a timestamp such as 2026-13-45, an empty !!bool
            self.problems.append(Problem(path, f"not a value: {error}"))
            return None
        if isinstance(value, int) and value.bit_length() > _MAX_BITS:  # hexadecimal digits can be any number
            self.problems.append(Problem(path, f"not a value: a number of {value.bit_length()} bits"))
            return None
        return value

    def _item(self, node: yaml.Node, path: KeyPath) -> Any:
        self.lines[path] = node.start_mark.line + 1
        return self._value(node, path)

    def line_of(self, path: KeyPath) -> int:
        """The line of the key, or of the closest section around it that the file has."""
        while path and path not in self.lines:
            path = path[:-1]
        return self.lines.get(path, 1)


def _kind(node: yaml.Node) -> str:
    if isinstance(node, yaml.CollectionNode):
        return "a section" if isinstance(node, yaml.MappingNode) else "a list"
    return "a single value"


def _line(error: yaml.MarkedYAMLError) -> str:
    mark = error.problem_mark or error.context_mark
    return f":{mark.line + 1}" if mark else ""


def _reason(error: yaml.MarkedYAMLError) -> str:
    return ", ".join(part for part in (error.context, error.problem) if part)
