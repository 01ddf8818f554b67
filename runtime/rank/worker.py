"""One rank: holds its part of the model, streams it, and runs the denoise loop."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed import Store  # type: ignore[attr-defined]

from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import make_copy_engine
from crossdock.offload.memory.device_memory import allocated_bytes, spare_bytes, total_bytes
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.offload.stream.loader import Gather
from crossdock.parallel.group import AtRunTime, Group, GroupRecord, exchange
from crossdock.parallel.hsdp import all_gather_bytes
from crossdock.parallel.mesh import Mesh
from crossdock.parallel.sequence import shard_lengths
from crossdock.parallel.tensor import EXCHANGING
from crossdock.runtime.errors import RequestCancelled
from crossdock.runtime.models.transformers import build_transformers, transformers_in
from crossdock.runtime.pipeline.denoise_loop import StepEnd
from crossdock.runtime.pipeline.pipeline import Denoised, RankPipeline
from crossdock.runtime.pipeline.snapshot import Snapshot, of_replica
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.reschedule import MEASURED_STEPS, observe, reschedule
from crossdock.runtime.rank.inspection import (
    checksum,
    foreign_hooks,
    measure_device,
    memory_span,
    record_homes,
    record_plain,
    record_reads,
    record_tensors,
    sampled_checksum,
)
from crossdock.runtime.rank.parallelize import ModelParallelism
from crossdock.runtime.rank.request_log import RequestLog
from crossdock.runtime.rank.stop import ArrivalsDifferError, Stopping
from crossdock.runtime.rank.weights.compare import WeightCheck
from crossdock.runtime.rank.weights.load import RankWeights, WeightLoader
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.reports.records import RankReport, RankTrace
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.request import GenerateRequest

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Where gloo and NCCL listen; by default at the address of the machine's name. Whoever sets them knows better."""


def compute_threads(world_size: int) -> int:
    """Threads per rank on the CPU: an even share of the cores, less the one on which blocks are copied."""
    return max(1, (os.cpu_count() or 1) // world_size - 1)


class RankWorker:
    """Hosted by a Ray actor or a torchrun process, which tell it its place and how to meet the others."""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.on_progress: Callable[[int], None] | None = None
        self.ready = False
        self.phase = "idle"
        self.stopping = Stopping()
        self.world: Group | None = None  # all ranks, once they have met
        self.snapshots: tuple[Snapshot, ...] = ()  # the newest two of the request under way, oldest first
        self.log: RequestLog | None = None  # of the latest request
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(compute_threads(world_size))

    def join(self, store: Store, timeout_s: float, one_machine: bool = False) -> None:
        """Meet the other ranks. Collective; `timeout_s` then bounds every collective.

        Args:
            one_machine: all of them are on this one, so that they listen for each other on loopback alone.
        """
        if one_machine:
            for name in _INTERFACE_VARIABLES:
                os.environ.setdefault(name, "lo")
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timedelta(seconds=timeout_s)
        )
        if self.world_size > 1:
            assert dist.group.WORLD is not None
            self.world = Group(dist.group.WORLD, "world")
            self.stopping.meet(self.world)

    def exchange(self, value: Any) -> list[Any]:
        """`value` of every rank, by rank. Collective over the world."""
        return exchange(value, self.world)

    def device_bytes(self) -> int:
        """Memory of this rank's device."""
        return total_bytes(self.device)

    def setup(self, plan: RunPlan, probe: bool = False, rehearse: bool = False) -> RankReport:
        """Load, shard and stream the model of `plan`; the report says what this rank now holds. Collective.

        Args:
            probe: compare all bytes that arrive on the device with the checkpoint, and all replicas' bytes, not a
                sample of them. With a rehearsal.
            rehearse: stream every block once and compare it, instead of in the first step.
        """
        began = time.perf_counter()
        allocated = allocated_bytes(self.device)
        self.phase = "connect"
        self.total = checksum if probe else sampled_checksum
        self.plan = plan
        timeout_s = plan.config.launch.timeouts.collective_s
        self.mesh = Mesh.connect(plan.mesh, self.rank, timeout_s, self.world)
        self.phase = "load"
        self.model = build_transformers(plan.spec.transformer, plan.model_dir, plan.transformers)
        issued = AtRunTime(lambda: self.stream.collective_issued())
        self.parallelism = ModelParallelism.apply(self.model, plan, self.mesh, issued)
        loader = WeightLoader(plan, self.mesh, self.model, self.device)
        self.weights: RankWeights = loader.load_blocks()
        loader.load_outside()
        loader.close()
        self.copy_engine = make_copy_engine(self.device, timeout_s)
        self.arena = None if plan.arena_bytes is None else Arena(plan.arena_bytes, self.device)
        self.stream = BlockStream(
            self.weights.blocks,
            plan.schedule,
            self.device,
            self.copy_engine,
            self._gather(),
            resident=plan.resident,
            passes=plan.passes,
            arena=self.arena,
            yield_to_collectives=self.device.type == "cuda" and self.world_size > 1,
        )
        self.stream.attach()
        for pass_, transformer in enumerate(transformers_in(self.model).values()):
            transformer.register_forward_pre_hook(partial(self._begin_forward, pass_))
        for module in self.model.modules():
            if isinstance(module, EXCHANGING):
                module.register_forward_hook(lambda *_: issued())
        self.pipeline = RankPipeline(plan, self.mesh, self.model, self.device, self.copy_engine, self.arena)
        self.weight_check = WeightCheck(plan, self.rank, self.model, full=probe)
        self.schedule_note = "assumed costs: nothing was measured yet"
        self.model_steps = 0  # of this model
        self.ready = True
        self.load_s = time.perf_counter() - began
        self.phase = "rehearsal" if rehearse or probe else "verify"
        self.weight_check.begin(self.stream, rehearse=rehearse or probe)
        self.phase = "idle"
        report = self.report(None if allocated is None else (allocated_bytes(self.device) or 0) - allocated)
        if not (rehearse or probe):
            self.weight_check.watch(self.stream)  # now, so that nobody waits while slots are being poisoned
        return report

    def report(self, grown_bytes: int | None = None) -> RankReport:
        """What this rank holds now, read off the live model.

        Args:
            grown_bytes: by how much loading made the device's allocator grow, where it is known.
        """
        issued = self._issued()
        weights, blocks = self.weights, self.stream.blocks
        shards = [b.source for b in blocks if b.home is Home.DEVICE_SHARD and isinstance(b.source, Tensor)]
        return RankReport(
            rank=self.rank,
            tensors=record_tensors(self.model, self.stream, weights.slices, weights.filled, self.total),
            plain=record_plain(self.model, self.stream),
            homes=record_homes(self.plan, self.stream, weights.ranges, weights.filled, self.total),
            order=self.stream.order,
            slot_bytes=tuple(memory.nbytes for memory in self.stream.slot_memory),
            slots=tuple(span for memory in self.stream.slot_memory if (span := memory_span(memory)) is not None),
            arrivals=tuple(self.weight_check.records),
            device_bytes=measure_device(self.model, self.pipeline.on_device, shards, self.device, grown_bytes),
            foreign_hooks=foreign_hooks(self.model),
            trace=self.stream.trace(since=self.stream.scheduled_at),
            collectives=issued,
        )

    def status(self) -> RankStatus:
        """What this rank is doing right now; for another thread."""
        stream = getattr(self, "stream", None) if self.ready else None
        mesh = getattr(self, "mesh", None)
        denoises = self.phase == "denoise"
        latest = stream.latest if stream is not None and denoises else None
        return RankStatus(
            self.rank,
            socket.gethostname(),
            os.getpid(),
            self.phase,
            self.log.running if denoises and self.log is not None else None,
            latest[1] if latest else None,
            bool(latest and latest[0] == "wait_begin"),
            self.kept.step if self.kept is not None else 0,
            (*(mesh.records() if mesh is not None else ()), *([self.world.record()] if self.world is not None else [])),
        )

    @property
    def kept(self) -> Snapshot | None:
        """The newest snapshot of the request under way, on the first rank of a replica. For any thread."""
        return self.snapshots[-1] if self.snapshots else None

    def cancel(self, reason: str, request_number: int) -> None:
        """Stop that request, on all ranks, at the end of the step that runs. For any thread, on any rank."""
        self.stopping.cancel(reason, request_number)

    def generate(self, request: GenerateRequest, resume: Sequence[Snapshot | None] | None = None) -> RankResult:
        """The prompts, spread evenly over the replicas; one that has none computes a copy that is dropped. Collective.

        Args:
            resume: per replica, where to go on, all after the same step; None: from the beginning.

        Raises:
            RequestError: `resume` does not fit the request or the mesh.
            RequestCancelled: it was stopped, as asked; the next request may follow.
            RankError: the ranks do not run the same steps.
        """
        self.phase = "encode"
        self.copy_engine.reset_clock()
        replica = self.mesh.shape.coordinates(self.rank)["dp"]
        counts = shard_lengths(len(request.prompts), self.mesh.shape.dp)
        first = sum(counts[:replica]) if counts[replica] else 0
        numbers = range(first, first + max(counts[replica], 1))
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.stopping.begin(request)
        snapshot = of_replica(resume, replica, self.mesh.shape.dp)
        self.snapshots = ()
        self.log = log = RequestLog(self.stream, snapshot.step if snapshot is not None else 0)
        keeps = self.plan.spec.resumes and self.rank == self.mesh.ranks["replica"][0]
        self.keep_every = request.keep_every if keeps else 0
        self.changed: RankReport | None = None  # what the rank holds since it was rescheduled
        prompts, seeds = [request.prompts[n] for n in numbers], [request.seed + n for n in numbers]
        decodes = counts[replica] > 0 and self.rank == self.mesh.ranks["replica"][0]
        try:
            done = self.pipeline.run(
                prompts, seeds, request, partial(self._on_step, log), snapshot, partial(self._begin_decode, decodes)
            )
        except RequestCancelled:
            self._finish_request()
            raise
        except ArrivalsDifferError:
            self._finish_request()
            return self._result(log, Denoised.nothing(time.perf_counter()), time.perf_counter())
        result = self._result(log, done, time.perf_counter())
        if decodes:
            result.latents, result.media = done.latents, done.media or []
        self._finish_request()
        return result

    def _result(self, log: RequestLog, done: Denoised, decoded: float) -> RankResult:
        """What the coordinator judges; `decoded` of `time.perf_counter`. Collective where blocks have yet to come."""
        issued = self._issued()  # first: the trace then has what gathers ahead noted, on all ranks alike
        events, spans = log.events(), log.spans(done.encodes, done.end_s, decoded)
        phases = {"load": self.load_s, "encode": done.encode_s, "denoise": done.denoise_s}
        phases["decode"] = decoded - done.end_s
        modules = (self.model, *self.pipeline.on_device)
        measurements = log.measurements(self.rank, self.device, self.weights, modules, events, done.step_ms, phases)
        timeline = RankTrace(self.rank, measurements.host, measurements.device, events, spans)
        self.stream.rehearse(unseen=True)  # blocks that a cache skipped in the first request
        result = RankResult(
            self.rank,
            measurements,
            timeline,
            log.before,
            self.stream.scheduled_at,
            issued,
            record_reads(self.stream),
            self.weight_check.unreported(),
            self.schedule_note,
        )
        if self.changed is not None:
            result.plan, result.report = self.plan, self.changed
        return result

    def teardown(self) -> None:
        """Give the model up and leave the groups of its mesh; `setup` may follow."""
        if not self.ready:
            return
        self.ready = False
        self.pipeline.discard()
        self.stream.remove()
        self.copy_engine.close()
        self.parallelism.remove()
        store = self.weights.store
        del self.pipeline, self.stream, self.arena, self.weights, self.weight_check, self.model
        gc.collect()
        if store is not None:
            store.drop()
            store.close()
        self.mesh.disconnect()
        del self.mesh  # the records of its groups are not the next one's

    def leave(self) -> None:
        """Leave the world."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- parts of setup ------------------------------------------------------------------------------------------

    def _gather(self) -> Gather | None:
        group = self.mesh.groups["weights"]
        if group is None:
            return None
        return Gather(
            self.mesh.shape.hsdp_shard,
            self.mesh.index_in("weights"),
            lambda whole, shard: all_gather_bytes(whole, shard, group),
        )

    # -- parts of generate ---------------------------------------------------------------------------------------

    def _issued(self) -> tuple[GroupRecord, ...]:
        """Of gathers that run ahead, too: all ranks are asked at the same place."""
        self.copy_engine.drain()
        return self.mesh.records()

    def _begin_forward(self, pass_: int, *_: Any) -> None:
        self.phase = "denoise"
        self.stream.prepare(pass_)

    def _begin_decode(self, here: bool) -> bool:
        self.phase = "decode"
        return here

    def _on_step(self, log: RequestLog, end: StepEnd) -> None:
        if end.repeated:
            log.count_from_here()
        else:
            log.end_step()
            self.model_steps += 1
        self.stopping.agree(end.finished, end.total, self.weight_check.differ)
        if self.keep_every and end.finished % self.keep_every == 0:
            self.snapshots = (*self.snapshots[-1:], end.snapshot())
        if end.repeated:
            return
        if self.model_steps == MEASURED_STEPS and self.plan.order:
            log.rehearsed = self._reschedule()
        if self.on_progress is not None:
            self.on_progress(end.finished)

    def _finish_request(self) -> None:
        self.stopping.end()
        self.snapshots = ()
        self.phase = "idle"

    def _reschedule(self) -> range:
        """Look at the schedule again, with what the first steps have shown. Collective; every rank decides alike.

        Returns the numbers of the events that belong to no step.
        """
        seen = observe(self.plan, self.stream.recorded_order, self.stream.trace(), spare_bytes(self.device))
        found = reschedule(self.plan, self.exchange(seen), self.model_steps)
        self.schedule_note = found.schedule_note
        if found.plan is None:
            return range(0)
        self.plan = found.plan
        if self.arena is not None and self.plan.arena_bytes != self.arena.nbytes:
            self.arena.resize(self.plan.arena_bytes or 0)
        self.stream.reschedule(self.plan.schedule, self.plan.resident, self.plan.order)
        before = self.stream.upcoming
        self.stream.rehearse()
        self.changed = self.report()  # now: later, another component may have the memory
        return range(before, self.stream.upcoming)  # with what it fetched ahead: the report waited for that
