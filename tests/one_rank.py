"""A rank in this process."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch

from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.worker import RankWorker


@contextmanager
def admitted(plan: RunPlan) -> Iterator[RankWorker]:
    """Set up and admitted by a coordinator; torn down at the end."""
    worker = RankWorker(0, 1, torch.device(plan.device, 0) if plan.device == "cuda" else torch.device(plan.device))
    try:
        Coordinator(plan).admit([worker.setup(plan)], rehearsed=False)
        yield worker
    finally:
        worker.teardown()
