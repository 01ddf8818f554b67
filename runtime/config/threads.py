"""How the cores of a machine are shared out."""

from __future__ import annotations

import os


def compute_threads(world_size: int) -> int:
    """Threads per rank on the CPU: an even share of the cores, less the one on which blocks are copied."""
    return max(1, (os.cpu_count() or 1) // world_size - 1)
