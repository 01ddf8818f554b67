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


def room_of(root: Path, module: Path) -> str:
    parts = module.relative_to(root).parts
    return "/".join(parts[:-1]) if len(parts) > 2 else "/".join(parts).removesuffix(".py")


def imported(root: Path, path: Path) -> Iterator[Path]:
    """The modules of this tree that `path` imports."""
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("crossdock."):
            for alias in node.names:
                target = root.joinpath(*f"{node.module}.{alias.name}".split(".")[1:])
                for found in (target, target.parent):
                    module = found.with_suffix(".py")
                    if module.is_file() or (module := found / "__init__.py").is_file():
                        yield module
                        break


def arrows(root: Path) -> dict[str, set[str]]:
    """Room -> the rooms it imports; a hall's `__init__.py` is its door, and no room."""
    found: dict[str, set[str]] = {}
    for hall in HALLS:
        for path in sorted((root / hall).rglob("*.py")):
            if path != root / hall / "__init__.py":
                room = room_of(root, path)
                others = {room_of(root, other) for other in imported(root, path)}
                found.setdefault(room, set()).update(others - {room, *(f"{hall}/__init__" for hall in HALLS)})
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
