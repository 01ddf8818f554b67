"""The halls and the rooms in them, and who may import whom: launch -> runtime -> parallel, offload, and one way between
the rooms of each; ray in two rooms; small rooms, small files.
"""

from __future__ import annotations

import ast
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from graphlib import TopologicalSorter
from pathlib import Path

import pytest
import torch

from house import imported, room_of
from tiers import not_quick

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {
    "launch": {"launch", "runtime"},
    "runtime": {"runtime", "parallel", "offload"},
    "parallel": {"parallel"},
    "offload": {"offload"},
}
ROOMS: dict[str, dict[str, set[str]]] = {
    "runtime": {
        "errors": set(),
        "request": {"errors"},
        "config": {"errors"},
        "models": {"errors", "config"},
        "models/families": {"errors", "models", "models/inferred"},
        "models/inferred": {"errors", "config", "models"},
        "models/tiny": {"errors", "config", "models", "models/families"},
        "adapters": {"errors", "config", "models"},
        "plan": {"errors", "request", "config", "models", "models/families", "models/inferred", "adapters"},
        "reports": {"plan"},
        "contract": {"errors", "models", "plan", "reports"},
        "watch": {"errors", "reports"},
        "pipeline": {"errors", "request", "models", "models/inferred", "plan", "reports"},
        "rank/weights": {"errors", "models", "adapters", "plan", "reports"},
        "rank": {
            "errors",
            "request",
            "config",
            "models",
            "plan",
            "reports",
            "contract",
            "watch",
            "pipeline",
            "rank/weights",
        },
        "rank/probe": {
            "request",
            "models",
            "models/inferred",
            "plan",
            "reports",
            "contract",
            "pipeline",
            "rank/weights",
            "rank",
        },
    },
    "launch": {
        "console": set(),
        "gangs/ranks": set(),
        "gangs/local": {"gangs/ranks"},
        "gangs/ray": {"gangs/ranks"},
        "gangs": {"console", "gangs/ranks", "gangs/local", "gangs/ray"},
        "hub": set(),
        "engine": {"gangs", "gangs/ranks", "hub"},
        "video_file": set(),
        "serve": {"engine", "gangs", "gangs/ranks", "gangs/ray", "hub"},
        "serve/web": {"engine", "serve", "gangs", "video_file"},
        "commands": {"console", "hub", "gangs", "engine", "serve/web", "video_file"},
        "cli": {"console", "commands", "gangs", "gangs/ranks"},
        "torchrun": {"console", "hub", "gangs", "commands"},
    },
    "offload": {
        "memory": set(),
        "codecs": {"memory"},
        "schedule": set(),
        "stream": {"codecs", "memory", "schedule"},
        "live": {"codecs", "memory", "schedule", "stream"},
    },
}
"""Hall -> room -> the rooms of that hall that it may import. A file that stands in the hall is a room of its own; a
hall's `__init__.py` is its door, which hands out what is in the rooms.
"""
MOST_THINGS = 11
"""Files and folders in a room: about ten can be seen at once."""
LISTS = {"runtime/models/families", "runtime/models/tiny"}
"""Here the modules are alike, one for each family: whoever looks for one knows its name."""
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


@pytest.mark.parametrize("hall", ROOMS)
def test_rooms_import_one_way(hall: str) -> None:
    for path in _modules(hall):
        if (whole := room_of(ROOT, path)) is None:
            continue
        room, name = whole.removeprefix(f"{hall}/"), path.relative_to(ROOT).as_posix()
        same_hall = [other for other in imported(ROOT, path) if other.is_relative_to(ROOT / hall)]
        others = {(room_of(ROOT, other) or "the door").removeprefix(f"{hall}/") for other in same_hall} - {room}
        assert room in ROOMS[hall], f"{name}: which rooms may it import?"
        assert others <= ROOMS[hall][room], f"{name} imports {others - ROOMS[hall][room]}"


@pytest.mark.parametrize("hall", ROOMS)
def test_no_circle_is_allowed(hall: str) -> None:
    order = list(TopologicalSorter(ROOMS[hall]).static_order())  # raises CycleError
    assert set(order) == ROOMS[hall].keys(), "rooms that nobody knows"
    assert all((ROOT / hall / room).is_dir() or (ROOT / hall / f"{room}.py").is_file() for room in order)


@pytest.mark.parametrize("hall", MAY_IMPORT)
def test_rooms_are_small(hall: str) -> None:
    for init in (ROOT / hall).rglob("__init__.py"):
        folder = init.parent
        aside = {"__init__.py", "py.typed", "README.md", "__pycache__"}
        things = {thing.name for thing in folder.iterdir()} - aside
        name = folder.relative_to(ROOT).as_posix()
        assert name in LISTS or len(things) <= MOST_THINGS, f"{name} has {len(things)} things: is it still one room?"


def test_every_room_says_what_it_is() -> None:
    for hall in MAY_IMPORT:
        for init in (ROOT / hall).rglob("__init__.py"):
            assert ast.get_docstring(ast.parse(init.read_text(encoding="utf-8"))), f"{init.relative_to(ROOT)}"


@pytest.mark.parametrize("room", ["parallel", "offload"])
def test_the_lower_rooms_need_torch_only(room: str) -> None:
    for path in _modules(room):
        allowed = TORCH_ONLY | {"xfuser_attention.py": {"xfuser"}, "triton_kernels.py": {"triton"}}.get(
            path.name, set()
        )
        others = {name.split(".")[0] for name in _imports(path)} - allowed
        assert not others, f"{path.name} imports {others}"


def test_ray_is_imported_where_actors_are_made() -> None:
    users = {
        path.relative_to(ROOT).as_posix()
        for room in MAY_IMPORT
        for path in _modules(room)
        if any(name.split(".")[0] == "ray" for name in _imports(path))
    }
    assert users == {"launch/gangs/ray/cluster.py", "launch/gangs/ray/gang.py", "launch/serve/replicas.py"}


@not_quick
def test_torchrun_and_the_engine_work_without_ray() -> None:
    """Also: neither ray nor a model library is needed for the command line's own errors."""
    code = "import sys; sys.modules['ray'] = None; import crossdock.launch.torchrun, crossdock.launch.engine.engine"
    subprocess.run([sys.executable, "-c", code], check=True, timeout=120)


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_files_are_small(room: str) -> None:
    for path in _modules(room):
        lines = path.read_text(encoding="utf-8").count("\n")
        assert lines <= 400, f"{path.relative_to(ROOT)} has {lines} lines: is it still one room?"


def _private(tree: ast.Module) -> Iterator[str]:
    """Names with one leading underscore: attributes of others, also by `getattr` and the like, and what is imported."""
    for node in ast.walk(tree):
        match node:
            case ast.Attribute(value=ast.Name("self" | "cls" | "os")):
                continue
            case ast.Attribute(attr=name) | ast.Call(ast.Name("getattr" | "hasattr"), [_, ast.Constant(str(name)), *_]):
                names = [name]
            case ast.ImportFrom(module=str(module)):
                names = [*module.split("."), *(alias.name for alias in node.names)]
            case _:
                continue
        yield from (name for name in names if name.startswith("_") and not name.startswith("__"))


def test_what_diffusers_keeps_to_itself_is_read_in_one_file() -> None:
    """Any release may change it: whoever looks for what broke has one file to read."""
    trees = {path: ast.parse(path.read_text(encoding="utf-8")) for path in _modules("runtime")}
    found = {path.relative_to(ROOT).as_posix(): set(_private(tree)) for path, tree in trees.items()}
    nodes = [node for tree in trees.values() for node in ast.walk(tree)]
    own = {node.name for node in nodes if isinstance(node, ast.FunctionDef)}
    own |= {n.target.id for n in nodes if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)}
    ours = own.union(*map(_assigned, trees.values())) | set(dir(torch.nn.Module())) | {"_pytree"}
    inside = found.pop("runtime/models/diffusers_api.py") - ours
    assert {"_blocks", "_guidance_scale", "_tp_plan"} <= inside
    assert {name: names - ours for name, names in found.items() if names - ours} == {}


def test_an_installation_has_every_package() -> None:
    """Only a wheel would miss one: an editable installation finds all folders."""
    listed = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["tool"]["setuptools"]["packages"]
    found = [path.parent.relative_to(ROOT) for room in MAY_IMPORT for path in (ROOT / room).rglob("__init__.py")]
    assert sorted(listed) == sorted(".".join(("crossdock", *folder.parts)) for folder in found)


def _of_self(node: ast.AST) -> Iterator[ast.Attribute]:
    for found in ast.walk(node):
        if isinstance(found, ast.Attribute) and isinstance(found.value, ast.Name) and found.value.id == "self":
            yield found


def _assigned(node: ast.AST) -> set[str]:
    """What `node` assigns to `self`, however: also in a loop, a `with` or a tuple."""
    return {found.attr for found in _of_self(node) if isinstance(found.ctx, ast.Store)}


def _declared(kind: ast.ClassDef, methods: dict[str, ast.FunctionDef]) -> set[str]:
    """In the class body, in `__init__`, or in the methods that finish the object there."""
    lines = [line for line in kind.body if isinstance(line, ast.Assign | ast.AnnAssign)]
    names = {n.id for line in lines for n in ast.walk(line) if isinstance(n, ast.Name) and isinstance(n.ctx, ast.Store)}
    todo, seen = {"__init__"}, set[str]()
    while todo:
        seen.add(name := todo.pop())
        if name in methods:
            names |= _assigned(methods[name])
            todo |= {found.attr for found in _of_self(methods[name])} - seen
    return names


@pytest.mark.parametrize("room", MAY_IMPORT)
def test_no_attribute_is_born_outside_init(room: str) -> None:
    """What an object has must not depend on what was called on it: somebody would have to probe for it."""
    for path in _modules(room):
        tree = ast.parse(path.read_text(encoding="utf-8"))
        for kind in (node for node in ast.walk(tree) if isinstance(node, ast.ClassDef)):
            methods = {node.name: node for node in kind.body if isinstance(node, ast.FunctionDef)}
            declared = _declared(kind, methods)
            for method in methods.values():
                born = set(_assigned(method)) - declared
                assert not born, f"{path.relative_to(ROOT)}: {kind.name}.{method.name} makes {sorted(born)}"
