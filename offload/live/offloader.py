"""Streaming a live model: any `nn.Module` that has its weights, such as a text encoder, a VAE, or a user's own model.

    with LayerwiseOffloader(model, torch.device("cuda"), budget_bytes=8 * 2**30) as offloader:
        model(x)
        model(x)
        offloader.reschedule()  # what stays on the device is chosen anew, now that the blocks' costs are known

A model may come already sharded by `parallelize_module`: every rank streams its own part of each DTensor, and nothing
is collective. The sharded transformer of a run does not come this way: its bytes go straight from the checkpoint to
where they rest.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from types import TracebackType
from typing import Literal, Self

import torch
from torch import Tensor, nn

from crossdock.offload.codecs.codec import IDENTITY, Codec, encoded, staging_bytes
from crossdock.offload.codecs.part_format import IncompressibleError
from crossdock.offload.live.discovery import (
    FoundBlock,
    PlainTensor,
    discover_blocks,
    move_plain_tensors,
)
from crossdock.offload.live.foreign import refuse_foreign
from crossdock.offload.live.live_turns import Instead, LiveTurns
from crossdock.offload.live.parts import codec_of, component_layouts, held_bytes
from crossdock.offload.live.resting import ATTACHED, LiveModelError, Place, lay_down, take_up
from crossdock.offload.memory.arena import Arena
from crossdock.offload.memory.copy_engine import CopyEngine, make_copy_engine
from crossdock.offload.memory.host_memory import host_memory, require
from crossdock.offload.memory.host_store import HostStore
from crossdock.offload.memory.layout import (
    ALIGNMENT,
    BlockLayout,
    TensorEntry,
    aligned_bytes,
    local_part,
    set_local_part,
)
from crossdock.offload.schedule.residency import (
    WORTHWHILE,
    Residency,
    assumed_costs,
    minimum_bytes,
    plan_residency,
    steady_step_s,
)
from crossdock.offload.stream.block import Home, StreamedBlock
from crossdock.offload.stream.block_stream import BlockStream
from crossdock.offload.stream.measured_costs import measured_costs

_WAY_OUT = "load the model in a smaller dtype, or end what else takes host memory"

OUTSIDE = "(outside)"
"""The name of the part of a model that belongs to no block."""


class LayerwiseOffloader:
    """Keeps a model's blocks in host memory and streams each to `device` when it runs.

    Args:
        model: with its weights, on any device; their memory is given up while the offloader is attached.
            Its parameters and buffers are plain tensors or DTensors.
        budget_bytes: device memory for the weights of this rank; as many blocks as fit stay there. None: as few bytes
            as possible.
        stacks: paths of the block lists; by default what the class declares, or what looks like one. `()`: the whole
            model moves as one.
        outside: what belongs to no block stays on the device ("resident"), or is there inside `present` ("held").
        arena: device memory that is shared with other components; by default memory of its own.
        codec: "lossless" lets blocks of bf16 and fp16 weights rest and travel as fewer bytes, decoded in their slots to
            the same bits; those that it makes smaller, and that hold no DTensor. Their tensors at rest are read, not
            written.

    Raises:
        DiscoveryError: the block lists are not to be found, or make no sense.
        ForeignMechanismError: another mechanism moves, shards or quantizes the weights (FSDP, offload hooks).
        HostMemoryError: the host copy of what is streamed does not fit into host memory beside the model.
        ValueError: the budget is too small.
    """

    @torch.inference_mode(False)  # whose tensors do not tell when they are written to
    def __init__(
        self,
        model: nn.Module,
        device: torch.device,
        *,
        budget_bytes: int | None = None,
        prefetch: int = 1,
        stacks: Sequence[str] | None = None,
        outside: Literal["resident", "held"] = "resident",
        arena: Arena | None = None,
        engine: CopyEngine | None = None,
        codec: Literal["none", "lossless"] = "none",
    ) -> None:
        refuse_foreign(model, device)
        found = [] if stacks is not None and not stacks else discover_blocks(model, stacks)
        layouts, rest = component_layouts(model, found)
        codecs = [codec_of(layout, codec == "lossless") for layout in layouts]
        sizes = [layout.slot_bytes for layout in layouts]
        travel_sizes = [each.travel_bytes(layout, 1) for each, layout in zip(codecs, layouts, strict=True)]
        staging = max(map(staging_bytes, codecs, layouts), default=0)
        if budget_bytes is not None:
            budget_bytes = _for_blocks(budget_bytes, rest.slot_bytes + staging, minimum_bytes(sizes, (prefetch,)))
        costs = assumed_costs(sizes, travel_sizes)
        self._residency = plan_residency(sizes, costs, budget_bytes, (prefetch,), travel_sizes)
        self._order = tuple(range(len(sizes)))
        self._budget_bytes, self._prefetch = budget_bytes, prefetch
        self._device = device
        self._held = outside == "held"
        self._stores: list[HostStore] = []
        self._lent: list[_Lent] = []
        self._plain: list[PlainTensor] = []
        self._modules: tuple[nn.Module, ...] = ()
        self._owns_engine = engine is None
        self._engine = engine or make_copy_engine(device)
        with ExitStack() as undo:
            undo.callback(self._give_back)
            blocks = self._place(model, found, layouts, rest, codecs)
            self._plain = move_plain_tensors(model, device)
            if arena is None and budget_bytes is not None:  # all of it: another choice may need more than this one
                arena = Arena(min(budget_bytes, sum(sizes)) + staging + (rest.slot_bytes if self._held else 0), device)
            turns = LiveTurns(blocks, device, self._engine, lambda index: self.stream.turn(index))
            self.stream = BlockStream(
                blocks,
                self._residency.schedule,
                device,
                self._engine,
                resident=self._residency.resident,
                arena=arena,
                turns=turns,
            )
            undo.callback(self.stream.remove)
            self._lend(blocks, turns)
            undo.pop_all()
        self._modules = (*model.modules(),)
        ATTACHED.update(self._modules)
        vars(model)["_apply"] = Instead(model, "_apply", partial(self._convert, turns))

    @property
    def plain_tensors(self) -> tuple[str, ...]:
        """Names of tensors that are neither parameters nor buffers; they are on the device meanwhile."""
        return tuple(plain.name for plain in self._plain)

    @property
    def turn_bytes(self) -> int:
        """What the model uses of its arena."""
        return self.stream.slots_bytes

    @contextmanager
    def present(self) -> Iterator[None]:
        """The component's turn on the device: around every use of the model when its outside is held."""
        with self.stream.hold(OUTSIDE) if self._held else nullcontext():
            self.stream.prepare()
            yield

    @torch.inference_mode(False)
    def reschedule(self) -> Residency | None:
        """Choose again what stays on the device, by what the blocks cost when they ran. Between two runs of the model.

        At least one run and the beginning of the next have to be over; the least cost of all runs counts. Parameters
        get new addresses: a CUDA graph that was captured before is of no use afterwards.

        Returns:
            The new choice, by the blocks' places in the order of their run. None: there is nothing to choose (no
            budget), not all blocks ran, or a step would get shorter by less than 2%.
        """
        order = self.stream.recorded_order
        if self._budget_bytes is None or order is None:
            return None
        blocks = [self.stream.blocks[index] for index in order]
        sizes = [block.layout.slot_bytes for block in blocks]
        travel_sizes = [block.held_bytes for block in blocks]
        costs = measured_costs(self.stream.trace(), [block.name for block in blocks], travel_sizes)
        if costs is None:
            return None
        better = plan_residency(sizes, costs, self._budget_bytes, (self._prefetch,), travel_sizes)
        if order == self._order:  # else the slots are not even in the order of the run
            now_s = steady_step_s(costs, self._residency.resident, self._residency.schedule)
            if better.step_s > now_s * (1 - WORTHWHILE):
                return None
        self._residency, self._order = better, order
        self.stream.reschedule(better.schedule, [order[place] for place in better.resident], order)
        return better

    def improve(self) -> Residency | None:
        """The former name of `reschedule`, for one version."""
        message = "LayerwiseOffloader.improve is deprecated; call reschedule"
        warnings.warn(message, DeprecationWarning, stacklevel=2)
        return self.reschedule()

    def gathered(self, name: str, write_back: bool = False) -> AbstractContextManager[dict[str, Tensor]]:
        """The true weights of the block called `name`, as the block holds them; see `BlockStream.gathered`.

        A DTensor comes as a DTensor of the same placements, whose local part is this rank's: what is done to it in
        place is done to the local part, and its `full_tensor()` is collective.
        """
        return self.stream.gathered(name, write_back)

    def hold(self, name: str) -> AbstractContextManager[None]:
        """Keep the block called `name` on the device meanwhile: what it has then is what computes."""
        return self.stream.hold(name)

    def remove(self) -> None:
        """Give the model back as it was: the same tensor objects, bits, strides and devices, and none of our hooks.

        What was written to its tensors, and what it was given in place of them, stays. A second call does nothing.
        """
        if self._detach():
            self._give_back()

    def discard(self) -> None:
        """Take the hooks off and give the memory up. The model is of no use afterwards."""
        if not self._detach():
            return
        for lent in self._lent:
            take_up(lent.tensor)
            set_local_part(lent.tensor, local_part(lent.tensor).new_empty(0))
        self._end()

    def _detach(self) -> bool:
        """Whether it was attached."""
        if not self._modules:
            return False
        vars(self._modules[0]).pop("_apply", None)
        ATTACHED.difference_update(self._modules)
        self._modules = ()
        self.stream.remove()
        return True

    def _convert(self, turns: LiveTurns, act: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """`Module._apply` (`to`, `half`, ...) of the model: refused if it would change a tensor that is streamed."""
        model, owned = self._modules[0], turns.owned()
        every = [kept for module in model.modules() for kept in (module._parameters, module._buffers)]
        tensors = [tensor for kept in every for tensor in kept.values() if tensor is not None]
        for dtype in {tensor.dtype for tensor in tensors if id(tensor) in owned}:
            probe = torch.empty(0, dtype=dtype, device=self._device)
            found = act(probe)
            if (found.dtype, found.device) != (dtype, probe.device):
                raise LiveModelError(
                    f"{type(model).__name__} is streamed to {self._device} as {dtype} and cannot become {found.dtype} "
                    f"on {found.device}: call the offloader's remove(), convert the model, attach it again"
                )
        for tensor in tensors:
            if id(tensor) not in owned:
                tensor.data = act(tensor.data)
        return model

    def _give_back(self) -> None:
        for lent in self._lent:
            take_up(lent.tensor)
            lent.give_back()
        for plain in self._plain:
            plain.put_back()
        self._end()

    def _end(self) -> None:
        self._lent.clear()
        if self._owns_engine:
            self._engine.close()
        for store in self._stores:
            store.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.remove()

    def _place(
        self,
        model: nn.Module,
        found: Sequence[FoundBlock],
        layouts: Sequence[BlockLayout],
        rest: BlockLayout,
        codecs: Sequence[Codec],
    ) -> list[StreamedBlock]:
        """The bytes of the blocks and of the rest, copied to where they will rest."""
        needed = sum(map(held_bytes, layouts, codecs)) + (held_bytes(rest) if self._held else 0)
        require(needed, f"{type(model).__name__}: a host copy of its weights", host_memory(), _WAY_OUT)
        blocks = [
            self._on_host(block.name, block.module, layout, codec)
            for block, layout, codec in zip(found, layouts, codecs, strict=True)
        ]
        if self._held:
            return [*blocks, self._on_host(OUTSIDE, model, rest, IDENTITY, is_called=False)]
        return [*blocks, _on_device(model, rest, self._device)]

    def _lend(self, blocks: Sequence[StreamedBlock], turns: LiveTurns) -> None:
        """Attach the stream, and let go of the memory that the model's tensors had."""
        lent = [
            _Lent(tensor, local_part(tensor).device, entry, block, host, partial(turns.finish_block, index))
            for index, block in enumerate(blocks)
            for entry, tensor, host in zip(block.layout.entries, block.tensors(), turns.hosts(index), strict=True)
        ]
        self.stream.attach()
        for tensor in lent:
            self._lent.append(tensor)
            tensor.lend(self._device)

    def _on_host(
        self, name: str, module: nn.Module, layout: BlockLayout, codec: Codec, is_called: bool = True
    ) -> StreamedBlock:
        """One store per block, so that `remove` never holds the model twice. What the codec makes no smaller after all
        rests as it is.
        """
        held = None
        if not codec.in_place:
            raw = torch.zeros(layout.slot_bytes, dtype=torch.uint8)
            layout.pack(module, raw)
            try:
                held = encoded(codec, layout, 1, 0, raw.to(self._device))
            except IncompressibleError:
                codec = IDENTITY
        store = HostStore.create(held_bytes(layout, codec), name="crossdock-component")
        self._stores.append(store)
        if held is None:
            layout.pack(module, store.bytes)
        else:
            store.bytes.copy_(held)
        if self._device.type == "cuda":
            store.register()
        return StreamedBlock(name, module, layout, Home.HOST, store.bytes, is_called, codec)


@dataclass(frozen=True)
class _Lent:
    """A tensor of the model whose bytes rest elsewhere while the offloader is attached.

    `host`: the very memory; None where the block rests encoded.
    """

    tensor: Tensor
    device: torch.device
    entry: TensorEntry
    block: StreamedBlock

    host: Tensor | None
    finish: Callable[[], None]

    def lend(self, device: torch.device) -> None:
        set_local_part(self.tensor, self.entry.hollow() if self.host is None else self.host)
        name = f"{self.block.name}.{self.entry.name}" if self.block.is_called else self.entry.name
        lay_down(self.tensor, Place(name, self.host, self._decoded, device, self.finish))

    def give_back(self) -> None:
        set_local_part(self.tensor, self.entry.of(self._bytes().to(self.device, copy=self.host is not None)))

    def _bytes(self) -> Tensor:
        assert isinstance(self.block.source, Tensor)
        return self.block.codec.tensor_bytes(self.block.layout, self.entry, self.block.source)

    def _decoded(self) -> Tensor:
        return self.entry.of(self._bytes())


def _on_device(model: nn.Module, layout: BlockLayout, device: torch.device) -> StreamedBlock:
    memory = aligned_bytes(layout.slot_bytes, device)
    layout.pack(model, memory)
    return StreamedBlock(OUTSIDE, model, layout, Home.RESIDENT, memory, is_called=False)


def _for_blocks(budget_bytes: int, rest_bytes: int, least_bytes: int) -> int:
    """What of a budget is left for the blocks; slots and the rest are allocated with a margin for their alignment."""
    fixed = rest_bytes + 2 * ALIGNMENT
    if budget_bytes < fixed + least_bytes:
        raise ValueError(f"budget_bytes: {budget_bytes} is below the minimum of {fixed + least_bytes} bytes")
    return budget_bytes - fixed
