"""A request that survives faults: what it takes to go on is collected while it runs, and a lost gang is replaced."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

from crossdock.launch.engine.progress import Preview
from crossdock.runtime.errors import CrossdockError, RankError
from crossdock.runtime.pipeline.snapshot import Snapshot, common_start
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.model_layout import ModelLayout
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.watch.gang import Gang

RPC_S = 1.0
"""The longest wait for a rank's answer beside a collective call: the watch waits with it."""
ALONE_S = 5.0
"""A rank that missed it is not asked for so long."""
NOTCH = 0.9
"""After an out-of-memory the budget is this share of what it was."""


@dataclass(frozen=True)
class Fault:
    """One row of `faults` in `report.json`. Times in seconds.

    Attributes:
        resumed_after: the step after which the request went on; 0: from its beginning.
        lost_s: since the last attempt began. `recovery_s`: until the new gang was admitted.
        meanwhile: what happened to gangs that were started in its place and did not come up.
    """

    rank: int
    kind: str
    error: str
    resumed_after: int
    lost_s: float
    recovery_s: float
    remedy: str
    meanwhile: tuple[str, ...] = ()


@dataclass
class Survived:
    """What one request, or the start of an engine, came through."""

    faults: list[Fault] = field(default_factory=list)
    budget_lowered: bool = False


class Snapshots:
    """The newest snapshots that the first rank of every replica has, fetched while the ranks work."""

    def __init__(self, layout: ModelLayout, gang: Gang, preview: Preview | None = None) -> None:
        """`preview`: gets the latents of steps that all replicas have done."""
        self._gang = gang
        self._preview, self._shown = preview, 0
        mesh = layout.mesh
        self._leaders = sorted({mesh.replica_group(rank)[0] for rank in range(mesh.world_size)})
        self._kept: dict[int, tuple[Snapshot, ...]] = dict.fromkeys(self._leaders, ())
        self._not_before_s = 0.0

    def notice(self, statuses: Mapping[int, RankStatus]) -> None:
        """Fetch what is new. A rank that does not answer is left alone for a while: the watch finds out why."""
        if time.monotonic() < self._not_before_s:
            return
        for leader in self._leaders:
            status = statuses.get(leader)
            if status is not None and status.kept_step > self._newest(leader):
                try:
                    self._kept[leader] = self._gang.rpc(leader, _snapshots, timeout_s=RPC_S)
                except RankError:
                    self._not_before_s = time.monotonic() + ALONE_S
                    return
        if self._preview is not None:
            self._show(self._preview)

    def _show(self, preview: Preview) -> None:
        start = self.start()
        if start is not None and start[0].step > self._shown:
            self._shown = start[0].step
            preview(self._shown, torch.cat([snapshot.latents for snapshot in start]))

    def forget(self) -> None:
        """None of them is to be trusted."""
        self._kept = dict.fromkeys(self._leaders, ())

    def start(self) -> tuple[Snapshot, ...] | None:
        """Where all replicas can go on; None: at the beginning."""
        return common_start(list(self._kept.values()))

    def _newest(self, leader: int) -> int:
        return max((snapshot.step for snapshot in self._kept[leader]), default=0)


def _snapshots(worker: RankWorker) -> tuple[Snapshot, ...]:
    return worker.snapshots


def restart(gang: Gang, load: Callable[[], None], attempts: int, lost: Callable[[RankError], None]) -> None:
    """A new gang with the model; `load` fails like the first time may. `lost` gets what made another try necessary.

    Raises:
        CrossdockError: it did not come up in `attempts` attempts, or a user has to act.
    """
    for attempt in range(1, attempts + 1):
        try:
            gang.restart()
            load()
            return
        except RankError as error:
            if attempt == attempts:
                raise
            lost(error)


def with_less_memory(plan: RunPlan) -> RunPlan | None:
    """The same run with a budget one notch lower, or the least one; None where there is no budget, or none below it.

    `auto` that has chosen no budget for good, because the memory ran out in the request that it looked at, becomes as
    little as possible.
    """
    lower: str | None = None
    if plan.memory.budget_bytes is not None:
        lower_bytes = max(int(plan.memory.budget_bytes * NOTCH), plan.least_budget_bytes)
        if lower_bytes >= plan.memory.budget_bytes:
            return None
        lower = f"{lower_bytes}B"
    elif plan.config.offload.device_budget != "auto":
        return None
    offload = plan.config.offload.model_copy(update={"device_budget": lower})
    config, layout = plan.config.model_copy(update={"offload": offload}), plan.layout
    return make_plan(config, layout.model_dir, layout.device, plain=plan.plain)


def budget_text(plan: RunPlan) -> str:
    """The budget for a message."""
    if plan.memory.budget_bytes is not None:
        return f"{plan.memory.budget_bytes} bytes"
    return "auto" if plan.config.offload.device_budget == "auto" else "as little as possible"


def advice(plan: RunPlan) -> str:
    """What a user can do about memory that ran out."""
    if not plan.config.offload.layerwise:
        return "set offload.layerwise: true, or split the model over more ranks"
    return "the budget cannot be lowered: ask for a smaller picture, or split the work over more ranks"


def brief(error: CrossdockError | str) -> str:
    """The first line of an error, or of its message: without the traceback."""
    return str(error).partition("\n")[0]
