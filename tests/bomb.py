"""A pickle that runs a command: what must not be read from a store, a socket or a checkpoint."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any


class Bomb:
    """Makes the file `marker` where it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self._marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return os.system, (f"touch {self._marker}",)
