"""The rooms and who may import whom: launch -> runtime -> parallel, offload; ray in one module; small files."""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "launch": {"launch", "runtime"},
    "runtime": {"runtime", "parallel", "offload"},
    "parallel": {"parallel"},
    "offload": {"offload"},
}
EXCEPTIONS = {("launch/gangs/ray_gang.py", "ray")}
TORCH_ONLY = {"torch", "numpy", "crossdock"} | set(sys.stdlib_module_names)


def _modules(room: str) -> list[Path]:
    return sorted((ROOT / room).rglob("*.py"))


def _imports(path: Path) -> Iterator[str]:
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: relative import"
            yield node.module or ""


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_nothing_is_imported_upward_or_sideways(room: str) -> None:
    for path in _modules(room):
        rooms = {name.split(".")[1] for name in _imports(path) if name.startswith("crossdock.")}
        assert rooms <= MAY_IMPORT[room], f"{path.name} imports {rooms - MAY_IMPORT[room]}"


@pytest.mark.parametrize("room", ["parallel", "offload"])
def test_the_lower_rooms_need_torch_only(room: str) -> None:
    for path in _modules(room):
        allowed = TORCH_ONLY | ({"xfuser"} if path.name == "xfuser_attention.py" else set())
        others = {name.split(".")[0] for name in _imports(path)} - allowed
        assert not others, f"{path.name} imports {others}"


def test_ray_is_imported_in_one_module() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for room in MAY_IMPORT
        for path in _modules(room)
        if any(name.split(".")[0] == "ray" for name in _imports(path))
    }
    assert users == {"launch/gangs/ray_gang.py"}


def test_torchrun_and_the_engine_work_without_ray() -> None:
    """Also: neither ray nor a model library is needed for the command line's own errors."""
    code = "import sys; sys.modules['ray'] = None; import crossdock.launch.torchrun, crossdock.launch.engine.engine"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_files_are_small(room: str) -> None:
    for path in _modules(room):
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: is it still one room?"


def test_an_installation_has_every_package() -> None:
    """Only a wheel would miss one: an editable installation finds all folders."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = [path.parent.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("__init__.py")]
    assert sorted(listed) == sorted(".".join(("crossdock", *folder.parts)) for folder in found)
