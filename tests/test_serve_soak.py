"""Hundreds of requests of sixteen clients, some of whom go away, send garbage or delete; ranks and a server are killed.

No request is lost, doubled or mixed up: a picture is that of its own prompt and seed, a job has its one video. What the
server holds at the end is what it held when it was warm.
"""

from __future__ import annotations

import json
import os
import random
import threading
import time
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx2
import psutil
import pytest
from processes import descendants

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.reports.media import Media
from crossdock.runtime.request import GenerateRequest, RequestItem
from live_server import CONFIG, LIMIT_S, Server, pictures_of, same_pictures, server, until
from tiers import thorough

CLIENTS = 16
TOTAL = int(os.environ.get("CROSSDOCK_SOAK", "120"))
"""Pictures; a quarter as many videos. 400 take ten minutes."""
PATIENCE_S = max(LIMIT_S, 4.0 * TOTAL)
"""For a part of the whole, on a busy machine."""
SIZES = ((32, 32), (48, 32), (32, 64), (64, 64), (96, 64))  # height, width
PROMPTS = ("a red fox", "two whales", "a lighthouse in a storm")
SEEDS = 3
GARBAGE = (b"{", b"[]", b'{"prompt": 7}', b'{"prompt": "a", "size": "1x1"}', b"\xff\xfe", b'{"prompt": "a", "n": 99}')


@dataclass(frozen=True)
class Asked:
    prompt: str
    seed: int
    size: tuple[int, int]


@dataclass(frozen=True)
class Answer:
    """`request`: the server's name for it."""

    asked: Asked
    made: Any
    request: str = ""


@dataclass
class Soak:
    """What the clients share.

    Attributes:
        live: the server of now; whoever finds it gone waits for the next one.
        answers: what came, and for what.
        done: requests that are over, one way or another, by the way.
        logs: what each server has printed.
    """

    live: Server
    total: int
    answers: list[Answer] = field(default_factory=list)
    done: Counter[str] = field(default_factory=Counter)
    failures: list[str] = field(default_factory=list)
    logs: list[list[str]] = field(default_factory=list)
    lock: threading.Lock = field(default_factory=threading.Lock)
    taken: int = 0

    def next(self) -> int | None:
        """The number of a request that nobody has made."""
        with self.lock:
            self.taken += 1
            return self.taken if self.taken <= self.total else None

    def over(self, way: str, answer: Answer | None = None) -> None:
        with self.lock:
            self.done[way] += 1
            self.answers += [answer] * (answer is not None)

    def ask(self, method: str, path: str, timeout: float = LIMIT_S, **more: Any) -> httpx2.Response:
        """Again while nobody listens, or the server says that it is not ready, or full."""
        until_s = time.monotonic() + LIMIT_S
        while time.monotonic() < until_s:
            try:
                answer = httpx2.request(method, self.live.url + path, timeout=timeout, **more)
            except httpx2.ReadTimeout:
                raise
            except httpx2.TransportError:
                time.sleep(0.2)
                continue
            if answer.status_code not in (429, 503):
                return answer
            time.sleep(0.2)
        raise AssertionError(f"{method} {path}: no answer")


def _client(soak: Soak, number: int, one: Callable[[Soak, random.Random, Asked], None]) -> None:
    chance = random.Random(number)
    while soak.next() is not None:
        asked = Asked(chance.choice(PROMPTS), chance.randrange(SEEDS), chance.choice(SIZES))
        try:
            one(soak, chance, asked)
        except Exception as error:
            soak.failures.append(f"{asked}: {error!r}")


def _body(asked: Asked) -> dict[str, Any]:
    height, width = asked.size
    return {"prompt": asked.prompt, "seed": asked.seed, "size": f"{width}x{height}", "num_inference_steps": 2}


def _picture(soak: Soak, chance: random.Random, asked: Asked) -> None:
    path, way = "/v1/images/generations", chance.random()
    if way < 0.1:
        answer = soak.ask("POST", path, content=chance.choice(GARBAGE))
        assert answer.status_code in (400, 422), answer.text
        soak.over("garbage")
    elif way < 0.25:
        with suppress(httpx2.ReadTimeout):  # the client has gone
            soak.ask("POST", path, timeout=chance.uniform(0.02, 0.4), json=_body(asked))
        soak.over("gone")
    else:
        answer = soak.ask("POST", path, json=_body(asked))
        soak.over("answered", Answer(asked, pictures_of(answer)[0], answer.headers["x-request-id"]))


def _job(soak: Soak, chance: random.Random, asked: Asked) -> None:
    path, way = "/v1/videos", chance.random()
    if way < 0.1:
        answer = soak.ask("POST", path, content=chance.choice(GARBAGE))
        assert answer.status_code in (400, 415, 422), answer.text
        soak.over("garbage")
        return
    made = soak.ask("POST", path, json=_body(asked) | {"num_frames": 5})
    assert made.status_code == 200, made.text
    name = made.json()["id"]
    if way < 0.25:
        time.sleep(chance.uniform(0, 0.5))
        assert soak.ask("DELETE", f"{path}/{name}").status_code == 200
        assert soak.ask("GET", f"{path}/{name}").status_code == 404
        soak.over("deleted")
        return
    job: dict[str, Any] = {}
    until(lambda: job.update(soak.ask("GET", f"{path}/{name}").json()) or job["status"] in ("completed", "failed"))
    assert job["status"] == "completed", job
    soak.over("answered", Answer(asked, soak.ask("GET", f"{path}/{name}/content").content))


def _held(live: Server) -> dict[str, int]:
    tree = [psutil.Process(live.process.pid), *descendants(live.process.pid)]
    return {
        "bytes": sum(process.memory_info().rss for process in tree),
        "descriptors": sum(process.num_fds() for process in tree),
        "segments": len(os.listdir("/dev/shm")),
    }


def _soak(model_dir: Path, data: Path, total: int, one: Callable[[Soak, random.Random, Asked], None]) -> Soak:
    """The server is killed after a third; ranks once before and twice after it."""
    options = ("--data", str(data), "--max-batch", "4", "--queue", "32", "--log-prompts")

    def reaches(share: float) -> bool:
        return soak.taken >= share * total or bool(soak.failures)

    with server(model_dir, *options) as first:
        soak = Soak(first, total, logs=[first.lines])
        clients = [threading.Thread(target=_client, args=(soak, number, one)) for number in range(CLIENTS)]
        for client in clients:
            client.start()
        until(lambda: reaches(0.15), PATIENCE_S)
        first.kill_a_rank()
        until(lambda: reaches(0.33), PATIENCE_S)
        first.kill()
    with server(model_dir, *options) as soak.live:
        soak.logs.append(soak.live.lines)
        until(lambda: reaches(0.5), PATIENCE_S)
        soak.live.kill_a_rank()
        until(lambda: reaches(0.7), PATIENCE_S)
        warm = _held(soak.live)
        soak.live.kill_a_rank()
        for client in clients:
            client.join(PATIENCE_S)
            assert not client.is_alive()
        until(lambda: httpx2.get(f"{soak.live.url}/v1/status", timeout=30).json()["running"] == 0)
        until(soak.live.is_ready)
        end = _held(soak.live)
    print(f"{total} requests: {dict(soak.done)}; held when warm {warm}, at the end {end}")
    assert not soak.failures, soak.failures[:5]
    assert sum(soak.done.values()) == total
    assert end["bytes"] < 1.2 * warm["bytes"] + 50e6
    assert end["descriptors"] <= warm["descriptors"] + CLIENTS
    assert end["segments"] <= warm["segments"]
    return soak


def _batches(log: list[str], killed: bool) -> dict[int, dict[int, dict[str, Any]]]:
    """Number of a batch -> first picture -> the line of the request that had it, of batches that nobody left."""
    found: dict[int, dict[int, dict[str, Any]]] = {}
    for line in log:
        with suppress(ValueError):
            row = json.loads(line)
            if isinstance(row, dict) and row.get("batch") is not None:
                found.setdefault(row["batch"][0], {})[row["batch"][1]] = row
    if killed:  # of the last batch some lines may be missing
        found.pop(max(found, default=0), None)
    return {number: rows for number, rows in found.items() if sorted(rows) == list(range(len(rows)))}


@thorough
@pytest.mark.timeout(6 * PATIENCE_S)
def test_pictures(flux2_dir: Path, tmp_path: Path) -> None:
    """Each is, bit for bit, what the engine makes of the same batch: prompts and seeds as the server logs them."""
    soak = _soak(flux2_dir, tmp_path, TOTAL, _picture)
    answers = {answer.request: answer for answer in soak.answers}
    assert len(answers) == len(soak.answers), "an answer came twice"
    same: Counter[int] = Counter()  # by the size of the batch
    known: dict[GenerateRequest, list[Media]] = {}
    with Engine.start(load_config(CONFIG), flux2_dir) as engine:
        for rows in (rows for log in soak.logs for rows in _batches(log, log is soak.logs[0]).values()):
            there = {first: answers[row["id"]] for first, row in sorted(rows.items()) if row["id"] in answers}
            if not there:
                continue
            items = tuple(
                RequestItem(row["prompt"], row["negative_prompt"], row["seed"]) for _, row in sorted(rows.items())
            )
            height, width = next(iter(there.values())).asked.size
            asked = GenerateRequest(items, steps=2, height=height, width=width, batch_size=len(items))
            made = known[asked] = known.get(asked) or engine.run(asked).images
            for first, answer in there.items():
                assert items[first].prompt == answer.asked.prompt
                assert items[first].seed == answer.asked.seed
                assert same_pictures([answer.made], [made[first]]), answer.asked
                same[len(items)] += 1
    print(f"bit-equal to the same batch without a server: {dict(same)}, of {len(answers)}")
    assert sum(same.values()) > 0.9 * len(answers)  # some lines were not written when the server was killed


@thorough
@pytest.mark.timeout(6 * PATIENCE_S)
def test_videos(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """One answer to each question: equal bytes for equal questions, others for others."""
    soak = _soak(checkpoint_of("wan2.1"), tmp_path, TOTAL // 4, _job)
    films: dict[Asked, set[bytes]] = {}
    for answer in soak.answers:
        films.setdefault(answer.asked, set()).add(answer.made)
    print(
        f"{len(soak.answers)} videos of {len(films)} kinds; different encodings of one: {max(map(len, films.values()))}"
    )
    everything = [film for found in films.values() for film in found]
    assert len(set(everything)) == len(everything)
    left = list(tmp_path.rglob("*.mp4"))
    assert len(left) >= len(soak.answers)
