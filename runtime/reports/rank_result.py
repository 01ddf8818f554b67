"""What a rank returns for one request."""

from __future__ import annotations

from dataclasses import dataclass, field

from torch import Tensor

from crossdock.offload.stream.trace import TraceEvent
from crossdock.parallel.group import GroupRecord
from crossdock.runtime.plan.memory_plan import MemoryPlan
from crossdock.runtime.reports.media import Media
from crossdock.runtime.reports.records import (
    ArrivalRecord,
    Measurements,
    MemorySpan,
    RankReport,
    RankTrace,
    RunRecord,
    WeightsRecord,
)


@dataclass
class RankResult:
    """What a rank returns for one request; the picture comes from the first rank of each replica with a prompt, unless
    the ranks ended the request because wrong bytes had arrived.

    `timeline` is the whole request, `before` the last event of every slot before it, `scheduled_at` the number of the
    first event under the present schedule, `collectives` what was issued so far, `read` what every block's loads
    read, as in `HomeRecord`, `arrivals` what has been compared with the checkpoint since the last report or result.
    `schedule_note` says what became of the residency schedule, `seen` what was looked at in every step, `weights` which
    weights were not what they were when they first arrived. Where the schedule was changed in this request, `memory` is
    the new plan and `report` what the rank now holds. `refused` says why what was denoised cannot be decoded.
    """

    rank: int
    measurements: Measurements
    timeline: RankTrace
    before: tuple[TraceEvent, ...]
    scheduled_at: int
    collectives: tuple[GroupRecord, ...]
    read: dict[str, tuple[MemorySpan, ...]]
    arrivals: tuple[ArrivalRecord, ...]
    schedule_note: str
    seen: RunRecord = field(default_factory=RunRecord)
    weights: WeightsRecord = field(default_factory=WeightsRecord)
    memory: MemoryPlan | None = None
    report: RankReport | None = None
    latents: Tensor | None = None
    returned_latents: Tensor | None = None
    media: list[Media] = field(default_factory=list)
    refused: str | None = None

    @property
    def trace(self) -> tuple[TraceEvent, ...]:
        """For the coordinator: all steps, and what was in the slots when the first one began."""
        return (*self.before, *self.timeline.events)
