"""The gang of this machine's processes: what it answers, what it survives, and what is left of it: nothing."""

from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from pathlib import Path
from typing import Any

import psutil
import pytest
import torch
from processes import descendants, listening, store_holders

import crossdock.launch.gangs.choose as choose
import crossdock.launch.gangs.local.process as local_process
from crossdock.launch.engine.engine import Engine
from crossdock.launch.gangs.choose import Launcher, begin_early, choose_launcher
from crossdock.launch.gangs.local.gang import LocalGang
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.config.threads import compute_threads
from crossdock.runtime.errors import (
    ConfigError,
    CrossdockError,
    LaunchError,
    RankError,
    RequestCancelled,
    RequestError,
    RequestTimeout,
)
from crossdock.runtime.rank.worker import RankWorker
from reference import PROMPT
from tiers import thorough

NOTICED_WITHIN_S = 5.0
LIMIT_S = 120


def _gang(world_size: int = 2) -> LocalGang:
    return LocalGang(RunConfig().launch, world_size, "cpu")


@pytest.fixture(scope="module")
def shared() -> Iterator[LocalGang]:
    gang = _gang()
    gang.start()
    yield gang
    gang.close()


@pytest.fixture
def gang(shared: LocalGang) -> LocalGang:
    """With new ranks, whatever the test before did to them."""
    shared.restart()
    return shared


def _pids(gang: LocalGang) -> list[int]:
    return gang.collective_rpc(lambda worker: os.getpid(), timeout_s=30)


def _server(gang: LocalGang) -> psutil.Process:
    return psutil.Process(_pids(gang)[0]).parent()  # type: ignore[return-value]


def _await(condition: Callable[[], bool], limit_s: float = 10.0) -> None:
    deadline = time.monotonic() + limit_s
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.02)


# -- what it answers ------------------------------------------------------------------------------------------------


def test_every_rank_is_called(gang: LocalGang) -> None:
    """Results by rank; nested functions, lambdas and partials; what is large; the ranks have met."""
    offset = 10

    def nested(worker: RankWorker, factor: int) -> Any:
        return worker.rank, worker.world_size, worker.rank * factor + offset, worker.exchange(worker.rank)

    assert gang.collective_rpc(nested, 3, timeout_s=30) == [(0, 2, 10, [0, 1]), (1, 2, 13, [0, 1])]
    assert gang.collective_rpc(partial(nested, factor=1), timeout_s=30)[1][2] == 11
    large = torch.arange(5_000_000)
    for back in gang.collective_rpc(lambda worker, given: given + worker.rank, large, timeout_s=30):
        assert int((back - large).max()) in (0, 1)


def test_a_rank_answers_while_it_is_called(gang: LocalGang) -> None:
    """`rpc` waits for the call to end; notices do not come; a request can then not be cancelled."""
    heard: list[int] = []

    def work(worker: RankWorker) -> str:
        deadline = time.monotonic() + 20
        while not hasattr(worker, "told") and time.monotonic() < deadline:
            time.sleep(0.01)
        return getattr(worker, "told", "nothing")

    def other() -> None:
        for rank in (0, 1):
            gang.rpc(rank, lambda worker, what: setattr(worker, "told", what), f"told {rank}", timeout_s=5)

    timer = threading.Timer(1.0, other)
    timer.start()
    results = gang.collective_rpc(work, timeout_s=30, notice=lambda statuses: heard.append(len(statuses)))
    timer.join()
    assert results == ["told 0", "told 1"]
    assert max(heard) == 2


def test_threads_ask_at_once(gang: LocalGang) -> None:
    """Answers of one go to another, or bytes of two questions are mixed."""

    def ask(number: int) -> bool:
        given = torch.full((100_000,), number)
        return bool((gang.rpc(number % 2, lambda worker, x: x * 2, given, timeout_s=60) == 2 * given).all())

    def both(number: int) -> bool:
        return gang.collective_rpc(lambda worker, x: worker.exchange(x), number, timeout_s=60) == [[number] * 2] * 2

    with ThreadPoolExecutor(8) as pool:
        assert all(pool.map(lambda n: ask(n) if n % 4 else both(n), range(80)))


@pytest.mark.parametrize(
    "error",
    [RequestCancelled("why", 3), RequestTimeout("late", 4), ConfigError("no", "launch.port"), RequestError("odd")],
    ids=lambda error: type(error).__name__,
)
def test_our_errors_travel_whole(error: CrossdockError, gang: LocalGang) -> None:
    def fail(worker: RankWorker) -> None:
        raise error

    with pytest.raises(type(error)) as caught:
        gang.collective_rpc(fail, timeout_s=30)
    assert type(caught.value) is type(error)
    assert (str(caught.value), vars(caught.value)) == (str(error), vars(error))
    assert len(_pids(gang)) == 2, "the ranks live on"


def test_other_errors_say_where(gang: LocalGang) -> None:
    """Also one that cannot travel, and an answer that cannot: the rank lives on."""

    def fail(worker: RankWorker, kind: str) -> Any:
        error: Exception = ValueError("planted")
        if kind == "raises what cannot travel":
            error = RequestError("planted")
            error.lock = threading.Lock()  # type: ignore[attr-defined]
        if worker.rank == 1 and kind.startswith("raises"):
            raise error
        return threading.Lock() if worker.rank == 1 else None

    with pytest.raises(RankError, match=r"rank 1: ValueError: planted \(in idle\)\nTraceback") as caught:
        gang.collective_rpc(fail, "raises", timeout_s=30)
    assert caught.value.kind == "raised"
    with pytest.raises(RankError, match=r"rank 1: TypeError: cannot pickle"):
        gang.collective_rpc(fail, "answers", timeout_s=30)
    with pytest.raises(RankError, match=r"rank 1: RequestError: planted"):
        gang.collective_rpc(fail, "raises what cannot travel", timeout_s=30)
    with pytest.raises(RankError, match=r"rank 1: ValueError: planted"):
        gang.rpc(1, fail, "raises", timeout_s=30)
    assert len(_pids(gang)) == 2


def test_a_call_that_takes_too_long(gang: LocalGang) -> None:
    with pytest.raises(RankError, match="rank 1: was not done in time"):
        gang.collective_rpc(lambda worker: time.sleep(3 * worker.rank), timeout_s=0.5)
    with pytest.raises(RankError, match="rank 0: does not answer") as caught:
        gang.rpc(0, lambda worker: time.sleep(3), timeout_s=0.2)
    assert caught.value.kind == "silent"
    assert len(_pids(gang)) == 2, "it was only slow"


def test_what_ranks_find(monkeypatch: pytest.MonkeyPatch) -> None:
    """Threads, and a rendezvous of somebody else; what they print is not ours."""
    monkeypatch.setenv("RANK", "7")
    monkeypatch.setenv("MASTER_ADDR", "192.0.2.1")
    monkeypatch.setenv("OMP_NUM_THREADS", "13")
    one = _gang(1)

    def look(worker: RankWorker) -> Any:
        print("a rank prints")
        names = ("RANK", "MASTER_ADDR", "OMP_NUM_THREADS")
        return [os.environ.get(name) for name in names], torch.get_num_threads(), list(sys.path)

    try:
        one.start()
        threads = compute_threads(1)
        assert one.collective_rpc(look, timeout_s=30) == [([None, None, str(threads)], threads, sys.path)]
        assert len(os.listdir(f"/proc/{_server(one).pid}/task")) == 1, "a fork would take the locks of other threads"
    finally:
        one.close()


# -- faults ---------------------------------------------------------------------------------------------------------


def _meet_its_end(number: int) -> Callable[[RankWorker], None]:
    def work(worker: RankWorker) -> None:
        if worker.rank == 1:
            os.kill(os.getpid(), number)
            time.sleep(60)
        worker.exchange(worker.rank)

    return work


@pytest.mark.parametrize(
    ("number", "kind", "text"),
    [
        (signal.SIGKILL, "died", "its process died: killed, or out of host memory"),
        (
            signal.SIGSEGV,
            "died",
            "signal 11 (Segmentation fault); it wrote last: Fatal Python error: Seg",
        ),
        (signal.SIGSTOP, "stopped", "is stopped"),
    ],
    ids=["killed", "crashed", "stopped"],
)
def test_who_is_gone_is_blamed(number: int, kind: str, text: str, gang: LocalGang) -> None:
    """And not who waits for it; then all are replaced, in the same server."""
    before, server = _pids(gang), _server(gang)
    began = time.monotonic()
    with pytest.raises(RankError) as caught:
        gang.collective_rpc(_meet_its_end(number), timeout_s=60)
    noticed_s = time.monotonic() - began
    assert (caught.value.rank, caught.value.kind) == (1, kind)
    assert text in str(caught.value)
    assert noticed_s < NOTICED_WITHIN_S
    with pytest.raises(RankError):
        gang.rpc(1, lambda worker: None, timeout_s=0.2)
    began = time.monotonic()
    gang.restart()
    print(f"{kind}: noticed after {noticed_s:.2f} s, restarted in {time.monotonic() - began:.2f} s")
    assert not set(_pids(gang)) & set(before)
    assert not any(psutil.pid_exists(pid) for pid in before)
    assert _server(gang) == server


def test_a_stopped_rank_stops_nobody_else(gang: LocalGang) -> None:
    """What is sent to it does not fit into its socket: the launcher must not wait for it."""
    os.kill(_pids(gang)[1], signal.SIGSTOP)
    began = time.monotonic()
    with pytest.raises(RankError, match=r"rank 1: its process \d+ on .* is stopped"):
        gang.collective_rpc(lambda worker, given: None, bytes(50_000_000), timeout_s=60)
    assert time.monotonic() - began < NOTICED_WITHIN_S


@thorough
def test_without_its_server(gang: LocalGang) -> None:
    """The ranks go with it, and a restart brings another."""
    before, server = _pids(gang), _server(gang)
    server.kill()
    _await(lambda: not any(map(psutil.pid_exists, before)))
    with pytest.raises(RankError, match="its process died"):
        gang.collective_rpc(lambda worker: None, timeout_s=30)
    gang.restart()
    assert not set(_pids(gang)) & set(before)
    assert _server(gang) != server


def test_an_answer_that_nobody_waits_for(gang: LocalGang, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is taken for that to the next command: a pid that is none, ranks that live on."""
    (pid, _), server = _pids(gang), gang._server
    assert server is not None
    with monkeypatch.context() as patch:
        patch.setattr(local_process, "_ANSWER_S", 0.1)
        assert server.how_ended(pid) is None, "it runs: the server waits for a second, to be sure"
    gang.restart()
    assert pid not in _pids(gang)


def test_a_server_that_does_not_come_up(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(local_process, "_PROGRAM", "raise SystemExit('no torch here')")
    before = _handles()
    with pytest.raises(LaunchError, match="did not come up: no torch here"):
        _gang().start()
    monkeypatch.setattr(sys, "executable", "/nowhere/python")
    with pytest.raises(LaunchError, match=r"cannot be started: .*/nowhere/python"):
        _gang().start()
    assert _handles() == before


def test_a_process_that_was_started_early(flux2_dir: Path) -> None:
    """The next gang of that size takes it; it imports the classes of the model at once, the rest when asked."""
    begin_early(RunConfig.parse({"launch": {"launcher": "local"}}), str(flux2_dir))
    (early,) = local_process._early.values()
    gang = LocalGang(RunConfig().launch, 1, "cpu")
    try:
        gang.begin()
        assert early.end_ranks()
        assert early._number == 0, "it was asked for something before it was up"
        gang.start()
        assert gang._server is early
        assert not local_process._early
        for name in ("diffusers.models.transformers.transformer_flux2", *local_process._imported()):
            assert gang.collective_rpc(lambda worker, name=name: name in sys.modules, timeout_s=30) == [True], name
    finally:
        gang.close()


def test_an_early_process_that_nobody_takes_ends_with_this_one(flux2_dir: Path) -> None:
    script = (
        "from crossdock.launch.gangs.choose import begin_early; from crossdock.runtime import RunConfig; "
        "from crossdock.launch.gangs.local import process; import sys; "
        f"begin_early(RunConfig.parse({{'launch': {{'launcher': 'local'}}}}), {str(flux2_dir)!r}); "
        "print(*(each._process.pid for each in process._early.values()), 'torch' in sys.modules)"
    )
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=60, check=True)
    pid, heavy = done.stdout.split()
    assert heavy == "False"
    _await(lambda: not psutil.pid_exists(int(pid)))


def test_more_ranks_than_gpus() -> None:
    with pytest.raises(LaunchError, match="64 ranks need 64 GPUs, but this machine has") as caught:
        LocalGang(RunConfig().launch, 64, "cuda").start()
    assert caught.value.key == "launch.device"


@thorough
def test_an_occupied_port() -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        gang = LocalGang(RunConfig.parse({"launch": {"port": port}}).launch, 2, "cpu")
        before, family = _handles(), descendants(os.getpid())
        with pytest.raises(LaunchError, match=f"port {port} on 127.0.0.1 cannot be used") as caught:
            gang.start()
        assert caught.value.key == "launch.port"
        assert _handles() == before
        assert descendants(os.getpid()) == family


# -- what is left ---------------------------------------------------------------------------------------------------


def _handles() -> set[tuple[str, str]]:
    """What this process has open."""
    found = set()
    for name in os.listdir("/proc/self/fd"):
        try:
            found.add((name, os.readlink(f"/proc/self/fd/{name}")))
        except FileNotFoundError:  # that of the listing
            continue
    return found


def test_host_memory_outlives_the_ranks(gang: LocalGang) -> None:
    """The server holds what they had, and nobody else: not the next ranks, which it forks; it goes with the server."""

    def keep(worker: Any) -> int:
        from crossdock.offload.memory.host_store import HostStore

        worker.filled = HostStore.create(2**20)
        worker.filled.bytes.fill_(1 + worker.rank)
        worker.holder.keep(str(worker.rank), "key", worker.filled.handle)
        return os.fstat(worker.filled.handle.fd).st_ino

    def find(worker: Any) -> set[int] | None:
        from crossdock.offload.memory.host_store import HostStore

        handle = worker.holder.find(str(worker.rank), "key")
        if handle is None:
            return None
        store = HostStore.attach(handle)
        found = set(store.bytes.tolist())
        store.close()
        return found

    inodes = gang.collective_rpc(keep, timeout_s=30)
    os.kill(_pids(gang)[1], signal.SIGKILL)
    gang.restart()
    server = _server(gang).pid
    assert gang.collective_rpc(find, timeout_s=30) == [{1}, {2}]
    assert [store_holders(inode) for inode in inodes] == [{server}] * 2
    gang.rpc(0, lambda worker: worker.holder.drop(), timeout_s=30)
    assert [store_holders(inode) for inode in inodes] == [set()] * 2
    assert gang.collective_rpc(find, timeout_s=30) == [None, None]
    inodes = gang.collective_rpc(keep, timeout_s=30)
    os.kill(server, signal.SIGKILL)
    _await(lambda: not any(map(store_holders, inodes)))


def test_close_leaves_nothing() -> None:
    """No process, no socket, no thread, no shared memory; also of a rank that is stopped. Twice."""
    handles, threads, memory = _handles(), set(threading.enumerate()), set(os.listdir("/dev/shm"))
    gang = _gang()
    gang.start()
    family = [_server(gang).pid, *_pids(gang)]
    os.kill(family[-1], signal.SIGSTOP)
    gang.close()
    gang.close()
    assert not any(psutil.pid_exists(pid) for pid in family)
    assert _handles() <= handles  # what others left in this process may go meanwhile
    assert set(threading.enumerate()) <= threads
    assert set(os.listdir("/dev/shm")) == memory
    with pytest.raises(RankError, match="this gang is closed"):
        gang.collective_rpc(lambda worker: None, timeout_s=1)
    with pytest.raises(RankError):
        gang.rpc(0, lambda worker: None, timeout_s=1)


def test_nobody_listens_outside_loopback(gang: LocalGang) -> None:
    """The rendezvous and what gloo opens. The server takes no connections, and no socket of theirs has a name."""
    ranks = {pid: listening(pid) for pid in _pids(gang)}
    print(ranks)
    assert {address for found in ranks.values() for address, _ in found} <= {"127.0.0.1", "::1"}
    told = gang.collective_rpc(lambda worker: os.environ.get("GLOO_SOCKET_IFNAME"), timeout_s=30)
    assert told == ["lo", "lo"], "gloo listens where the machine's name is, which may be anywhere"
    assert listening(_pids(gang)[0]), "the rendezvous is not where it was looked for"
    assert listening(_server(gang).pid) == []
    for pid in (_server(gang).pid, *ranks):
        assert {each.laddr for each in psutil.Process(pid).net_connections("unix")} == {""}


SCRIPT = """
import os, signal, sys, threading, time
from crossdock.launch.gangs.local.gang import LocalGang
from crossdock.runtime.config.schema import RunConfig

class Here:
    def __init__(self, rank): self.rank = rank

def work(worker):
    return Here(worker.rank), os.getpid()

gang = LocalGang(RunConfig().launch, 2, "cpu")
starter = threading.Thread(target=gang.start)
starter.start()
starter.join()  # the thread that started the server is gone: the ranks must not be
time.sleep(1)
answers = gang.collective_rpc(work, timeout_s=30)
assert [here.rank for here, _ in answers] == [0, 1], "a class of the script's own"
"""


def _script(folder: Path, text: str, **options: Any) -> subprocess.Popen[str]:
    file = folder / "script.py"
    file.write_text(SCRIPT + text)
    command = [sys.executable, str(file)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def test_a_script_without_a_guard(tmp_path: Path) -> None:
    """Also: it does not close the gang, and leaves it to the end of the process."""
    script = _script(tmp_path, "print(*(pid for _, pid in answers))")
    out, err = script.communicate(timeout=LIMIT_S)
    assert (script.returncode, err) == (0, "")
    _await(lambda: not any(psutil.pid_exists(int(pid)) for pid in out.split()))


KILLED = """
os.kill(answers[1][1], signal.SIGSTOP)
if os.fork():  # somebody else has the launcher's end of every socket, too
    print(os.getpid(), flush=True)
time.sleep(600)
"""


def test_its_launcher_is_killed(tmp_path: Path) -> None:
    """kill -9, with a rank that is stopped, and a fork of the launcher that lives on."""
    script = _script(tmp_path, KILLED)
    try:
        assert script.stdout is not None
        assert script.stdout.readline()
        family = {each.pid: each for each in descendants(script.pid)}
        (fork,) = [each for each in family.values() if each.name() == psutil.Process(script.pid).name()]
        assert sorted(each.name() for each in family.values() if each != fork) == [
            "crossdock-rank0",
            "crossdock-rank1",
            "crossdock-serve",
        ]
        del family[fork.pid]
        script.kill()
        script.wait()
        assert fork.is_running()
        began = time.monotonic()
        _await(lambda: not any(_alive(each) for each in family.values()))
        print(f"gone after {time.monotonic() - began:.2f} s")
        fork.kill()
    finally:
        script.kill()
        script.communicate(timeout=10)


def _alive(process: psutil.Process) -> bool:
    try:
        return bool(process.status() != psutil.STATUS_ZOMBIE)
    except psutil.NoSuchProcess:
        return False


INTERRUPTED = """
try:
    print("ready", flush=True)
    gang.collective_rpc(lambda worker: time.sleep(60), timeout_s=60)
except KeyboardInterrupt:
    time.sleep(0.5)
    print(gang.rpc(1, lambda worker: worker.rank, timeout_s=5))
    gang.close()
    print("closed")
"""


@thorough
def test_control_c(tmp_path: Path) -> None:
    """It goes to everything in the terminal: the ranks say nothing, and live until the launcher has decided."""
    script = _script(tmp_path, INTERRUPTED, start_new_session=True)
    assert script.stdout is not None
    assert script.stdout.readline() == "ready\n"
    time.sleep(0.5)
    os.killpg(script.pid, signal.SIGINT)
    out, err = script.communicate(timeout=LIMIT_S)
    assert (script.returncode, out, err) == (0, "1\nclosed\n", "")


# -- with a model ---------------------------------------------------------------------------------------------------


@thorough
def test_a_request_is_cancelled_from_another_thread(flux2_dir: Path) -> None:
    """And the next one is right; in a thread, whose gang is the engine's own."""
    config = RunConfig.parse({"parallel": {"tp_degree": 2}, "launch": {"launcher": "local"}})
    done: list[Any] = []

    def run() -> None:
        with Engine.start(config, flux2_dir) as engine:
            small: dict[str, Any] = {"height": 64, "width": 64}
            first = engine.generate(PROMPT, steps=2, **small)
            stop = threading.Timer(1.0, engine.cancel, ("enough",))
            stop.start()
            try:
                engine.generate(PROMPT, steps=5000, **small)
            except RequestCancelled as error:
                done.append(error)
            stop.join()
            again = engine.generate(PROMPT, steps=2, **small)
            done.append(torch.equal(first.latents[0], again.latents[0]))
            done.append(isinstance(engine.gang, LocalGang))

    thread = threading.Thread(target=run)
    thread.start()
    thread.join(LIMIT_S)
    assert [str(done[0])[-8:], *done[1:]] == [": enough", True, True]


# -- which launcher -------------------------------------------------------------------------------------------------


def _config(world_size: int, launcher: str, address: str | None) -> RunConfig:
    return RunConfig.parse(
        {"parallel": {"tp_degree": world_size}, "launch": {"launcher": launcher, "ray_address": address}}
    )


@pytest.mark.parametrize(
    ("wanted", "world_size", "address", "has_ray", "found"),
    [
        ("auto", 1, None, True, "local"),
        ("auto", 2, None, True, "ray"),
        ("auto", 2, None, False, "local"),
        ("auto", 1, None, False, "local"),
        ("auto", 1, "1.2.3.4:5", True, "ray"),
        ("auto", 2, "1.2.3.4:5", True, "ray"),
        ("ray", 1, None, True, "ray"),
        ("local", 4, None, True, "local"),
        ("local", 1, None, False, "local"),
    ],
)
def test_which_launcher(
    wanted: str,
    world_size: int,
    address: str | None,
    has_ray: bool,
    found: Launcher,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(choose, "has_ray", lambda: has_ray)
    assert choose_launcher(_config(world_size, wanted, address)) == found
    if wanted == "auto":
        assert choose_launcher(_config(world_size, wanted, address), "torchrun") == "torchrun"


@pytest.mark.parametrize(
    ("wanted", "address", "key"),
    [("ray", None, "launch.launcher"), ("auto", "1.2.3.4:5", "launch.ray_address")],
)
def test_ray_that_is_not_there(
    wanted: str, address: str | None, key: str, monkeypatch: pytest.MonkeyPatch, flux2_dir: Path
) -> None:
    """One message with the way out, also from Python."""
    monkeypatch.setitem(sys.modules, "ray", None)  # type: ignore[arg-type]
    with pytest.raises(LaunchError, match=r"pip install 'crossdock\[ray\]'") as caught:
        Engine.start(_config(2, wanted, address), flux2_dir)
    assert caught.value.key == key
    assert ("launcher: local" in str(caught.value)) == (address is None)


def test_a_folder_is_not_ray(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python takes any folder of that name for a package."""
    (tmp_path / "ray").mkdir()
    monkeypatch.setattr(sys, "path", [str(tmp_path)])
    monkeypatch.delitem(sys.modules, "ray", raising=False)
    assert choose_launcher(_config(2, "auto", None)) == "local"


def test_a_cluster_is_not_local() -> None:
    with pytest.raises(ConfigError, match=r"launch\.launcher: found local, but launch\.ray_address names a cluster"):
        _config(2, "local", "1.2.3.4:5")


def test_torchrun_is_another_command() -> None:
    with pytest.raises(ConfigError, match="start it with: torchrun --nproc-per-node 2"):
        choose_launcher(_config(2, "torchrun", None))
    with pytest.raises(ConfigError, match="found local, but this is torchrun; start it with: crossdock check"):
        choose_launcher(_config(2, "local", None), "torchrun", "check")
