"""arrives: what was computed with is what came first and was compared with the file, in every step.

When a block has computed, a digest of its memory is taken on the device before the memory is free, and compared with
that of its first arrival. Nobody waits: on CUDA a step's comparisons are read when the next one ends. In `rolling`
each step looks at one phase (see `digests`) of every block, another one in each step, and the last one of a request at
all of them; a block that was not in that last step is brought once more. Text encoders and decoders are looked at as a
whole after each use, what lies outside the blocks at the request's end.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, field
from functools import partial
from itertools import islice
from operator import attrgetter
from pathlib import Path
from typing import Self

import torch
from torch import Tensor, nn

from crossdock.offload.codecs.codec import decoded
from crossdock.offload.memory.layout import BlockLayout
from crossdock.offload.stream.block import StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.rank.weights.compare import WeightCheck
from crossdock.runtime.rank.weights.digests import phase_digest, phase_digests, phases_of, read_later, tensor_digest
from crossdock.runtime.reports.records import WeightsRecord, WrongBytes

Component = tuple[nn.Module, BlockStream | None]
"""A text encoder or decoder, and what streams it, if anything does."""
Stamps = dict[Path, tuple[int, int, int] | None]
"""Size, time of change and number of each file; None: it is gone."""
_LOCATED = 4
"""Of how many blocks whose bytes were wrong it is looked up which tensor it was."""


@dataclass
class _Looks:
    """Comparisons that were not read yet: of each (step, name, how many digests), one after the other."""

    names: list[tuple[int, str, int]] = field(default_factory=list)
    found: list[Tensor] = field(default_factory=list)
    known: list[Tensor] = field(default_factory=list)


@dataclass(frozen=True)
class _Outside:
    """A tensor outside the blocks, as it was after the load. What the model computes itself it may compute anew."""

    tensor: Tensor
    digest: Tensor
    version: int
    is_stored: bool

    @classmethod
    def of(cls, tensor: Tensor, is_stored: bool) -> Self:
        return cls(tensor, tensor_digest(tensor), tensor._version, is_stored)

    def differs(self, now: Tensor) -> bool:
        if not self.is_stored and (now is not self.tensor or now._version != self.version):
            return False
        return not torch.equal(tensor_digest(now), self.digest)


class ArrivalWatch:
    """Of one load. It looks at nothing outside of `begin` and `end` or `forget`."""

    def __init__(
        self,
        plan: RunPlan,
        model: nn.Module,
        stream: BlockStream,
        check: WeightCheck,
        components: Mapping[str, Component],
        files: Stamps,
    ) -> None:
        """Before `check` begins: what it compares first is what is known from then on.

        Args:
            components: the text encoders and decoders that this rank runs.
            files: as they were before anything was read of them.
        """
        self._plan, self._cuda = plan, plan.layout.device == "cuda"
        self._model, self._stream, self._check = model, stream, check
        self._components, self._files = components, files
        self._mode = plan.config.verify.arrivals
        self._known: dict[str, Tensor] = {}
        self._padding: dict[BlockLayout, Tensor] = {}
        self._written: dict[str, int] = {}
        self._outside: dict[str, _Outside] = {}
        self._phase = 0  # of the step that runs, modulo those of a block
        self._step, self._whole = 1, True
        self._now: _Looks | None = None
        self._sent: list[tuple[list[tuple[int, str, int]], Callable[[], list[int]]]] = []
        self._wrong: list[tuple[int, str]] = []
        self._partly: dict[str, None] = {}  # blocks of which, when they computed last, not all was looked at
        if not self.looks:
            return
        check.on_arrival = self.arrived
        stream.observe_uses(self._used, self._written_to)
        for name, (module, own) in components.items():
            check.component(name, module)
            if own is not None:
                own.observe_uses(partial(self._part_used, name), lambda names: None)
        self._outside = self._found_outside()

    @property
    def looks(self) -> bool:
        """Whether more than first arrivals are compared."""
        return self._mode != "first"

    def arrived(self, block: StreamedBlock, memory: Tensor) -> None:
        """These bytes (uint8, all of the block's) are being compared with the file."""
        self._clean(block, memory)
        if self._now is not None and block.name in self._known:
            self._look(block.name, self._step, memory, whole=True)  # it comes again, after a rescheduling
        else:
            self._known[block.name] = phase_digests(memory)

    def _written_to(self, blocks: Collection[str]) -> None:
        """On purpose: what they are now is what is right; also of tensors outside that they share."""
        for name in blocks:
            self._known.pop(name, None)
        self._outside = self._found_outside()

    def _found_outside(self) -> dict[str, _Outside]:
        outside = ((fqn, attrgetter(fqn)(self._model)) for fqn in self._plan.memory.outside)
        return {fqn: _Outside.of(tensor, fqn in self._plan.layout.stored) for fqn, tensor in outside}

    # -- a request -----------------------------------------------------------------------------------------------

    def begin(self, steps: int) -> None:
        """`steps`: how many there will be, as far as that is known."""
        self._now, self._sent, self._wrong = _Looks(), [], []
        self._partly.clear()
        self._step, self._whole = 1, self._mode == "every" or steps <= 1

    def forget(self) -> None:
        self._now, self._sent = None, []

    def end_step(self, finished: int, total: int) -> bool:
        """Whether all was right in the step that was read last."""
        self._send()
        self._phase += 1
        self._step, self._whole = min(finished + 1, total), self._mode == "every" or finished + 1 >= total
        self._read(left=self._cuda)
        return not self._wrong

    def end(self, ranges: Mapping[str, tuple[int, int]], refused: bool) -> WeightsRecord:
        """What was wrong. Waits for the device. Collective where blocks are gathered once more.

        Args:
            ranges: block -> which of its bytes rest here.
            refused: the request was broken off: nothing is brought any more.
        """
        if self._now is None or not self.looks:
            return WeightsRecord()
        if not refused:
            self._bring_again()
        self._send()
        self._read(left=False)
        self._now = None
        located = [self._located(*each, ranges) for each in self._wrong[:_LOCATED]]
        unlocated = [WrongBytes(step, name) for step, name in self._wrong[_LOCATED:]]
        changed = [fqn for fqn, before in self._outside.items() if before.differs(attrgetter(fqn)(self._model))]
        files = [str(file) for file, stamp in stamps(self._plan).items() if stamp != self._files[file]]
        return WeightsRecord((*located, *unlocated), tuple(changed), tuple(files))

    def _bring_again(self) -> None:
        """The blocks that were not in the last step, or not looked at as a whole."""
        self._whole = True
        for index in [index for index, block in enumerate(self._stream.blocks) if block.name in self._partly]:
            block = self._stream.blocks[index]
            if block.home.streamed:
                with self._stream.turn(index):
                    pass
            elif isinstance(block.source, Tensor):
                self._used(block, block.source)

    # -- what the streams and the components tell ----------------------------------------------------------------

    def _used(self, block: StreamedBlock, memory: Tensor) -> None:
        if self._now is None or self._has_written(block.name, block):
            return
        self._clean(block, memory)
        self._look(block.name, self._step, memory, self._whole)
        if self._whole:
            self._partly.pop(block.name, None)
        else:
            self._partly[block.name] = None

    def _part_used(self, component: str, block: StreamedBlock, memory: Tensor) -> None:
        name = f"{component}, {block.name}"
        if self._now is not None and not self._has_written(name, block):
            self._look(name, 0, memory, whole=True)

    def component_used(self, name: str) -> None:
        """A text encoder or decoder was used, and is still where it computes."""
        if self._now is None or not self.looks:
            return
        module, stream = self._components[name]
        if stream is not None:
            for block in stream.blocks:
                if not block.home.streamed and isinstance(block.source, Tensor):
                    self._part_used(name, block, block.source)
            return
        for fqn, tensor in module.named_parameters():
            digest = tensor_digest(tensor)
            self._compare(f"{name}, {fqn}", 0, digest, self._known.setdefault(f"{name}, {fqn}", digest))

    def _look(self, name: str, step: int, memory: Tensor, whole: bool) -> None:
        known, phases = self._known.get(name), phases_of(memory)
        if known is None:
            self._known[name] = phase_digests(memory)
        elif whole:
            self._compare(name, step, phase_digests(memory), known)
        elif phases:
            phase = self._phase % phases
            self._compare(name, step, phase_digest(memory, phase), known[phase : phase + 1])

    def _compare(self, name: str, step: int, found: Tensor, known: Tensor) -> None:
        assert self._now is not None
        self._now.names.append((step, name, len(found)))
        self._now.found.append(found)
        self._now.known.append(known)

    def _clean(self, block: StreamedBlock, memory: Tensor) -> None:
        """What is brought piece by piece, or decoded, leaves what lies between tensors as it was: zero from here."""
        if isinstance(block.source, Tensor) and block.codec.in_place:
            return
        if block.layout not in self._padding:
            self._padding[block.layout] = _between(block.layout).to(memory.device)
        memory.index_fill_(0, self._padding[block.layout], 0)

    def _has_written(self, name: str, block: StreamedBlock) -> bool:
        """A block may write its buffers: what it has then is not what came, and known anew when it writes no more."""
        buffers = [entry.name for entry in block.layout.entries if entry.kind == "buffer"]
        if not buffers:
            return False
        before, live = self._written.get(name, 0), dict(block.module.named_buffers())
        self._written[name] = sum(live[buffer]._version for buffer in buffers if buffer in live)
        if self._written[name] <= before:
            return False
        self._known.pop(name, None)
        return True

    # -- reading -------------------------------------------------------------------------------------------------

    def _send(self) -> None:
        """What was looked at so far goes to the host."""
        if self._now is None or not self._now.names:
            return
        looks, self._now = self._now, _Looks()
        device = looks.found[0].device
        found, known = (torch.cat([each.to(device) for each in side]) for side in (looks.found, looks.known))
        self._sent.append((looks.names, read_later(found != known)))

    def _read(self, left: int) -> None:
        """All that was sent but the last `left`."""
        while len(self._sent) > left:
            names, read = self._sent.pop(0)
            wrong = iter(read())
            for step, name, count in names:
                if any(list(islice(wrong, count))) and (step, name) not in self._wrong:
                    self._wrong.append((step, name))

    def _located(self, step: int, name: str, ranges: Mapping[str, tuple[int, int]]) -> WrongBytes:
        """The first tensor of a block that is not what the file has, now that the request is over."""
        block = next((block for block in self._stream.blocks if block.name == name), None)
        if block is None or not isinstance(block.source, Tensor):
            return WrongBytes(step, name)
        start, stop = ranges[name]
        parts, index = block.layout.slot_bytes // (stop - start), start // (stop - start)
        held = decoded(block.codec, block.layout, parts, index, block.source)
        return WrongBytes(step, name, self._check.first_difference(block, held, start, stop))


def _between(layout: BlockLayout) -> Tensor:
    """int64: the bytes of a layout that belong to no tensor."""
    free = torch.ones(layout.slot_bytes, dtype=torch.bool)
    for entry in layout.entries:
        free[entry.offset : entry.offset + entry.nbytes] = False
    return free.nonzero().reshape(-1)


def stamps(plan: RunPlan) -> Stamps:
    """Of the files that stay in use."""
    if plan.config.offload.host != "mmap":
        return {}
    found: Stamps = {}
    for file in sorted({stored.file for stored in plan.layout.stored.values()}):
        try:
            stat = file.stat()
            found[file] = stat.st_size, stat.st_mtime_ns, stat.st_ino
        except OSError:
            found[file] = None
    return found
