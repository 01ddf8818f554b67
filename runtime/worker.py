"""One rank: holds its part of the model, streams it, and runs the denoise loop."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import timedelta
from itertools import pairwise
from typing import Any

import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor, nn
from torch.distributed import Store  # type: ignore[attr-defined]

from crossdock.offload.arena import Arena
from crossdock.offload.block import Home
from crossdock.offload.block_stream import BlockStream
from crossdock.offload.copy_engine import make_copy_engine
from crossdock.offload.device_memory import spare_bytes, total_bytes
from crossdock.offload.host_store import mapped_share_bytes
from crossdock.offload.loader import Gather
from crossdock.offload.trace import StreamCounters, TraceEvent, block_times, step_times
from crossdock.parallel.attention import SequenceParallelAttention
from crossdock.parallel.hsdp import all_gather_bytes
from crossdock.parallel.mesh import Mesh
from crossdock.parallel.regions import Attend, SequenceParallelism
from crossdock.parallel.tensor import RowParallelLinear, TensorParallelism
from crossdock.parallel.xfuser_attention import XFuserAttention
from crossdock.runtime.attention import AttentionBinding
from crossdock.runtime.components import VAE
from crossdock.runtime.improvement import MEASURED_STEPS, improve, observe
from crossdock.runtime.inspection import device_weight_bytes, foreign_hooks, record_homes, record_tensors
from crossdock.runtime.meta_model import build_on_meta
from crossdock.runtime.pipeline import RankPipeline
from crossdock.runtime.plan import TRANSFORMER, RunPlan
from crossdock.runtime.reports import Measurements, RankReport, RankTrace, Span
from crossdock.runtime.request import GenerateRequest
from crossdock.runtime.weights import RankWeights, WeightLoader, exchange

EVENTS_PER_BLOCK = 7
TRACED_STEPS = 2
"""How many of a request's last steps a rank keeps the trace of."""


@dataclass
class RankResult:
    """What a rank returns for one request; the picture comes from the first rank of each replica with a prompt.

    `timeline` is the whole request, `trace` its last steps for the coordinator. `verdict` says what became of the
    residency schedule. Where it was changed in this request, `plan` is the new one and `report` what the rank now
    holds.
    """

    rank: int
    measurements: Measurements
    timeline: RankTrace
    trace: tuple[TraceEvent, ...]
    verdict: str
    plan: RunPlan | None = None
    report: RankReport | None = None
    latents: Tensor | None = None
    image: Image.Image | None = None


def compute_threads(world_size: int) -> int:
    """Threads per rank on the CPU: an even share of the cores, less the one on which blocks are copied."""
    return max(1, (os.cpu_count() or 1) // world_size - 1)


class RankWorker:
    """Hosted by a Ray actor or a torchrun process, which tell it its place and how to meet the others."""

    def __init__(self, rank: int, world_size: int, device: torch.device) -> None:
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.finished_steps = 0  # of all requests
        self.on_progress: Callable[[int], None] | None = None
        self.ready = False
        if device.type == "cuda":
            torch.cuda.set_device(device)
        else:
            torch.set_num_threads(compute_threads(world_size))

    def join(self, store: Store, timeout_s: float) -> None:
        """Meet the other ranks. Collective; `timeout_s` then bounds every collective."""
        backend = "cpu:gloo,cuda:nccl" if self.device.type == "cuda" else "gloo"
        dist.init_process_group(
            backend, store=store, rank=self.rank, world_size=self.world_size, timeout=timedelta(seconds=timeout_s)
        )

    def device_bytes(self) -> int:
        """Memory of this rank's device."""
        return total_bytes(self.device)

    def setup(self, plan: RunPlan) -> RankReport:
        """Load, shard and stream the model of `plan`; the report says what this rank now holds. Collective."""
        began = time.perf_counter()
        self.plan = plan
        timeout_s = plan.config.launch.timeouts.collective_s
        self.mesh = Mesh.connect(plan.mesh, self.rank, timeout_s)
        self.model = build_on_meta(plan.spec.transformer, plan.model_dir / TRANSFORMER)
        self.tensor = self._apply_tensor_parallelism(self.model)
        self.sequence, self.attention = self._apply_sequence_parallelism(self.model)
        loader = WeightLoader(plan, self.mesh, self.model, self.device)
        self.weights: RankWeights = loader.load_blocks()
        loader.load_outside()
        loader.close()
        self.engine = make_copy_engine(self.device, timeout_s)
        self.arena = None if plan.arena_bytes is None else Arena(plan.arena_bytes, self.device)
        self.stream = BlockStream(
            self.weights.blocks,
            plan.schedule,
            self.device,
            self.engine,
            self._gather(),
            resident=plan.resident,
            arena=self.arena,
            yields_link=self.device.type == "cuda" and self.world_size > 1,
        )
        self.stream.attach()
        self.model.register_forward_pre_hook(lambda *_: self.stream.prepare())
        for module in self.model.modules():
            if isinstance(module, RowParallelLinear):
                module.register_forward_hook(lambda *_: self.stream.link_used())
        self.pipeline = RankPipeline(plan, self.mesh, self.model, self.device, self.engine, self.arena)
        self.verdict = "assumed costs: nothing was measured yet"
        self.model_steps = 0  # of this model
        self.ready = True
        self.load_s = time.perf_counter() - began
        self.stream.rehearse()
        return self.report()

    def report(self) -> RankReport:
        """What this rank holds now, read off the live model."""
        weights = self.weights
        return RankReport(
            rank=self.rank,
            tensors=record_tensors(self.model, self.stream, weights.slices, weights.filled),
            homes=record_homes(self.plan, self.stream, weights.ranges, weights.filled),
            order=self.stream.order,
            slot_bytes=tuple(memory.nbytes for memory in self.stream.slot_memory),
            foreign_hooks=foreign_hooks(self.model),
            trace=self._since_scheduled(self.stream.trace()),
        )

    def generate(self, request: GenerateRequest) -> RankResult:
        """One prompt per replica; a replica without one computes a copy that is dropped. Collective."""
        replica = self.mesh.shape.coordinates(self.rank)["dp"]
        has_prompt = replica < len(request.prompts)
        number = replica if has_prompt else 0
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        before, since = replace(self.stream.counters), self.stream.upcoming
        self.changed: RankReport | None = None  # what the rank holds since the schedule was improved
        self.rehearsed = range(0)  # events of this request that belong to no step
        self.step_ends: list[int] = []  # per step, the number of the first event after it
        self.step_times: list[float] = []
        done = self.pipeline.denoise(request.prompts[number], request.seed + number, request, self._on_step)
        denoised = time.perf_counter()
        latents = image = None
        with self.pipeline.turn(VAE):
            if has_prompt and self.rank == self.mesh.ranks["replica"][0]:
                latents, image = done.latents, self.pipeline.decode(done.latents)
        decoded = time.perf_counter()
        events = tuple(e for e in self.stream.trace() if e.sequence >= since and e.sequence not in self.rehearsed)
        begins = [max((span.end_s for span in done.encodes), default=denoised), *self.step_times]
        steps = [Span(f"step {n}", *times) for n, times in enumerate(pairwise(begins), 1)]
        spans = (*done.encodes, *steps, Span("decode", denoised, decoded))
        phases = {"encode": done.encode_s, "denoise": done.denoise_s, "decode": decoded - denoised}
        measurements = self._measure(before, done.step_ms, events, phases)
        timeline = RankTrace(self.rank, measurements.host, measurements.device, events, spans)
        result = RankResult(self.rank, measurements, timeline, self._last_steps(events), self.verdict)
        if self.changed is not None:
            result.plan, result.report = self.plan, self.changed
        result.latents, result.image = latents, image
        return result

    def teardown(self) -> None:
        """Give the model up and leave the groups of its mesh; `setup` may follow."""
        if not self.ready:
            return
        self.ready = False
        self.pipeline.discard()
        self.stream.remove()
        self.engine.close()
        if self.attention is not None:
            self.attention.remove()
        if self.sequence is not None:
            self.sequence.remove()
        self.tensor.remove()
        store = self.weights.store
        del self.pipeline, self.stream, self.arena, self.weights, self.model
        gc.collect()
        if store is not None:
            store.drop()
            store.close()
        self.mesh.disconnect()

    def leave(self) -> None:
        """Leave the world."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- parts of setup ------------------------------------------------------------------------------------------

    def _apply_tensor_parallelism(self, model: nn.Module) -> TensorParallelism:
        plan, degree = self.plan.spec.tensor_plan, self.mesh.shape.tp
        return TensorParallelism.apply(model, plan, self.mesh.index_in("tp"), degree, self.mesh.groups["tp"])

    def _apply_sequence_parallelism(
        self, model: nn.Module
    ) -> tuple[SequenceParallelism | None, AttentionBinding | None]:
        group = self.mesh.groups["sequence"]
        if group is None:
            return None, None
        shape = self.mesh.shape
        attention = self._make_attention()
        sequence = SequenceParallelism(attention, shape.sequence_index(self.rank), shape.sequence, group)
        sequence.apply(model, self.plan.spec.regions)
        return sequence, AttentionBinding(model, sequence)

    def _make_attention(self) -> Attend:
        shape, groups = self.mesh.shape, self.mesh.groups
        place: dict[str, Any] = {
            "ulysses_group": groups["ulysses"],
            "ulysses_rank": self.mesh.index_in("ulysses"),
            "ulysses_degree": shape.ulysses,
            "ring_group": groups["ring"],
            "ring_rank": self.mesh.index_in("ring"),
            "ring_degree": shape.ring,
        }
        if self.plan.config.parallel.attention == "xfuser":
            return XFuserAttention(**place)
        return SequenceParallelAttention(**place, after_collective=lambda: self.stream.link_used())

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

    def _on_step(self, finished: int) -> None:
        self.finished_steps += 1
        self.step_ends.append(self.stream.upcoming)
        self.step_times.append(time.perf_counter())
        self.model_steps += 1
        if self.model_steps == MEASURED_STEPS and self.plan.order:
            self._improve()
        if self.on_progress is not None:
            self.on_progress(finished)

    def _improve(self) -> None:
        """Look at the schedule again, with what the first steps have shown. Collective; every rank decides alike."""
        seen = observe(self.plan, self.stream.recorded_order, self.stream.trace(), spare_bytes(self.device))
        improvement = improve(self.plan, exchange(seen, self.world_size), self.model_steps)
        self.verdict = improvement.verdict
        if improvement.plan is None:
            return
        self.plan = improvement.plan
        if self.arena is not None and self.plan.arena_bytes != self.arena.nbytes:
            self.arena.resize(self.plan.arena_bytes or 0)
        self.stream.reschedule(self.plan.schedule, self.plan.resident, self.plan.order)
        before = self.stream.upcoming
        self.stream.rehearse()
        self.rehearsed = range(before, self.stream.upcoming)
        self.changed = self.report()  # now: later, another component may have the memory

    def _last_steps(self, events: tuple[TraceEvent, ...]) -> tuple[TraceEvent, ...]:
        """The events of about the last `TRACED_STEPS` steps."""
        return self._since_scheduled(events[-TRACED_STEPS * EVENTS_PER_BLOCK * len(self.plan.blocks) :])

    def _since_scheduled(self, events: tuple[TraceEvent, ...]) -> tuple[TraceEvent, ...]:
        return tuple(event for event in events if event.sequence >= self.stream.scheduled_at)

    def _measure(
        self,
        before: StreamCounters,
        step_ms: list[float],
        events: tuple[TraceEvent, ...],
        phases_s: dict[str, float],
    ) -> Measurements:
        counters, blocks, steps = self.stream.counters, self.weights.blocks, len(self.step_ends)
        shards = sum(b.source_bytes for b in blocks if b.home is Home.DEVICE_SHARD)
        slot_bytes = sum(memory.nbytes for memory in self.stream.slot_memory)
        held = device_weight_bytes((self.model, *self.pipeline.on_device), self.device)
        cuda = self.device.type == "cuda"
        store = self.weights.store
        return Measurements(
            rank=self.rank,
            host=socket.gethostname(),
            device=torch.cuda.get_device_name(self.device) if cuda else "cpu",
            peak_weight_bytes=held + shards,
            resident_weight_bytes=held - slot_bytes,
            slot_bytes=slot_bytes,
            shard_bytes=shards,
            host_bytes=store.nbytes if store else 0,
            host_pss_bytes=mapped_share_bytes(),
            h2d_bytes_per_step=(counters.h2d_bytes - before.h2d_bytes) // steps,
            gathered_bytes_per_step=(counters.gathered_bytes - before.gathered_bytes) // steps,
            misses=counters.misses - before.misses,
            step_ms=[round(ms, 3) for ms in step_ms],
            peak_device_bytes=torch.cuda.max_memory_allocated(self.device) if cuda else None,
            reserved_device_bytes=torch.cuda.max_memory_reserved(self.device) if cuda else None,
            phases_s={"load": self.load_s} | phases_s,
            steps=step_times(events, self.step_ends),
            blocks=block_times(events),
        )
