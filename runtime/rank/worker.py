"""One rank: holds its part of the model, streams it, and runs the denoise loop."""

from __future__ import annotations

import gc
import os
import socket
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from datetime import timedelta
from functools import partial
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed import Store  # type: ignore[attr-defined]

from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import make_copy_engine
from crossdock.offload.memory.device_memory import allocated_bytes, spare_bytes, total_bytes
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.parallel.group import AtRunTime, Group, exchange
from crossdock.parallel.mesh import Mesh
from crossdock.parallel.tensor import EXCHANGING
from crossdock.runtime.config.threads import compute_threads
from crossdock.runtime.models.transformers import build_transformers, transformers_in
from crossdock.runtime.pipeline.denoise_loop import StepEnd
from crossdock.runtime.pipeline.pipeline import Denoised, RankPipeline
from crossdock.runtime.pipeline.refusal import refusal
from crossdock.runtime.pipeline.snapshot import Snapshot
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.reschedule import MEASURED_STEPS, observe, reschedule
from crossdock.runtime.rank.inspection import record_reads
from crossdock.runtime.rank.loaded_model import LoadedModel
from crossdock.runtime.rank.parallelize import ModelParallelism, gather_of
from crossdock.runtime.rank.request_state import RequestState
from crossdock.runtime.rank.step_watch import StepWatch
from crossdock.runtime.rank.stop import StepRefusedError, Stopping
from crossdock.runtime.rank.weights.arrivals import ArrivalWatch, stamps
from crossdock.runtime.rank.weights.compare import WeightCheck
from crossdock.runtime.rank.weights.kept_stores import StoreHolder
from crossdock.runtime.rank.weights.load import WeightLoader
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.reports.records import RankReport, RankTrace
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.request import RankRequest
from crossdock.runtime.watch.faults import AGREED
from crossdock.runtime.watch.flight_recorder import FlightRecorder, Neighbours

_INTERFACE_VARIABLES = ("GLOO_SOCKET_IFNAME", "NCCL_SOCKET_IFNAME")
"""Where gloo and NCCL listen; by default at the address of the machine's name. Whoever sets them knows better."""


class RankWorker:
    """Hosted by a process that some launcher started, which tells it its place and how to meet the others."""

    def __init__(self, rank: int, world_size: int, device: torch.device, holder: StoreHolder | None = None) -> None:
        """`holder`: keeps host memory beyond this rank."""
        self.rank = rank
        self.world_size = world_size
        self.device = device
        self.holder = holder
        self.on_progress: Callable[[int], None] | None = None
        self.phase = "idle"
        self.stopping = Stopping()
        self.world: Group | None = None  # all ranks, once they have met
        self.model_steps = 0  # of the model that is loaded
        self._recorder, self._neighbours = FlightRecorder(self._place), Neighbours()
        self._mesh: Mesh | None = None  # of the model that is loaded, or is being loaded
        self._brought = 0, 0  # bytes of the weights that are at their homes, and all that this rank brings there
        self._loaded: LoadedModel | None = None
        self._state: RequestState | None = None  # of the request under way, or that a fault ended
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
            self._neighbours = Neighbours.of(self.rank, self.exchange(self._recorder.open()))
            self._recorder.attach(self.world)

    def exchange(self, value: object) -> list[Any]:
        """`value` of every rank, by rank. Collective over the world."""
        return exchange(value, self.world)

    def device_bytes(self) -> int:
        """Memory of this rank's device."""
        return total_bytes(self.device)

    def setup(self, plan: RunPlan, probe: bool = False, rehearse: bool = False, thorough: bool = False) -> RankReport:
        """Load, shard and stream the model of `plan`; the report says what this rank now holds. Collective.

        Args:
            probe: compare all bytes that arrive on the device with the checkpoint, not a sample. With a rehearsal.
            rehearse: stream every block once and compare it, instead of in the first step.
            thorough: compare all bytes, whenever they arrive.
        """
        began = time.perf_counter()
        allocated = allocated_bytes(self.device)
        rehearse = rehearse or probe
        layout, memory = plan.layout, plan.memory
        self.phase = "connect"
        if self._mesh is not None:  # of a load that was given up, as another plan was wanted
            self._mesh.disconnect()
        timeout_s = plan.config.launch.timeouts.collective_s
        self._mesh = mesh = Mesh.connect(layout.mesh, self.rank, timeout_s, self.world)
        for group in filter(None, mesh.groups.values()):
            self._recorder.attach(group)
        self.phase = "load"
        model = build_transformers(layout.spec.transformer, layout.model_dir, layout.transformers)
        issued = AtRunTime(lambda: stream.collective_issued())
        parallelism = ModelParallelism.apply(model, plan, mesh, issued)
        check = WeightCheck(layout, memory.outside, self.rank, model, full=probe or thorough)
        files = stamps(plan)
        if plan.config.offload.host == "mmap":
            check.pin(memory.blocks)
        loader = WeightLoader(plan, mesh, model, self.device, self.holder, self._bring)
        weights = loader.load_blocks()
        loader.load_outside()
        loader.close()
        copy_engine = make_copy_engine(self.device, timeout_s)
        arena = None if memory.arena_bytes is None else Arena(memory.arena_bytes, self.device)
        stream = BlockStream(
            weights.blocks,
            memory.schedule,
            self.device,
            copy_engine,
            gather_of(mesh),
            resident=memory.resident,
            passes=memory.passes,
            arena=arena,
            yield_to_collectives=self.device.type == "cuda" and self.world_size > 1,
        )
        stream.attach()
        for pass_, transformer in enumerate(transformers_in(model).values()):
            transformer.register_forward_pre_hook(partial(self._begin_forward, stream, pass_))
        for module in model.modules():
            if isinstance(module, EXCHANGING):
                module.register_forward_hook(lambda *_: issued())
        pipeline = RankPipeline(plan, mesh, model, self.device, copy_engine, arena)
        arrivals = ArrivalWatch(plan, model, stream, check, pipeline.components, files)
        pipeline.observe_uses(arrivals.component_used)
        made = (mesh, model, parallelism, weights, copy_engine, arena, stream, pipeline, check, arrivals)
        watch = StepWatch(plan, model, weights.blocks, self.device)
        self._loaded = loaded = LoadedModel(plan, self.device, *made, watch, time.perf_counter() - began)
        self.model_steps = 0
        self.phase = "rehearsal" if rehearse else "verify"
        check.begin(stream, rehearse=rehearse)
        self.phase = "idle"
        report = loaded.report(None if allocated is None else (allocated_bytes(self.device) or 0) - allocated)
        if not rehearse:
            check.watch(stream)  # now, so that nobody waits while slots are being poisoned
        return report

    @property
    def ready(self) -> bool:
        """Whether a model is loaded."""
        return self._loaded is not None

    @property
    def loaded(self) -> LoadedModel:
        """
        Raises:
            RuntimeError: nothing is loaded.
        """
        if self._loaded is None:
            raise RuntimeError(f"rank {self.rank} has no model: setup comes first")
        return self._loaded

    def report(self) -> RankReport:
        """What this rank holds now, read off the live model."""
        return self.loaded.report()

    def status(self) -> RankStatus:
        """What this rank is doing right now; for another thread."""
        loaded, state, mesh, denoises = self._loaded, self._state, self._mesh, self.phase == "denoise"
        latest = loaded.stream.latest() if loaded is not None and denoises else None
        return RankStatus(
            self.rank,
            socket.gethostname(),
            os.getpid(),
            self.phase,
            state.log.running if denoises and state is not None else None,
            latest[1] if latest else None,
            bool(latest and latest[0] == "wait_begin"),
            self.kept.step if self.kept is not None else 0,
            (*(mesh.records() if mesh is not None else ()), *([self.world.record()] if self.world is not None else [])),
            self._neighbours.lost(),
            *self._brought,
        )

    def _bring(self, read_bytes: int, all_bytes: int) -> None:
        self._brought = read_bytes, all_bytes

    def _place(self, group: str) -> str:
        """Where this rank is, for a collective of that group."""
        loaded, state = self._loaded, self._state
        if self.phase != "denoise" or loaded is None or state is None:
            return self.phase
        event, block = loaded.stream.latest("gather" if group == "weights" else "compute") or ("", "")
        where = f", {'after ' * (event == 'compute_end')}block {block}" if block else ""
        return f"step {state.log.running}{where}"

    @property
    def snapshots(self) -> tuple[Snapshot, ...]:
        """The newest two of the request under way, oldest first, on the first rank of a replica. For any thread."""
        state = self._state
        return state.snapshots if state is not None else ()

    @property
    def kept(self) -> Snapshot | None:
        """The newest of the snapshots. For any thread."""
        return next(reversed(self.snapshots), None)

    def cancel(self, reason: str, request_number: int) -> None:
        """Stop that request, on all ranks, at the end of the step that runs. For any thread, on any rank."""
        self.stopping.cancel(reason, request_number)

    def generate(self, request: RankRequest, resume: Sequence[Snapshot | None] | None = None) -> RankResult:
        """The prompts, spread evenly over the replicas. Collective.

        Args:
            resume: per replica, where to go on, all after the same step; None: from the beginning.

        Raises:
            RequestError: `resume` does not fit the request or the mesh.
            RequestCancelled, RequestRefused: as asked, or as the pipeline does not take it; the next may follow.
            RankError: the ranks do not run the same steps.
        """
        self.phase, loaded = "encode", self.loaded
        loaded.copy_engine.reset_clock()
        if self.device.type == "cuda":
            torch.cuda.reset_peak_memory_stats(self.device)
        self.stopping.begin(request)
        self._state = state = RequestState.begin(request, loaded, resume)
        loaded.watch.begin()
        loaded.arrivals.begin(request.asked.steps)
        try:
            done, refused = self._run(state, request)
        except AGREED:
            self._finish_request()
            raise
        result = self._result(state, done, time.perf_counter(), refused)
        if state.decodes and not refused:
            result.latents, result.returned_latents = done.latents, done.returned
            result.media, result.refused = done.media or [], done.refused
        self._finish_request()
        return result

    def teardown(self) -> None:
        """Give the model up and leave the groups of its mesh; `setup` may follow."""
        loaded, self._loaded, self._state = self._loaded, None, None
        if loaded is None:
            return
        loaded.detach()
        store, mesh = loaded.weights.store, loaded.mesh
        del loaded
        gc.collect()
        if store is not None:
            if self.holder is not None:
                self.holder.drop()
            store.close()
        mesh.disconnect()
        self._mesh = None  # the records of its groups are not the next one's

    def leave(self) -> None:
        """Leave the world."""
        if dist.is_initialized():
            dist.destroy_process_group()

    # -- parts of generate ---------------------------------------------------------------------------------------

    def _begin_forward(self, stream: BlockStream, pass_: int, *_: object) -> None:
        self.phase = "denoise"
        stream.prepare(pass_)

    def _run(self, state: RequestState, request: RankRequest) -> tuple[Denoised, bool]:
        """What the pipeline gave, and whether the ranks ended it, as what they report of a step will be refused."""
        loaded, replicas = self.loaded, self.loaded.mesh.shape.dp
        hooks = partial(self._on_step, state), state.resume, partial(self._begin_decode, state), loaded.watch
        try:
            begin_steps = partial(self.stopping.begin_steps, replicas)
            return loaded.pipeline.run(state.items, request.asked, *hooks, begin_steps), False
        except StepRefusedError:
            return Denoised.nothing(time.perf_counter()), True
        except ValueError as error:
            if (text := refusal(error)) is None:
                raise
            loaded.stream.settle()
            self.stopping.refuse(f"{loaded.plan.layout.spec.pipeline} refuses this: {text}", replicas)

    def _begin_decode(self, state: RequestState) -> bool:
        self.phase = "decode"
        return state.decodes

    def _on_step(self, state: RequestState, end: StepEnd) -> None:
        if end.repeated:
            state.log.count_from_here()
        else:
            state.log.end_step()
            self.model_steps += 1
        loaded, mesh = self.loaded, self.loaded.mesh.shape
        finite, alike = loaded.watch.end_step(end)
        arrived = loaded.arrivals.end_step(end.finished, end.total) and not loaded.weight_check.differ
        refuse = not arrived or not finite
        self.stopping.agree(end.finished, end.total, refuse, alike, (mesh.dp, mesh.dp * mesh.cfg))
        state.keep(end)
        if end.repeated:
            return
        if self.model_steps == MEASURED_STEPS and self.loaded.plan.memory.order:
            self._reschedule(state)
        if self.on_progress is not None:
            self.on_progress(end.finished)

    def _finish_request(self) -> None:
        self.stopping.end()
        self.loaded.watch.forget()
        self.loaded.arrivals.forget()
        self._state = None
        self.phase = "idle"

    def _reschedule(self, state: RequestState) -> None:
        """Look at the schedule again, with what the first steps have shown. Collective; every rank decides alike."""
        loaded = self.loaded
        stream, arena = loaded.stream, loaded.arena
        seen = observe(loaded.plan.memory, stream.recorded_order, stream.trace(), spare_bytes(self.device))
        found = reschedule(loaded.plan.memory, loaded.plan.config.offload, self.exchange(seen), self.model_steps)
        memory = found.memory or loaded.plan.memory
        plan = replace(loaded.plan, memory=memory)
        self._loaded = loaded = replace(loaded, plan=plan, schedule_note=found.schedule_note)
        if found.memory is None:
            return
        if arena is not None and memory.arena_bytes != arena.nbytes:
            arena.resize(memory.arena_bytes or 0)
        stream.reschedule(memory.schedule, memory.resident, memory.order)
        before = stream.upcoming
        if loaded.arrivals.looks:
            loaded.weight_check.watch_again(stream)
        stream.rehearse()
        state.changed = loaded.report()  # now: later, another component may have the memory
        # belongs to no step; with what it fetched ahead: the report waited for that
        state.log.rehearsed = range(before, stream.upcoming)

    def _result(self, state: RequestState, done: Denoised, decoded: float, refused: bool = False) -> RankResult:
        """What the coordinator judges; `decoded` of `time.perf_counter`. Collective where blocks have yet to come."""
        loaded, log = self.loaded, state.log
        issued = loaded.issued()  # first: the trace then has what gathers ahead noted, on all ranks alike
        events, spans = log.events(), log.spans(done.encodes, done.end_s, decoded)
        phases = {"load": loaded.load_s, "encode": done.encode_s, "denoise": done.denoise_s}
        phases["decode"] = decoded - done.end_s
        held = self.rank, self.device, loaded.weights, loaded.modules
        measurements = log.measurements(*held, events, done.step_ms, phases)
        timeline = RankTrace(self.rank, measurements.host, measurements.device, events, spans)
        loaded.stream.rehearse(unseen=True)  # blocks that a cache skipped in the first request
        arrived = loaded.arrivals.end(loaded.weights.ranges, refused)
        result = RankResult(
            self.rank,
            measurements,
            timeline,
            log.before,
            loaded.stream.scheduled_at,
            issued,
            record_reads(loaded.stream),
            loaded.weight_check.unreported(),
            loaded.schedule_note,
            loaded.watch.end(),
            arrived,
        )
        if state.changed is not None:
            result.memory, result.report = loaded.plan.memory, state.changed
        return result
