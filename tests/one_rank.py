"""A rank in this process, and what it is asked for."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import fields, replace
from typing import Any

import torch

from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.request import GenerateRequest, RankRequest

OF_THE_ATTEMPT = {field.name for field in fields(RankRequest)} - {"asked"}


@contextmanager
def admitted(plan: RunPlan) -> Iterator[RankWorker]:
    """Set up and admitted by a coordinator; torn down at the end."""
    device = plan.layout.device
    worker = RankWorker(0, 1, torch.device(device, 0) if device == "cuda" else torch.device(device))
    try:
        Coordinator(plan).admit([worker.setup(plan)], rehearsed=False)
        yield worker
    finally:
        worker.teardown()


def rank_request(prompt: str | list[str], **options: Any) -> RankRequest:
    """What a rank gets; `options` are those of `GenerateRequest.of` and the fields of `RankRequest`."""
    own = {name: options.pop(name) for name in OF_THE_ATTEMPT & options.keys()}
    return RankRequest(GenerateRequest.of(prompt, **options), **own)


def changed(request: RankRequest, **changes: Any) -> RankRequest:
    """With other settings, of the attempt or of what was asked for."""
    own = {name: changes.pop(name) for name in OF_THE_ATTEMPT & changes.keys()}
    return replace(request, asked=replace(request.asked, **changes), **own)
