"""Group: every operation against plain torch.distributed, and what is recorded of it.

Three gloo processes are started once, as this file run as a script; every rank writes down what it found, and the tests
read that. What the recording costs is printed by `python tests/test_group.py cost`.
"""

from __future__ import annotations

import contextlib
import json
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from datetime import timedelta
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing
from processes import run_ranks
from torch import Tensor

from crossdock.parallel.group import KEPT, Collective, Group, GroupRecord
from tiers import not_quick

RANKS = 3
TIME_LIMIT_S = 120
LATE_S = 0.6
SIZES = [[2, 1, 4], [3, 0, 2], [1, 5, 2]]
"""Row r: how many elements rank r sends to each rank."""
OPERATIONS = {
    "all_reduce": "all_reduce torch.float32 5",
    "all_gather": "all_gather torch.int64 6",
    "all_gather_by_broadcasts": "all_gather torch.uint8 12",
    "all_to_all": f"all_to_all torch.float32 {SIZES}",
    "pass_on": "pass_on torch.float64 (3, 1, 2)",
    "broadcast": "broadcast torch.float32 4 from 2",
    "broadcast_object": "broadcast_object from 1",
}
"""What each has to leave behind in the record, on all ranks."""
LATE = dict.fromkeys(OPERATIONS, (2, (0, 1))) | {"pass_on": (2, (0,)), "broadcast_object": (1, (0, 2))}
"""Who comes late, and who cannot go on without it."""


# -- in one process ------------------------------------------------------------------------------------------


@pytest.fixture
def lone(monkeypatch: pytest.MonkeyPatch) -> Group:
    """A group whose collectives do nothing."""
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: None)
    return Group(None, "tp", (0, 1))  # type: ignore[arg-type]


def test_a_record_is_of_one_moment(lone: Group) -> None:
    """Another thread never sees the number of one collective with the digest, the name or the time of another."""
    begun = [0.0]
    digests = [0]
    tensors = [torch.zeros(size) for size in range(7)]
    calls = 6000

    def issue() -> None:
        for number in range(1, calls + 1):
            begun.append(time.monotonic())
            lone.all_reduce(tensors[number % 7])

    twin = Group(None, "tp", (0, 1))  # type: ignore[arg-type]
    for number in range(1, calls + 1):
        twin.all_reduce(tensors[number % 7])
        digests.append(twin.record().digest)
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        thread = threading.Thread(target=issue)
        thread.start()
        looks = 0
        while thread.is_alive():
            record = lone.record()
            after = time.monotonic()
            looks += 1
            assert record.digest == digests[record.issued]
            assert [call.number for call in record.last] == list(range(1, record.issued + 1))[-KEPT:]
            assert record.waiting_s is None or record.waiting_s <= after - begun[record.issued]
    finally:
        sys.setswitchinterval(interval)
        thread.join()
    assert looks > 20
    assert lone.record() == twin.record()


def test_the_last_are_kept_by_name(lone: Group) -> None:
    """A record of a long run grows, or loses the newest."""
    for size in range(100):
        lone.all_reduce(torch.zeros(size))
    record = lone.record()
    assert record.issued == 100
    assert record.last[0] == Collective(100 - KEPT + 1, f"all_reduce torch.float32 {100 - KEPT}")
    assert record.last[-1] == Collective(100, "all_reduce torch.float32 99")
    assert str(record.last[-1]) == "all_reduce torch.float32 99 (number 100)"


@pytest.mark.parametrize(("first", "second"), [((1, 2), (2, 1)), ((1,), (1, 1)), ((1, 1), (2, 2))])
def test_digests_tell_sequences_apart(lone: Group, first: tuple[int, ...], second: tuple[int, ...]) -> None:
    """Order, count or sizes do not show in the digest."""
    other = Group(None, "tp", (0, 1))  # type: ignore[arg-type]
    for group, sizes in ((lone, first), (other, second)):
        for size in sizes:
            group.all_reduce(torch.zeros(size))
    assert lone.record().digest != other.record().digest


def test_a_look_from_before_the_start(lone: Group, monkeypatch: pytest.MonkeyPatch) -> None:
    """Groups are looked at with one time: a collective that began later waits for 0 s, one that is over not at all."""
    seen: list[GroupRecord] = []
    before = time.monotonic()
    monkeypatch.setattr(dist, "all_reduce", lambda tensor, group: seen.append(lone.record(before)))
    lone.all_reduce(torch.zeros(1))
    before += 7
    lone.all_reduce(torch.zeros(1))
    assert seen[0].waiting_s == 0.0
    assert seen[1].waiting_s == pytest.approx(7, abs=1)
    assert lone.record(before).waiting_s is None


# -- on three processes --------------------------------------------------------------------------------------

Found = dict[str, Any]


@pytest.fixture(scope="module")
def found(tmp_path_factory: pytest.TempPathFactory) -> list[Found]:
    """What every rank wrote down."""
    return run_ranks(__file__, tmp_path_factory.mktemp("gang"), RANKS, TIME_LIMIT_S)


@not_quick
@pytest.mark.parametrize("operation", OPERATIONS)
def test_gives_what_torch_gives(found: list[Found], operation: str) -> None:
    """A group's operation sends other bytes, to other ranks, or in another order."""
    assert [of_rank["right"][operation] for of_rank in found] == [True] * RANKS


@not_quick
@pytest.mark.parametrize("operation", OPERATIONS)
def test_is_recorded_the_same_on_all_ranks(found: list[Found], operation: str) -> None:
    """An operation is not counted, or its record has a size that only this rank has: uneven exchanges, ring hops."""
    for of_rank in found:
        record = of_rank["records"][operation]
        assert [call["what"] for call in record["last"]] == [OPERATIONS[operation]]
        assert (record["issued"], record["name"], record["ranks"]) == (1, operation, [0, 1, 2])
        assert record["waiting_s"] is None
        assert record["digest"] == found[0]["records"][operation]["digest"] != 0


@not_quick
def test_numbers_run_through_all_operations(found: list[Found]) -> None:
    """Operations of one group are counted apart, or in another order on another rank."""
    for of_rank in found:
        record = of_rank["records"]["all"]
        assert [call["number"] for call in record["last"]] == list(range(1, 15))
        assert [call["what"] for call in record["last"]] == [*OPERATIONS.values()] * 2
        assert record == found[0]["records"]["all"]


@not_quick
@pytest.mark.parametrize("operation", OPERATIONS)
def test_who_waits_is_seen_from_another_thread(found: list[Found], operation: str) -> None:
    """A rank that waits for a late one does not show it, shows another operation, or goes on to show it afterwards."""
    late, others = LATE[operation]
    for rank in others:
        seen = found[rank]["late"][operation]
        assert LATE_S / 2 < seen["longest_s"] < TIME_LIMIT_S, seen
        assert seen["what"] == [OPERATIONS[operation]]
        assert seen["grows"]
        assert seen["afterwards"] is None
    assert found[late]["late"][operation]["longest_s"] < LATE_S / 2


@not_quick
def test_a_hop_waits_until_it_arrives(found: list[Found]) -> None:
    """A hop that is under way is taken to be over as soon as it is started."""
    assert all(of_rank["hop"] == {"between": True, "afterwards": None} for of_rank in found)


@not_quick
def test_an_exception_leaves_it_as_the_one_waited_in(found: list[Found]) -> None:
    """The collective that failed is not told any more once its exception is handled."""
    for of_rank in found:
        assert of_rank["failed"]["raised"] == "RuntimeError"
        assert of_rank["failed"]["issued"] == 1
        assert of_rank["failed"]["waiting_s"] is not None


@not_quick
def test_two_threads_use_two_groups(found: list[Found]) -> None:
    """The block gathers' thread and the computing thread disturb each other's results or records."""
    for of_rank in found:
        assert of_rank["threads"] == found[0]["threads"]
        assert of_rank["threads"]["right"] == [True, True]
        assert of_rank["threads"]["issued"] == [150, 150]


@not_quick
def test_index_and_size(found: list[Found]) -> None:
    """A group of some of the ranks counts its members by their number in the world."""
    assert [of_rank["place"] for of_rank in found] == [[0, 3, None], [1, 3, [0, 2, [1, 2]]], [2, 3, [1, 2, [1, 2]]]]


# -- what a rank does ----------------------------------------------------------------------------------------

Case = Callable[[Group, int], bool]


def _all_reduce(group: Group, rank: int) -> bool:
    mine, plain = torch.arange(5.0) * (rank + 1), torch.arange(5.0) * (rank + 1)
    group.all_reduce(mine)
    dist.all_reduce(plain)
    return torch.equal(mine, plain)


def _all_gather(group: Group, rank: int) -> bool:
    mine, plain = torch.empty(6, dtype=torch.int64), [torch.empty(2, dtype=torch.int64) for _ in range(RANKS)]
    part = torch.tensor([rank, -rank])
    group.all_gather(mine, part)
    dist.all_gather(plain, part)
    return torch.equal(mine, torch.cat(plain))


def _all_gather_by_broadcasts(group: Group, rank: int) -> bool:
    whole = torch.zeros(12, dtype=torch.uint8)
    parts, plain = list(whole.chunk(RANKS)), [torch.empty(4, dtype=torch.uint8) for _ in range(RANKS)]
    part = torch.arange(4, dtype=torch.uint8) + 10 * rank
    meanwhile: list[int] = []
    parts[rank].copy_(part)
    group.all_gather_by_broadcasts(parts, lambda: meanwhile.append(group.record().issued))
    dist.all_gather(plain, part)
    return torch.equal(whole, torch.cat(plain)) and len(meanwhile) == 1


def _all_to_all(group: Group, rank: int) -> bool:
    send, receive = SIZES[rank], [row[rank] for row in SIZES]
    message = torch.arange(float(sum(send))) + 100 * rank
    mine, plain = torch.empty(sum(receive)), torch.empty(sum(receive))
    group.all_to_all(mine, message, receive, send, agreed=(SIZES,))
    dist.all_to_all_single(plain, message, receive, send)
    return torch.equal(mine, plain)


def _pass_on(group: Group, rank: int) -> bool:
    lengths = (3, 1, 2)
    sent = torch.arange(lengths[rank], dtype=torch.float64) + 10 * rank
    previous = (rank - 1) % RANKS
    mine, plain = (torch.empty(lengths[previous], dtype=torch.float64) for _ in range(2))
    group.pass_on(sent, mine, agreed=(lengths,))()
    work = dist.isend(sent, (rank + 1) % RANKS)
    dist.recv(plain, previous)
    assert work is not None
    work.wait()
    return torch.equal(mine, plain) and mine[0].item() == 10 * previous


def _broadcast(group: Group, rank: int) -> bool:
    mine, plain = torch.full((4,), float(rank)), torch.full((4,), float(rank))
    group.broadcast(mine, source=2)
    dist.broadcast(plain, src=2)
    return torch.equal(mine, plain)


def _broadcast_object(group: Group, rank: int) -> bool:
    plain: list[Any] = [{"of": rank}]
    mine = group.broadcast_object({"of": rank}, source=1)
    dist.broadcast_object_list(plain, src=1)
    return bool(mine == plain[0] == {"of": 1})


CASES: dict[str, Case] = {
    "all_reduce": _all_reduce,
    "all_gather": _all_gather,
    "all_gather_by_broadcasts": _all_gather_by_broadcasts,
    "all_to_all": _all_to_all,
    "pass_on": _pass_on,
    "broadcast": _broadcast,
    "broadcast_object": _broadcast_object,
}


def _connect(name: str = "", ranks: tuple[int, ...] = tuple(range(RANKS))) -> Group:
    return Group(dist.new_group(list(ranks), timeout=timedelta(seconds=30)), name, ranks)


@contextlib.contextmanager
def _observed(group: Group) -> Iterator[Found]:
    """What another thread sees of `group` meanwhile."""
    looks: list[GroupRecord] = []
    over = threading.Event()

    def look() -> None:
        while not over.wait(0.01):
            looks.append(group.record())

    thread = threading.Thread(target=look)
    thread.start()
    seen: Found = {}
    try:
        yield seen
    finally:
        over.set()
        thread.join()
    waits = [look for look in looks if look.waiting_s is not None]
    times = [look.waiting_s or 0.0 for look in waits]
    seen["longest_s"] = max(times, default=0.0)
    seen["what"] = sorted({look.last[-1].what for look in waits})
    seen["grows"] = times == sorted(times)
    seen["afterwards"] = group.record().waiting_s


def _late(name: str, case: Case, rank: int) -> Found:
    """What is seen of `group` while one rank comes late."""
    group = _connect(name)
    dist.barrier()
    with _observed(group) as seen:
        if rank == LATE[name][0]:
            time.sleep(LATE_S)
        assert case(group, rank)
    return seen


def _hop(rank: int) -> Found:
    group = _connect("ring")
    arrive = group.pass_on(torch.ones(2), received := torch.empty(2))
    time.sleep(0.05)  # attention
    between = group.record().waiting_s
    arrive()
    assert torch.equal(received, torch.ones(2))
    return {"between": between is not None and between >= 0.05, "afterwards": group.record().waiting_s}


def _failed(rank: int) -> Found:
    group = _connect("broken")
    raised = ""
    try:
        group.all_to_all(torch.empty(3), torch.empty(3), [1, 1], [1, 1, 1])
    except Exception as error:
        raised = type(error).__name__
    record = group.record()
    return {"raised": raised, "issued": record.issued, "waiting_s": record.waiting_s}


def _threads(rank: int) -> Found:
    groups = [_connect("tp"), _connect("weights")]
    right = [True, True]

    def use(place: int) -> None:
        group = groups[place]
        for number in range(150):
            if (number + rank + place) % 7 == 0:
                time.sleep(0.001)
            tensor = torch.full((number % 5 + 1,), float(number * (place + 1) + rank))
            group.all_reduce(tensor)
            right[place] &= bool((tensor == RANKS * number * (place + 1) + 3).all())

    threads = [threading.Thread(target=partial(use, place)) for place in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    records = [group.record() for group in groups]
    return {"right": right, "issued": [r.issued for r in records], "digests": [r.digest for r in records]}


def _place(rank: int) -> list[Any]:
    assert dist.group.WORLD is not None
    world, some = Group(dist.group.WORLD), _connect("tp", (1, 2)) if rank else dist.new_group([1, 2])
    return [world.index, world.size, [some.index, some.size, list(some.ranks)] if isinstance(some, Group) else None]


def work(folder: Path, rank: int) -> None:
    torch.set_num_threads(1)
    _join(f"file://{folder}/store", rank, RANKS)
    found: Found = {"place": _place(rank), "right": {}, "records": {}, "late": {}}
    together = _connect("all")
    for name, case in CASES.items():
        group = _connect(name)
        found["right"][name] = case(group, rank)
        found["records"][name] = asdict(group.record())
    for _ in range(2):
        for case in CASES.values():
            assert case(together, rank)
    found["records"]["all"] = asdict(together.record())
    for name, case in CASES.items():
        found["late"][name] = _late(name, case, rank)
    found["hop"], found["failed"], found["threads"] = _hop(rank), _failed(rank), _threads(rank)
    (folder / f"rank{rank}.json").write_text(json.dumps(found))
    dist.barrier()
    dist.destroy_process_group()


# -- what it costs -------------------------------------------------------------------------------------------


def _join(store: str, rank: int, world_size: int) -> None:
    timeout = timedelta(seconds=30)
    dist.init_process_group("gloo", init_method=store, rank=rank, world_size=world_size, timeout=timeout)


def cost(rank: int, world_size: int, folder: str, calls: int = 3000) -> None:
    """Print the mean time of an all-reduce of one element with and without its record, alternating."""
    torch.set_num_threads(1)
    _join(f"file://{folder}/store{world_size}", rank, world_size)
    assert dist.group.WORLD is not None
    group, tensor = Group(dist.group.WORLD, "tp"), torch.zeros(1)
    plain: Callable[[Tensor], object] = dist.all_reduce
    took: dict[str, list[float]] = {"plain": [], "recorded": []}
    for _ in range(7):
        for name, call in (("plain", plain), ("recorded", group.all_reduce)):
            began = time.perf_counter()
            for _ in range(calls):
                call(tensor)
            took[name].append((time.perf_counter() - began) / calls * 1e6)
    began = time.perf_counter()
    for _ in range(calls):
        group.record()
    look = (time.perf_counter() - began) / calls * 1e6
    if rank == 0:
        best = {name: min(times) for name, times in took.items()}
        print(f"{world_size} ranks: {best}, difference {best['recorded'] - best['plain']:.1f} us, a look {look:.1f} us")
    dist.destroy_process_group()


if __name__ == "__main__":
    if sys.argv[1] == "cost":
        for ranks in (1, 2):
            with tempfile.TemporaryDirectory() as place:
                torch.multiprocessing.spawn(cost, (ranks, place), ranks)  # type: ignore[attr-defined, no-untyped-call]
    else:
        work(Path(sys.argv[1]), int(sys.argv[2]))
