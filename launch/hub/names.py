"""What a model is called: a directory, or `org/name[@revision]` on the hub."""

from __future__ import annotations

import os
import re
from dataclasses import dataclass
from pathlib import Path

_NAME = re.compile(r"(\w[\w.-]{0,95}/\w[\w.-]{0,95})(?:@((?!.*\.\.)\w[\w./-]{0,199}))?", re.ASCII)
_FOLDER = re.compile(r"models--([\w.-]+?)--([\w.-]+)", re.ASCII)
_COMMIT = re.compile(r"[0-9a-f]{40}")


@dataclass(frozen=True)
class HubName:
    """`revision`: a branch, a tag or a commit; None: the main branch."""

    repo: str
    revision: str | None = None

    def __str__(self) -> str:
        return self.repo if self.revision is None else f"{self.repo}@{self.revision}"


def hub_name(model: str | os.PathLike[str]) -> HubName | None:
    """None: it is a path; whatever exists here is one."""
    text = os.fspath(model)
    found = None if Path(text).exists() else _NAME.fullmatch(text)
    return HubName(found[1], found[2]) if found else None


def name_of_snapshot(directory: Path) -> HubName | None:
    """What a folder of the hub's cache has: `CACHE/models--org--name/snapshots/COMMIT`; None: it is another folder."""
    if len(directory.parts) < 4 or directory.parts[-2] != "snapshots" or not _COMMIT.fullmatch(directory.name):
        return None
    found = _FOLDER.fullmatch(directory.parts[-3])
    return HubName(f"{found[1]}/{found[2]}", directory.name) if found else None
