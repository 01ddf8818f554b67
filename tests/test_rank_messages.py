"""What ranks that torchrun started read from its store: data, signed, or nothing; never a program."""

from __future__ import annotations

import json
import os
import pickle
import signal
import stat
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from datetime import timedelta
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from processes import descendants, listening
from torch.distributed import TCPStore  # type: ignore[attr-defined]

from bomb import Bomb
from crossdock.launch.gangs.rank_messages import MAX_BYTES, ErrorNote, Lead, MessageStore, Reporter
from crossdock.launch.gangs.ranks.process_state import process_state
from crossdock.launch.gangs.ranks.rendezvous import LOOPBACK, open_store
from crossdock.launch.gangs.run_secret import VARIABLE, forget_run_secret, run_secret
from crossdock.launch.gangs.torchrun_judge import Beat, FaultVerdict, Judge
from crossdock.launch.gangs.torchrun_watch import RankWatch, is_reporter
from crossdock.parallel.group import Collective, GroupRecord
from crossdock.runtime.contract.result import CompositionError
from crossdock.runtime.errors import (
    CheckpointError,
    ConfigError,
    CrossdockError,
    LaunchError,
    RankError,
    RequestCancelled,
    RequestError,
    RequestTimeout,
    UserError,
)
from crossdock.runtime.reports.status import RankStatus
from layouts import CONFIGS
from reference import PROMPT
from tiers import thorough

SECRET = b"known to the ranks, and to nobody else"
GROUP = GroupRecord("tp", (0, 1), 7, 12345, (Collective(7, "all_reduce float32 64"),), 0.25)
STATUS = RankStatus(1, "host", 4321, "denoise", 2, "blocks.3", True, 1, (GROUP,))


class Dictionary:
    """A store like torch's, in this process."""

    def __init__(self) -> None:
        self.values: dict[str, bytes] = {}

    def set(self, key: str, value: str | bytes) -> None:
        self.values[key] = value if isinstance(value, bytes) else value.encode()

    def compare_set(self, key: str, expected: str, desired: str) -> bytes:
        if self.values.get(key, b"") == expected.encode():
            self.set(key, desired)
        return self.values.get(key, expected.encode())

    def multi_get(self, keys: list[str]) -> list[bytes]:
        return [self.values[key] for key in keys]


@dataclass
class Post:
    """A message store, what lies under it, and what it refused."""

    store: Dictionary
    messages: MessageStore
    refused: list[tuple[str, str]]


@pytest.fixture
def post() -> Post:
    return _post(Dictionary())


def _post(store: Dictionary, secret: bytes | None = SECRET, try_name: str = "run/0") -> Post:
    refused: list[tuple[str, str]] = []
    return Post(store, MessageStore(store, secret, try_name, lambda *what: refused.append(what)), refused)


ERRORS = (
    RankError(3, "raised", "memory"),
    UserError("wrong", "launch.port"),
    ConfigError("wrong", "parallel.tp_degree"),
    CheckpointError("wrong"),
    RequestError("wrong"),
    LaunchError("wrong", "offload.host"),
    RequestCancelled("asked", 3),
    RequestTimeout("late", 2),
    CompositionError("does not compose"),
    CrossdockError("anything"),
)


@pytest.mark.parametrize("error", ERRORS, ids=lambda error: type(error).__name__)
def test_an_error_arrives_as_it_was(error: CrossdockError, post: Post) -> None:
    """The exit code and the message are the error's own on every rank."""
    post.messages.put("verdict", FaultVerdict(0, error, (("host", "0"), 77)))
    (arrived,) = post.messages.get(["verdict"], FaultVerdict)
    assert arrived is not None
    assert type(arrived.error) is type(error)
    assert str(arrived.error) == str(error)
    assert vars(arrived.error) == vars(error)
    assert (arrived.judge, arrived.stopped) == (0, (("host", "0"), 77))


def test_an_unknown_error_arrives_as_what_it_says() -> None:
    class OwnError(RankError):
        pass

    assert str(ErrorNote.of(OwnError(1, "x")).error()) == "OwnError: rank 1: x"
    assert len(ErrorNote.of(ConfigError("x" * 2_000_000)).message) < MAX_BYTES


def test_an_error_that_quotes_what_is_no_text(post: Post) -> None:
    post.messages.put("verdict", FaultVerdict(0, RankError(1, "found '\ud83d'")))
    (arrived,) = post.messages.get(["verdict"], FaultVerdict)
    assert arrived is not None
    assert str(arrived.error) == "rank 1: found '\\ud83d'"


def test_a_beat_arrives_as_it_was(post: Post) -> None:
    beat = Beat(9, STATUS, ("host", "0"), 4, True, None, False)
    post.messages.put("beat/1", beat)
    assert post.messages.get(["beat/1"], Beat) == [beat]
    assert post.store.values["beat/1"].partition(b"\n")[2].startswith(b'{"number":9,"status":{"rank":1')


def test_nothing_is_there_yet(post: Post) -> None:
    post.messages.clear(["verdict"])
    assert post.messages.get(["verdict"], FaultVerdict) == [None]
    assert post.refused == []


def test_the_first_one_stays(post: Post) -> None:
    first, second = Reporter(1, "a"), Reporter(1, "b")
    assert post.messages.put_first("reported", first) == first
    assert post.messages.put_first("reported", second) == first
    post.messages.clear(["reported", "other"])
    assert post.messages.put_first("other", second) == second
    assert post.messages.get(["reported"], Reporter) == [first], "what is there already stays"


def test_who_reports_is_one_time_not_one_process(post: Post) -> None:
    assert is_reporter(post.messages, 0)
    assert not is_reporter(post.messages, 0)


def _forged(post: Post) -> bytes:
    """A well-formed verdict that somebody without the secret wrote."""
    _post(post.store, b"another secret of the same length").messages.put(
        "verdict", FaultVerdict(0, RankError(0, "forged"))
    )
    return post.store.values["verdict"]


FORGERIES: dict[str, Callable[[Post, Path], bytes]] = {
    "pickle": lambda post, path: pickle.dumps(Bomb(path)),
    "pickle behind a line": lambda post, path: b"0" * 64 + b"\n" + pickle.dumps(Bomb(path)),
    "another secret": lambda post, path: _forged(post),
    "no signature": lambda post, path: b"\n" + _forged(post).partition(b"\n")[2],
    "empty": lambda post, path: b"",
    "not UTF-8": lambda post, path: b"\xff\xfe\n\xff",
    "enormous": lambda post, path: b"x" * (MAX_BYTES + 1),
}


@pytest.mark.parametrize("forge", FORGERIES.values(), ids=FORGERIES)
def test_what_no_rank_signed_is_not_there(forge: Callable[[Post, Path], bytes], post: Post, tmp_path: Path) -> None:
    post.store.set("verdict", forge(post, tmp_path / "ran"))
    assert post.messages.get(["verdict"], FaultVerdict) == [None]
    assert [key for key, _ in post.refused] == ["verdict"]
    assert (
        str(post.messages.put_first("verdict", FaultVerdict(1, RankError(0, "gone", "died"))).error) == "rank 0: gone"
    )
    (arrived,) = post.messages.get(["verdict"], FaultVerdict)
    assert arrived is not None
    assert str(arrived.error) == "rank 0: gone"
    assert not (tmp_path / "ran").exists()


def test_a_signature_is_of_the_text(post: Post) -> None:
    post.messages.put("beat/0", Beat(1, STATUS, ("host", "0")))
    post.store.values["beat/0"] = post.store.values["beat/0"].replace(b'"number":1', b'"number":2')
    assert post.messages.get(["beat/0"], Beat) == [None]


def test_a_long_message_is_refused_unread(post: Post) -> None:
    """Also one that a rank signed."""
    post.messages.put("beat/0", Beat(1, STATUS, ("host" * MAX_BYTES, "0")))
    assert post.messages.get(["beat/0"], Beat) == [None]
    assert [reason.partition(" bytes")[0].split()[:2] for _, reason in post.refused] == [["it", "has"]]


def test_a_signed_message_counts_in_its_place_only(post: Post) -> None:
    """A recorded message is worth nothing under another key, and nothing in the next try."""
    post.messages.put("beat/0", Beat(1, STATUS, ("host", "0")))
    post.store.values["beat/1"] = post.store.values["beat/0"]
    assert post.messages.get(["beat/1"], Beat) == [None]
    assert _post(post.store, try_name="run/1").messages.get(["beat/0"], Beat) == [None]
    assert post.messages.get(["beat/0"], Beat) != [None]


TEXTS = {
    "another type": '{"rank": 0, "once": "a"}',
    "a string for a number": '{"rank": "0", "beat": 1, "suspects": []}',
    "a number is missing": '{"rank": 0, "suspects": []}',
    "a float": '{"rank": 0.5, "beat": 1, "suspects": []}',
    "no object": "[1, 2]",
    "no JSON": "{",
    "deep": "[" * 100_000,
    "many digits": '{"rank": 0, "beat": ' + "9" * 100_000 + ', "suspects": []}',
}


@pytest.mark.parametrize("begin", [b"", b"\n"])
def test_without_a_secret_a_program_is_no_message(begin: bytes, tmp_path: Path) -> None:
    post = _post(Dictionary(), None)
    post.store.set("verdict", begin + pickle.dumps(Bomb(tmp_path / "ran")))
    assert post.messages.get(["verdict"], FaultVerdict) == [None]
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("text", TEXTS.values(), ids=TEXTS)
def test_without_a_secret_only_data_of_the_known_type_counts(text: str) -> None:
    """Ranks on several nodes that were given no secret."""
    post = _post(Dictionary(), None)
    post.store.set("lead", f"\n{text}")
    assert post.messages.get(["lead"], Lead) == [None]
    assert post.refused == [("lead", "it is no Lead")]
    post.messages.put("lead", Lead(0, 5, (1,)))
    assert post.messages.get(["lead"], Lead) == [Lead(0, 5, (1,))]


# -- the secret ---------------------------------------------------------------------------------------------------


@pytest.fixture
def try_folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The environment of a rank that torchrun has started on one node."""
    monkeypatch.delenv(VARIABLE, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("LOCAL_WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "0" / "error.json"))
    run_secret.cache_clear()
    yield tmp_path
    run_secret.cache_clear()


def test_ranks_of_one_node_make_a_secret(try_folder: Path) -> None:
    secret = run_secret()
    assert secret is not None
    assert len(secret) == 32
    (file,) = try_folder.iterdir()
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    run_secret.cache_clear()
    assert run_secret() == secret
    forget_run_secret()
    assert list(try_folder.iterdir()) == []
    assert run_secret() == secret, "what is said at the very end is signed as well"


def test_each_try_has_a_secret_of_its_own(try_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = run_secret()
    run_secret.cache_clear()
    (try_folder / "attempt_1").mkdir()
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(try_folder / "attempt_1" / "0" / "error.json"))
    assert run_secret() not in (None, first)


@pytest.mark.parametrize("harm", ["others may read it", "it is a link", "it is short", "it is another user's"])
def test_a_secret_that_others_know_is_none(
    harm: str, try_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert run_secret() is not None
    run_secret.cache_clear()
    (file,) = try_folder.iterdir()
    if harm == "others may read it":
        file.chmod(0o644)
    elif harm == "it is another user's":
        monkeypatch.setattr(os, "geteuid", lambda: file.stat().st_uid + 1)
    elif harm == "it is short":
        file.write_bytes(b"short")
    else:
        file.rename(tmp_path / "elsewhere")
        file.symlink_to(tmp_path / "elsewhere")
    assert run_secret() is None


def test_the_variable_goes_before(try_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert run_secret() is None
    run_secret.cache_clear()
    monkeypatch.setenv(VARIABLE, "0123456789abcdef")
    assert run_secret() == b"0123456789abcdef"
    assert list(try_folder.iterdir()) == []
    run_secret.cache_clear()
    monkeypatch.setenv(VARIABLE, "short")
    with pytest.raises(LaunchError, match=f"{VARIABLE}: has 5 characters; allowed: 16 or more"):
        run_secret()


# -- what a rank does on a message's word ----------------------------------------------------------------------------


@pytest.fixture
def watch(monkeypatch: pytest.MonkeyPatch) -> RankWatch:
    """Of rank 0, without a secret and without its thread."""
    monkeypatch.setenv("GROUP_RANK", "0")
    worker: Any = SimpleNamespace(rank=0, world_size=2, status=lambda: replace(STATUS, rank=0))
    return RankWatch(worker, Dictionary(), None, "run/0")  # type: ignore[arg-type]


@pytest.mark.parametrize("sibling", [True, False])
def test_only_a_stopped_rank_of_the_same_torchrun_is_ended(sibling: bool, watch: RankWatch) -> None:
    """Whatever pid a verdict names."""
    victim = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    try:
        victim.send_signal(signal.SIGSTOP)
        watch._parent = os.getpid() if sibling else os.getppid()
        deadline = time.monotonic() + 10
        while process_state(victim.pid) != "stopped" and time.monotonic() < deadline:
            time.sleep(0.01)
        watch._act(FaultVerdict(1, RankError(1, "stopped", "stopped"), (watch._agent, victim.pid)))
        assert (process_state(victim.pid) != "stopped") == sibling
    finally:
        victim.kill()
        victim.wait()


@pytest.mark.parametrize("pid", [-1, 0, 2**70])
def test_a_pid_that_no_process_has(pid: int, watch: RankWatch) -> None:
    assert process_state(pid) in ("gone", "runs")
    watch._act(FaultVerdict(1, RankError(1, "stopped", "stopped"), (watch._agent, pid)))
    court = Judge(0, 2, watch._agent, process_state)
    court.hear(Beat(1, replace(STATUS, pid=pid), watch._agent), 0.0)
    court.verdict(5.0, hurried=True)


def test_a_beat_under_another_ranks_name_is_not_heard(watch: RankWatch) -> None:
    heard: list[int] = []
    watch._judge.hear = lambda beat, now_s: heard.append(beat.status.rank)  # type: ignore[method-assign, assignment]
    watch._messages.clear(["verdict", "lead", "beat/0", "beat/1"])
    watch._messages.put("beat/0", Beat(1, STATUS, ("host", "0")))  # of rank 1
    watch._messages.put("beat/1", Beat(1, STATUS, ("host", "0")))
    watch._judge_all()
    assert heard == [1]


# -- the attack ---------------------------------------------------------------------------------------------------


def test_our_own_store_listens_on_one_address() -> None:
    store = open_store(LOOPBACK, 0, 2)
    assert [address for address, port in listening(os.getpid()) if port == store.port] == [LOOPBACK]
    client = TCPStore(LOOPBACK, store.port, 2, is_master=False, timeout=timedelta(seconds=5), wait_for_workers=False)
    client.set("key", "value")
    assert store.get("key") == b"value"
    with pytest.raises(LaunchError, match=f"launch.port: port {store.port} on {LOOPBACK} cannot be used"):
        open_store(LOOPBACK, store.port, 2)


@thorough
@pytest.mark.timeout(300)
def test_a_stranger_in_torchruns_store_runs_nothing(flux2_dir: Path, tmp_path: Path) -> None:
    """He writes programs and forged messages under all keys that the ranks read, again and again. The picture comes.

    What listens meanwhile is printed: of the ranks, nothing but loopback.
    """
    port = _free_port()
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--master-addr", LOOPBACK, "--master-port", str(port), "-m", "crossdock.launch.torchrun"]
    command += ["generate", str(flux2_dir), "--config", str(CONFIGS / "layerwise_tp2.yaml"), "--prompt", PROMPT]
    command += ["--height", "64", "--width", "64", "--steps", "40", "--out", str(tmp_path / "out.png")]
    with (tmp_path / "log").open("w") as log:
        run = subprocess.Popen(command, stdout=log, stderr=log)
        try:
            written, ports = _attack(run, port, tmp_path / "ran")
            assert run.wait(timeout=120) == 0, (tmp_path / "log").read_text()
        finally:
            run.kill()
            run.wait()
    said = (tmp_path / "log").read_text()
    assert written > 0, said
    assert not (tmp_path / "ran").exists(), "a message ran a command"
    assert (tmp_path / "out.png").exists()
    assert "is not taken: it is not signed with this run's secret" in said
    assert "Traceback" not in said
    assert {address for process, address, _ in ports if process == "rank"} <= {LOOPBACK, "::1"}, ports
    for process, address, number in sorted(ports):
        print(f"{process}: {address} port {number}")


def _attack(run: subprocess.Popen[bytes], port: int, ran: Path) -> tuple[int, set[tuple[str, str, int]]]:
    """Until the run ends: how often the keys were written over, and (process, address, port) of what listened."""
    written, ports = 0, set[tuple[str, str, int]]()
    deadline = time.monotonic() + 150
    store: Any = None
    note = json.dumps({"judge": 0, "error": {"name": "RankError", "message": "forged"}, "stopped": None})
    while run.poll() is None and time.monotonic() < deadline:
        ports |= {("torchrun", *each) for each in listening(run.pid)}
        ports |= {("rank", *each) for child in descendants(run.pid) for each in listening(child.pid)}
        try:
            store = store or TCPStore(
                LOOPBACK, port, 2, is_master=False, timeout=timedelta(seconds=2), wait_for_workers=False
            )
            for key in ("verdict", "lead", "reported", "beat/0", "beat/1"):
                store.set(f"crossdock/none/0/{key}", f"\n{note}".encode() if written % 2 else pickle.dumps(Bomb(ran)))
            written += 1
        except RuntimeError:  # torchrun's store is not there yet, or no longer
            store = None
        time.sleep(0.4)
    return written, ports


def _free_port() -> int:
    store = open_store(LOOPBACK, 0, 1)
    return int(store.port)
