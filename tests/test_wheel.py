"""The wheel: what it unpacks to is imported, all of it. `test_structure` has the list of its packages."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from house import HALLS
from tiers import not_quick

pytestmark = not_quick

ROOT = Path(__file__).resolve().parents[1]
TIME_LIMIT_S = 120
FOR_A_GPU = {"triton_kernels.py"}
"""What needs a library that only a torch for GPUs brings."""
BUILD = "import sys, setuptools.build_meta as backend; print(backend.build_wheel(sys.argv[1]))"
IMPORT = """
import importlib, json, sys
modules = [importlib.import_module(name) for name in json.load(sys.stdin)]
print(json.dumps([module.__file__ for module in modules]))
"""


def _run(program: str, *args: str, cwd: Path, path: str = "", stdin: str = "") -> str:
    """The last line that `program` prints."""
    env = {**os.environ, "PYTHONPATH": path}
    command = [sys.executable, "-c", program, *args]
    done = subprocess.run(command, cwd=cwd, env=env, input=stdin, capture_output=True, text=True, timeout=TIME_LIMIT_S)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()[-1]


def _sources() -> list[Path]:
    return sorted(path.relative_to(ROOT) for hall in HALLS for path in (ROOT / hall).rglob("*.py"))


@pytest.fixture(scope="module")
def unpacked(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of a copy of the tree: a build leaves files beside the sources."""
    copy, folder = tmp_path_factory.mktemp("tree"), tmp_path_factory.mktemp("wheel")
    for hall in HALLS:
        shutil.copytree(ROOT / hall, copy / hall, ignore=shutil.ignore_patterns("__pycache__"))
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    wheel = folder / _run(BUILD, str(folder), cwd=copy)
    with zipfile.ZipFile(wheel) as archive:
        archive.extractall(folder / "unpacked")
    return folder / "unpacked"


def test_all_of_it_is_imported_from_the_wheel(unpacked: Path, tmp_path: Path) -> None:
    """Not from an installation in development mode, which would find what the wheel lacks."""
    sources = [path for path in _sources() if path.name not in FOR_A_GPU]
    names = [".".join(["crossdock", *path.with_suffix("").parts]).removesuffix(".__init__") for path in sources]
    found = json.loads(_run(IMPORT, cwd=tmp_path, path=str(unpacked), stdin=json.dumps(names)))
    assert found == [str(unpacked / "crossdock" / path) for path in sources]
    assert all((unpacked / "crossdock" / path).is_file() for path in _sources())


def test_what_is_no_module_is_in_it(unpacked: Path) -> None:
    kinds = {".yaml"}
    here = {path.relative_to(ROOT) for hall in HALLS for path in (ROOT / hall).rglob("*") if path.suffix in kinds}
    here |= {path.relative_to(ROOT) for hall in HALLS for path in (ROOT / hall).glob("py.typed")}
    assert here
    assert {path for path in here if not (unpacked / "crossdock" / path).is_file()} == set()
