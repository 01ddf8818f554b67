"""What ranks tell the coordinator: what they hold before the first step, and what happened in each request."""

from __future__ import annotations

from dataclasses import dataclass, field

from crossdock.offload.stream.block import Home
from crossdock.offload.stream.trace import BlockTimes, TraceEvent
from crossdock.parallel.group import GroupRecord
from crossdock.parallel.tensor import TensorSlice

REPORT_IT = "this is a fault of crossdock or of a hook added to the model: report it with the report.json"
"""The remedy where nothing in the user's hands helps."""


@dataclass(frozen=True)
class MemorySpan:
    """Bytes [start, stop) of a process's address space, which host and device memory have no address of in common."""

    start: int
    stop: int

    @property
    def nbytes(self) -> int:
        return self.stop - self.start

    def holds(self, other: MemorySpan) -> bool:
        """All of `other` lies in it."""
        return self.start <= other.start and other.stop <= self.stop

    def common_bytes(self, other: MemorySpan) -> int:
        """How many bytes lie in both."""
        return max(0, min(self.stop, other.stop) - max(self.start, other.start))


@dataclass(frozen=True)
class TensorRecord:
    """One name of a parameter, a buffer or a tensor kept as a plain attribute, as found in the live model.

    Attributes:
        place: where its bytes lie: "slot 1", "block transformer_blocks.0" (resident), "outside" or "nowhere".
        offset: bytes from the start of that slot or block; 0 outside.
        device: as torch prints it; "meta" where it was never loaded.
        part: the slice of the checkpoint's tensor that was read; None: all of it.
        span: its bytes, from the first element to the last; None where it has none.
    """

    fqn: str
    place: str
    offset: int
    device: str
    dtype: str
    shape: tuple[int, ...]
    part: TensorSlice | None
    span: MemorySpan | None


@dataclass(frozen=True)
class HomeRecord:
    """Where one block rests. `start` and `stop` are the bytes of its `slot_bytes` that this rank holds, maybe encoded.

    `rest` is where it lies, None in the page cache, where it is scattered: `pages`. `stays` is the device memory that
    the block has for itself, None where it shares a slot. `code` is the name of what encodes it, `tables` a checksum of
    the bytes that say how the others are read. `read` is what the copies of its loads really read in the
    request, or those of the last one before it.
    """

    block: str
    home: Home
    slot: int | None
    slot_bytes: int
    start: int
    stop: int
    rest: MemorySpan | None
    stays: MemorySpan | None
    pages: tuple[MemorySpan, ...]
    read: tuple[MemorySpan, ...]
    code: str
    tables: int

    @property
    def held_bytes(self) -> int:
        """What rests here: in the page cache as it computes."""
        return self.stop - self.start if self.rest is None else self.rest.nbytes


@dataclass(frozen=True)
class ArrivalRecord:
    """A tensor that arrived on the device, compared with the checkpoint: checksums of the same `nbytes` bytes of both.

    `expected` is of the checkpoint's file (or of the buffer that the model computes), read on another way than the
    weights are; `found` of the device memory that the tensor is bound to.
    """

    fqn: str
    nbytes: int
    expected: int
    found: int


@dataclass(frozen=True)
class DeviceBytes:
    """What lies on a rank's device, in bytes.

    Attributes:
        weights: of the distinct storages that the transformer's parameters and buffers keep alive, whole.
        shards: at rest there, to be gathered.
        others: of the storages of plain attributes and of the pipeline's other components.
        allocated: by how much the device's allocator grew during setup; None where that is not known.
        rounding: what the allocator may have added to all these.
    """

    weights: int
    shards: int
    others: int
    allocated: int | None
    rounding: int


@dataclass(frozen=True)
class RankReport:
    """What a rank holds before the first step.

    Attributes:
        plain: tensors kept as plain attributes: neither parameters nor buffers, so that nothing moves them.
        slots: of the blocks that share them; `slot_bytes` are their sizes.
        arrivals: of every tensor of the transformer that has come to the device: in a rehearsal before the first step,
            or of those in streamed blocks, in that step.
        order: names of the streamed blocks in the order in which they will be fetched.
        foreign_hooks: offload or sharding hooks of other libraries: (module path, what).
        trace: under the present schedule; of a rehearsal, in which every block was streamed once, where there was one.
        collectives: what was issued on each of the mesh's groups so far.
    """

    rank: int
    tensors: tuple[TensorRecord, ...]
    plain: tuple[TensorRecord, ...]
    homes: tuple[HomeRecord, ...]
    order: tuple[str, ...]
    slot_bytes: tuple[int, ...]
    slots: tuple[MemorySpan, ...]
    arrivals: tuple[ArrivalRecord, ...]
    device_bytes: DeviceBytes
    foreign_hooks: tuple[tuple[str, str], ...]
    trace: tuple[TraceEvent, ...]
    collectives: tuple[GroupRecord, ...]


@dataclass(frozen=True)
class StepRecord:
    """A denoise step on one rank.

    Attributes:
        step: of the request, counted from 1.
        finite: so were its latents.
        not_finite_from: where the latents were not, the first block, or argument of the transformer, that was not;
            empty: none.
        not_finite_place: how many of these were looked at before it.
        inputs: quantity -> checksum, in the order in which they came up; alike on all ranks of a replica.
        branch: of what blocks were given; alike on the ranks of a guidance branch.
        latents: like `inputs`, at the step's end.
        computed: the blocks that were called: a key of `RunRecord.orders`.
    """

    step: int
    finite: bool
    not_finite_from: str
    not_finite_place: int
    inputs: dict[str, int]
    branch: dict[str, int]
    latents: dict[str, int]
    computed: int


@dataclass(frozen=True)
class RunRecord:
    """What a rank saw in the steps of a request, beside the block stream.

    Attributes:
        orders: the sequences in which blocks were called in a step, each once.
        unhooked: modules that have lost a hook since the load.
    """

    steps: tuple[StepRecord, ...] = ()
    orders: dict[int, tuple[str, ...]] = field(default_factory=dict)
    unhooked: tuple[str, ...] = ()


@dataclass(frozen=True)
class WrongBytes:
    """A block had other bytes, when it had computed, than when it first arrived.

    Attributes:
        step: of the request, counted from 1; 0: it is of a text encoder or a decoder.
        at_rest: the first tensor of what rests of it on this rank that is not what the file has; empty: none.
    """

    step: int
    block: str
    at_rest: str = ""


@dataclass(frozen=True)
class WeightsRecord:
    """What a rank saw of its weights in a request.

    Attributes:
        wrong: in the order in which it was seen.
        changed: tensors outside the blocks that are not what they were after the load.
        files: those that stay in use and have changed since the load.
    """

    wrong: tuple[WrongBytes, ...] = ()
    changed: tuple[str, ...] = ()
    files: tuple[str, ...] = ()


@dataclass(frozen=True)
class ComponentBytes:
    """Of a text encoder's or a VAE's blocks that rest in a rank's host memory: bytes at rest, bytes as they compute,
    and bytes that were copied to the device in the request.
    """

    held_bytes: int
    slot_bytes: int
    h2d_bytes: int


@dataclass(frozen=True)
class Measurements:
    """One rank's row of `report.json`, for one request. Sizes in bytes, times in ms; None where there is no CUDA.

    `*_per_step` are means over the request's denoise steps. `host_bytes` is what the rank maps of host stores;
    `host_pss_bytes` is its proportional share of them, shared pages divided by their users, as it was at the end of the
    first request after a load. `spare_device_bytes` was free even at the peak. `steps` and `blocks` are totals per
    step, and per block over the request, of the copy lane, the gather lane and the compute stream; their `wait_ms` is
    the exposed part of copying, and their `misses` add up to `misses` unless a load failed. `components`: of the
    transformer's neighbours, what the rank runs of them and streams.
    """

    rank: int
    host: str
    device: str
    peak_weight_bytes: int
    resident_weight_bytes: int
    slot_bytes: int
    shard_bytes: int
    host_bytes: int
    host_pss_bytes: int
    h2d_bytes_per_step: int
    gathered_bytes_per_step: int
    misses: int
    step_ms: list[float]
    peak_device_bytes: int | None
    reserved_device_bytes: int | None
    spare_device_bytes: int | None
    phases_s: dict[str, float]
    steps: list[BlockTimes]
    blocks: dict[str, BlockTimes]
    components: dict[str, ComponentBytes]


@dataclass(frozen=True)
class Span:
    """A phase on a rank; seconds on the node's monotonic clock."""

    name: str
    begin_s: float
    end_s: float


@dataclass(frozen=True)
class RankTrace:
    """What one rank did in one request."""

    rank: int
    host: str
    device: str
    events: tuple[TraceEvent, ...]
    spans: tuple[Span, ...]


@dataclass(frozen=True)
class Deviation:
    """How far what a block returned on a rank is from what it returns in the unsharded model.

    Attributes:
        call: of a transformer, from 1; in each guidance branch.
        error: the largest difference, relative to the largest value; inf where it cannot be told.
        own_error: the unsharded model's, to itself in float32; 0 where that is what it computes in.
        tokens: which ones the rank has; empty: all.
        found: what there is instead of tensors that can be compared; empty: they can.
    """

    call: int
    block: str
    error: float
    own_error: float = 0.0
    tokens: str = ""
    found: str = ""


@dataclass(frozen=True)
class ProbeReport:
    """One denoise step, run twice by one rank: checksums of what every call of a block returned, in order.

    Attributes:
        on: (block, checksum) of each call with streaming; the last entry is the final latents.
        off: the same without streaming, every block's weights read straight from the checkpoint's files.
        alone: the latter beside one rank's step of the unsharded model, block by block.
    """

    rank: int
    on: tuple[tuple[str, int], ...]
    off: tuple[tuple[str, int], ...]
    alone: tuple[Deviation, ...] = ()
