"""What one request did on one rank: its steps, their times, and what its block stream moved."""

from __future__ import annotations

import socket
import time
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import replace
from itertools import pairwise

import torch
from torch import nn

from crossdock.offload.memory.device_memory import spare_bytes
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.offload.stream.trace import TraceEvent, block_times, step_times
from crossdock.runtime.rank.inspection import device_weight_bytes
from crossdock.runtime.rank.weights.load import RankWeights
from crossdock.runtime.reports.records import ComponentBytes, Measurements, Span

_EVENTS_PER_BLOCK = 7
"""At most, in one pass."""


class RequestLog:
    """Counts from where the request's own steps begin: in a resumed one after the step that was repeated.

    Attributes:
        rehearsed: the numbers of the events that belong to no step.
        before: the last event of every slot before the steps, if it left the slot in a known state: a load that was
            under way, or failed, did not.
    """

    def __init__(self, stream: BlockStream, others: Mapping[str, BlockStream], skipped: int = 0) -> None:
        """`others`: what streams text encoders and VAE, by their names."""
        self._others = others
        self._others_before = {name: other.counters.h2d_bytes for name, other in others.items()}
        self.rehearsed = range(0)
        self._stream = stream
        self._skipped = skipped  # steps that were done before the request was resumed
        self._step_ends: list[int] = []  # per step, the number of the first event after it
        self._step_times: list[float] = []
        self._stream.keep_trace()
        self.count_from_here()

    @property
    def running(self) -> int:
        """The step that runs, counted from 1. For any thread."""
        return self._skipped + len(self._step_ends) + 1

    def count_from_here(self) -> None:
        self._before, self._since = replace(self._stream.counters), self._stream.upcoming
        self.before = self._last_of_slots()
        self._began_s = time.perf_counter()

    def end_step(self) -> None:
        self._step_ends.append(self._stream.upcoming)
        self._step_times.append(time.perf_counter())

    def events(self) -> tuple[TraceEvent, ...]:
        """What the block stream did in the steps: all of them, and nothing before is looked at."""
        return tuple(e for e in self._stream.trace(since=self._since) if e.sequence not in self.rehearsed)

    def _last_of_slots(self) -> tuple[TraceEvent, ...]:
        """As far as the last pass tells."""
        sharded = {block.name: block.home.sharded for block in self._stream.blocks}
        latest = {}
        for event in self._stream.trace(_EVENTS_PER_BLOCK * len(sharded)):
            if self._stream.scheduled_at <= event.sequence < self._since and event.kind != "wait_begin":
                latest[event.block if event.slot is None else event.slot] = event
        ended = (
            event
            for event in latest.values()
            if event.kind in ("gather_end", "compute_end") or (event.kind == "load_end" and not sharded[event.block])
        )
        return tuple(sorted(ended, key=lambda event: event.sequence))

    def spans(self, encodes: Sequence[Span], denoised_s: float, decoded_s: float) -> tuple[Span, ...]:
        """Encode, each step, decode; times are seconds of `time.perf_counter`."""
        encoded_s = max((span.end_s for span in encodes), default=denoised_s)
        begins = [self._began_s if self._skipped else encoded_s, *self._step_times]
        steps = [Span(f"step {n}", *times) for n, times in enumerate(pairwise(begins), self._skipped + 1)]
        return (*encodes, *steps, Span("decode", denoised_s, decoded_s))

    def measurements(
        self,
        rank: int,
        device: torch.device,
        weights: RankWeights,
        modules: Iterable[nn.Module],
        events: Sequence[TraceEvent],
        step_ms: Sequence[float],
        phases_s: Mapping[str, float],
    ) -> Measurements:
        """`modules`: all that this rank runs; `events`, `step_ms`: of the request's own steps."""
        counters, before = self._stream.counters, self._before
        steps = max(len(self._step_ends), 1)  # none, where only the decoding was left
        shards = sum(b.held_bytes for b in weights.blocks if b.home is Home.DEVICE_SHARD)
        slot_bytes = sum(memory.nbytes for memory in self._stream.slot_memory)
        held = device_weight_bytes(modules, device)
        cuda = device.type == "cuda"
        return Measurements(
            rank=rank,
            host=socket.gethostname(),
            device=torch.cuda.get_device_name(device) if cuda else "cpu",
            peak_weight_bytes=held + shards,
            resident_weight_bytes=held - slot_bytes,
            slot_bytes=slot_bytes,
            shard_bytes=shards,
            host_bytes=weights.store.nbytes if weights.store else 0,
            host_pss_bytes=weights.host_share_bytes,
            h2d_bytes_per_step=(counters.h2d_bytes - before.h2d_bytes) // steps,
            gathered_bytes_per_step=(counters.gathered_bytes - before.gathered_bytes) // steps,
            misses=counters.misses - before.misses,
            step_ms=[round(ms, 3) for ms in step_ms],
            peak_device_bytes=torch.cuda.max_memory_allocated(device) if cuda else None,
            reserved_device_bytes=torch.cuda.max_memory_reserved(device) if cuda else None,
            spare_device_bytes=spare_bytes(device) if cuda else None,
            phases_s=dict(phases_s),
            steps=step_times(events, self._step_ends),
            blocks=block_times(events),
            components={name: self._component(name, other) for name, other in self._others.items()},
        )

    def _component(self, name: str, stream: BlockStream) -> ComponentBytes:
        return ComponentBytes(
            held_bytes=sum(block.held_bytes for block in stream.blocks if block.home.streamed),
            slot_bytes=sum(block.layout.slot_bytes for block in stream.blocks if block.home.streamed),
            h2d_bytes=stream.counters.h2d_bytes - self._others_before[name],
        )
