"""A communicator: a process group with a name, and a record of the collectives that were issued on it.

Every collective of the ranks goes through one of these, so that two ranks can be compared: which ones they issued, in
which order, with which sizes; and which one a rank is waiting in.

Objects travel pickled, and what is unpickled can run code. They come over the connections of the process group, from
ranks of this very run, which run the same program: whoever speaks there was let in by the rendezvous, which is where
strangers are kept out (loopback, or a network that is trusted). Nothing is unpickled that was read from a store.

`torch.compile` traces what models use of a group as custom ops. Every run of the compiled code calls the same methods
as it would uncompiled, in the same order, so its record is the same. An op costs 40 us more per call than the method,
so nothing but compiled code uses them.
"""

from __future__ import annotations

import itertools
import threading
import time
import weakref
import zlib
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch._library.effects import EffectType
from torch.compiler import is_dynamo_compiling as traced

KEPT = 64
"""How many of a group's last collectives are kept by name."""


@dataclass(frozen=True)
class Collective:
    """One collective of a group.

    Attributes:
        number: from 1, in the group.
        what: the operation and what all ranks must agree on: dtype and sizes.
        place: where the rank was: its step and block.
    """

    number: int
    what: str
    place: str = field(default="", compare=False)

    def __str__(self) -> str:
        return f"{self.what} (number {self.number})"


@dataclass(frozen=True)
class GroupRecord:
    """What a rank has issued on one group.

    Attributes:
        ranks: the group's members, by their number in the world.
        issued: how many collectives, since the group was made.
        digest: of all of them, in order.
        last: the latest, oldest first.
        waiting_s: how long the latest has been under way; None: it is not.
    """

    name: str
    ranks: tuple[int, ...]
    issued: int
    digest: int
    last: tuple[Collective, ...]
    waiting_s: float | None


class Group:
    """`handle` talks to `ranks`; `name` is one of the mesh's. Its collectives return when the device has them (CUDA) or
    when they are done (CPU).
    """

    def __init__(self, handle: dist.ProcessGroup, name: str = "", ranks: Sequence[int] = ()) -> None:
        self.handle = handle
        self.name = name
        self.ranks = tuple(ranks) or tuple(dist.get_process_group_ranks(handle))
        self._issued = 0
        self._digest = 0
        self._last: deque[Collective] = deque(maxlen=KEPT)
        self._since: float | None = None
        self._lock = threading.Lock()
        self.observer: Callable[[Group, int, str], str] | None = None  # gets (number, what); tells the place
        self.hops: dict[int, Callable[[], None]] = {}  # of compiled code, by the address of what is received
        self._key = _register(name, self)

    @property
    def size(self) -> int:
        return len(self.ranks)

    @property
    def index(self) -> int:
        """This rank's place in the group."""
        return dist.get_rank(self.handle)

    def record(self, now_s: float | None = None) -> GroupRecord:
        """May be called from another thread.

        Args:
            now_s: of `time.monotonic`, where several groups are looked at; a collective that is waiting since long
                before it has also kept its thread from using the groups that were looked at earlier.
        """
        with self._lock:  # not the start of one collective with the number of the next
            since, now_s = self._since, time.monotonic() if now_s is None else now_s
            waiting_s = None if since is None else max(now_s - since, 0.0)
            return GroupRecord(self.name, self.ranks, self._issued, self._digest, tuple(self._last), waiting_s)

    def all_reduce(self, tensor: Tensor) -> None:
        """Sum of all ranks' `tensor`, in place."""
        if traced():
            tensor.copy_(_all_reduce(tensor, self._key))
            return
        with self._issue("all_reduce", tensor.dtype, tensor.numel()):
            dist.all_reduce(tensor, group=self.handle)

    def all_gather(self, output: Tensor, input: Tensor) -> None:
        """Fill `output` with the `input` of every rank, one after the other in group order."""
        if traced():
            output.copy_(_all_gather(input, self._key).view(output.shape))
            return
        newer = getattr(dist, "all_gather_single", None)  # torch 2.13 deprecates the other name
        with self._issue("all_gather", output.dtype, output.numel()):
            (newer or dist.all_gather_into_tensor)(output, input, group=self.handle)

    def all_gather_by_broadcasts(self, parts: Sequence[Tensor], meanwhile: Callable[[], None]) -> None:
        """Every rank's part, from its owner: as many broadcasts, all under way at once.

        Args:
            parts: in group order; one's own is sent.
            meanwhile: called while they are under way.
        """
        with self._issue("all_gather", parts[0].dtype, sum(part.numel() for part in parts)):
            works = [
                dist.broadcast(part, group=self.handle, group_src=owner, async_op=True)
                for owner, part in enumerate(parts)
            ]
            meanwhile()
            for work in works:
                assert work is not None
                work.wait()

    def all_to_all(
        self,
        arrived: Tensor,
        message: Tensor,
        receive_sizes: list[int],
        send_sizes: list[int],
        agreed: tuple[object, ...] = (),
    ) -> None:
        """`send_sizes[r]` elements of `message` to rank r, `receive_sizes[r]` of `arrived` from it.

        Args:
            agreed: what follows from the sizes of all ranks, and is the same on all of them.
        """
        if traced():
            arrived.copy_(_all_to_all(message, receive_sizes, send_sizes, *_told(agreed), self._key))
            return
        with self._issue("all_to_all", message.dtype, *agreed):
            dist.all_to_all_single(arrived, message, receive_sizes, send_sizes, group=self.handle)

    def pass_on(self, sent: Tensor, received: Tensor, agreed: tuple[object, ...] = ()) -> Callable[[], None]:
        """Start sending to the next rank and receiving from the previous one; returns what waits for both."""
        if traced():
            coming = _pass_on(sent, received.numel(), *_told(agreed), self._key)
            return lambda: cast(None, received.copy_(_arrive(coming, sent, self._key)))
        index = self.index
        following, previous = self.ranks[(index + 1) % self.size], self.ranks[index - 1]
        operations = [
            dist.P2POp(dist.isend, sent, following, self.handle),
            dist.P2POp(dist.irecv, received, previous, self.handle),
        ]
        self._begin("pass_on", sent.dtype, *agreed)
        requests = dist.batch_isend_irecv(operations)

        def arrive() -> None:
            for request in requests:
                request.wait()
            self._since = None

        return arrive

    def broadcast(self, tensor: Tensor, source: int) -> None:
        """`tensor` of the rank with index `source` in the group, to all."""
        with self._issue("broadcast", tensor.dtype, tensor.numel(), "from", source):
            dist.broadcast(tensor, group=self.handle, group_src=source)

    def broadcast_object(self, value: Any, source: int) -> Any:
        """`value` of the rank with index `source` in the group (pickled), on all."""
        envelope = [value]
        with self._issue("broadcast_object from", source):
            dist.broadcast_object_list(envelope, group=self.handle, group_src=source)
        return envelope[0]

    def all_gather_object(self, value: Any) -> list[Any]:
        """Every rank's `value` (pickled), in group order."""
        values: list[Any] = [None] * self.size
        with self._issue("all_gather_object"):
            dist.all_gather_object(values, value, group=self.handle)
        return values

    def close(self) -> None:
        dist.destroy_process_group(self.handle)

    def _begin(self, operation: str, *agreed: object) -> None:
        what = " ".join([operation, *map(str, agreed)])
        with self._lock:
            self._issued += 1
            self._digest = zlib.crc32(what.encode(), self._digest)
            place = "" if self.observer is None else self.observer(self, self._issued, what)
            self._last.append(Collective(self._issued, what, place))
            self._since = time.monotonic()

    @contextmanager
    def _issue(self, operation: str, *agreed: object) -> Iterator[None]:
        """A collective that raises stays the one that the rank was last waiting in."""
        self._begin(operation, *agreed)
        yield
        self._since = None


def exchange(value: Any, group: Group | None) -> list[Any]:
    """`value` of every rank of `group`, in its order; without a group there is one rank. Collective."""
    return [value] if group is None else group.all_gather_object(value)


# -- in compiled code: functions without effects on what they are given, which torch keeps in order ----------

_NAMED: weakref.WeakValueDictionary[str, Any] = weakref.WeakValueDictionary()
_COUNT = itertools.count()


class AtRunTime:
    """Calls `callback` whenever it is called; from compiled code when that runs, and not when it is traced."""

    def __init__(self, callback: Callable[[], None]) -> None:
        self.callback = callback
        self._key = _register("callback", self)

    def __call__(self) -> None:
        if traced():
            _call(self._key)
        else:
            self.callback()


def _register(name: str, holder: Any) -> str:
    """What compiled code calls `holder` by, which it does not keep alive."""
    key = f"{name} {next(_COUNT)}"
    _NAMED[key] = holder
    return key


def _find(key: str) -> Any:
    if (holder := _NAMED.get(key)) is None:
        raise RuntimeError(f"{key!r}, for which this code was compiled, is gone: compile it again")
    return holder


def _told(agreed: tuple[object, ...]) -> tuple[str, list[int]]:
    """`str` of each, with places for the numbers, which may be symbols while code is traced."""
    numbers: list[int] = []

    def told(value: object) -> str:
        if not isinstance(value, tuple | list):
            numbers.append(cast(int, value))
            return "{}"
        parts = ", ".join([told(each) for each in value])
        return f"[{parts}]" if isinstance(value, list) else f"({parts},)" if len(value) == 1 else f"({parts})"

    return " ".join([told(value) for value in agreed]), numbers


def _said(agreed: str, numbers: list[int]) -> tuple[str, ...]:
    return (agreed.format(*numbers),) if agreed else ()


def _op(fake: Callable[..., Tensor | None]) -> Callable[[Callable[..., Tensor | None]], Any]:
    """A custom op; `fake` gives the shape of what it returns."""

    def register(run: Callable[..., Tensor | None]) -> Any:
        name = f"crossdock::{run.__name__.strip('_')}"
        op = torch.library.custom_op(name, run, mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
        op.register_fake(fake)
        op.register_effect(EffectType.ORDERED)
        return op

    return register


@_op(lambda tensor, group: torch.empty_like(tensor, memory_format=torch.contiguous_format))
def _all_reduce(tensor: Tensor, group: str) -> Tensor:
    total = tensor.clone(memory_format=torch.contiguous_format)
    _find(group).all_reduce(total)
    return total


@_op(lambda tensor, group: tensor.new_empty(_find(group).size * tensor.numel()))
def _all_gather(tensor: Tensor, group: str) -> Tensor:
    output = tensor.new_empty(_find(group).size * tensor.numel())
    _find(group).all_gather(output, tensor.reshape(-1))
    return output


@_op(lambda message, receive_sizes, *_: message.new_empty(sum(receive_sizes)))
def _all_to_all(
    message: Tensor, receive_sizes: list[int], send_sizes: list[int], agreed: str, numbers: list[int], group: str
) -> Tensor:
    arrived = message.new_empty(sum(receive_sizes))
    _find(group).all_to_all(arrived, message.contiguous(), receive_sizes, send_sizes, _said(agreed, numbers))
    return arrived


@_op(lambda sent, elements, *_: sent.new_empty(elements))
def _pass_on(sent: Tensor, elements: int, agreed: str, numbers: list[int], group: str) -> Tensor:
    """What it returns is for `_arrive` only."""
    received, found = sent.new_empty(elements), _find(group)
    found.hops[received.data_ptr()] = found.pass_on(sent.contiguous(), received, _said(agreed, numbers))
    return received


@_op(lambda coming, sent, group: torch.empty_like(coming))
def _arrive(coming: Tensor, sent: Tensor, group: str) -> Tensor:
    """`sent` is kept until here."""
    _find(group).hops.pop(coming.data_ptr())()
    return coming.clone()


@_op(lambda callback: None)
def _call(callback: str) -> None:
    _find(callback).callback()
