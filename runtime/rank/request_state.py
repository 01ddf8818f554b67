"""What one request needs on one rank, from its beginning to its end."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

from crossdock.parallel.sequence import shard_lengths
from crossdock.runtime.pipeline.denoise_loop import StepEnd
from crossdock.runtime.pipeline.snapshot import Snapshot, of_replica
from crossdock.runtime.rank.loaded_model import LoadedModel
from crossdock.runtime.rank.request_log import RequestLog
from crossdock.runtime.reports.records import RankReport
from crossdock.runtime.request import RankRequest, RequestItem


@dataclass
class RequestState:
    """
    Attributes:
        items: those of this rank's replica; one that has none computes a copy of the first, which is dropped.
        decodes: what this rank decodes is the replica's answer.
        keep_every: steps between two snapshots. 0: this rank keeps none.
        resume: where it goes on; None: at the beginning.
        snapshots: the newest two, oldest first. For any thread, as is the log's `running`.
        changed: what the rank holds since it was rescheduled meanwhile.
    """

    items: tuple[RequestItem, ...]
    decodes: bool
    keep_every: int
    resume: Snapshot | None
    log: RequestLog
    snapshots: tuple[Snapshot, ...] = ()
    changed: RankReport | None = None

    @classmethod
    def begin(cls, request: RankRequest, loaded: LoadedModel, resume: Sequence[Snapshot | None] | None) -> Self:
        """The prompts are spread evenly over the replicas.

        Raises:
            RequestError: `resume` does not fit the mesh.
        """
        mesh, items = loaded.mesh, request.asked.items
        replica, leads = mesh.shape.coordinates(mesh.rank)["dp"], mesh.rank == mesh.ranks["replica"][0]
        counts = shard_lengths(len(items), mesh.shape.dp)
        first = sum(counts[:replica]) if counts[replica] else 0
        snapshot = of_replica(resume, replica, mesh.shape.dp)
        streams = {name: stream for name, (_, stream) in loaded.pipeline.components.items() if stream is not None}
        return cls(
            items[first : first + max(counts[replica], 1)],
            leads and counts[replica] > 0,
            request.keep_every if leads and loaded.plan.layout.spec.resumes else 0,
            snapshot,
            RequestLog(loaded.stream, streams, snapshot.step if snapshot is not None else 0),
        )

    def keep(self, end: StepEnd) -> None:
        """Take a snapshot where one is due."""
        if self.keep_every and end.finished % self.keep_every == 0:
            self.snapshots = (*self.snapshots[-1:], end.snapshot())
