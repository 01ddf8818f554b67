"""The picture of the house as data: `python tests/house.py [TREE]` prints its rooms, floors, arrows, circles and lines.

A room is a folder, or a file that stands in a hall; an arrow, that something in one imports something in another; a
floor, how far the longest way down from a room is. Imports in a function, and those for type checkers, count.
"""

from __future__ import annotations

import ast
import sys
from collections.abc import Iterator
from graphlib import CycleError, TopologicalSorter
from pathlib import Path

HALLS = ("launch", "offload", "parallel", "runtime")


def room_of(root: Path, path: Path) -> str | None:
    """`hall/room` of a module or a package; None: it is a hall's door, its `__init__.py`."""
    folder = path if path.is_dir() else path.parent
    if folder.parent != root:
        return folder.relative_to(root).as_posix()
    return None if path.is_dir() or path.stem == "__init__" else path.relative_to(root).with_suffix("").as_posix()


def imported(root: Path, path: Path) -> Iterator[Path]:
    """The modules and packages of this tree that `path` imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            names = [f"{node.module}.{alias.name}" for alias in node.names]  # a module, or what is in one
        for name in names:
            if name.startswith("crossdock.") and name.split(".")[1] in HALLS:
                yield _found(root.joinpath(*name.split(".")[1:]))


def _found(path: Path) -> Path:
    """The folder or the module that `path` names, or that it names something in."""
    module = path.with_suffix(".py")
    return path if path.is_dir() else module if module.is_file() else _found(path.parent)


def arrows(root: Path) -> dict[str, set[str]]:
    """Room -> the rooms it imports."""
    found: dict[str, set[str]] = {}
    for hall in HALLS:
        for path in sorted((root / hall).rglob("*.py")):
            if (room := room_of(root, path)) is not None:
                others = {room_of(root, other) for other in imported(root, path)}
                found.setdefault(room, set()).update(other for other in others - {room} if other is not None)
    return found


def floors(down: dict[str, set[str]]) -> int:
    """How many there are; -1: there is a circle."""
    height: dict[str, int] = {}
    try:
        for room in TopologicalSorter(down).static_order():
            height[room] = 1 + max((height[other] for other in down.get(room, ())), default=0)
    except CycleError:
        return -1
    return max(height.values(), default=0)


def lines(root: Path, *folders: str) -> int:
    return sum(len(path.read_bytes().splitlines()) for folder in folders for path in (root / folder).rglob("*.py"))


def main(root: Path) -> None:
    down = arrows(root)
    for hall in (*HALLS, ""):
        inside = {
            room: {o for o in others if o.startswith(hall)} for room, others in down.items() if room.startswith(hall)
        }
        count = sum(map(len, inside.values()))
        floor = floors(inside)
        circle = "a circle" if floor < 0 else f"{floor} floors, no circle"
        print(f"{hall or 'all':9} {len(inside):3} rooms, {count:3} arrows, {circle}")
    print(f"product {lines(root, *HALLS)} lines, tests {lines(root, 'tests')} lines")


if __name__ == "__main__":
    main(Path(sys.argv[1] if len(sys.argv) > 1 else Path(__file__).parents[1]))
