"""Video jobs: as OpenAI's client makes, polls, fetches and deletes them; over restarts, and on a full disk."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import openai
import pytest

from crossdock.launch.serve.jobs import JobStore
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import LaunchError, RankError
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.request import GenerateRequest
from fake_gang import LIMIT_S
from serving import Served, served

pytestmark = pytest.mark.filterwarnings("ignore:The Sora API:DeprecationWarning")
SMALL: dict[str, Any] = {"size": "32x32", "extra_body": {"num_inference_steps": 2, "seed": 4}}


@pytest.fixture(scope="module")
def plan(checkpoint_of: Callable[[str], Path]) -> RunPlan:
    return make_plan(RunConfig(), checkpoint_of("wan2.1"), "cpu")


@pytest.fixture(scope="module")
def live(plan: RunPlan, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Served]:
    data = tmp_path_factory.mktemp("jobs")
    with pytest.MonkeyPatch.context() as patch, served(plan, patch, data=data) as found:
        yield found


@pytest.fixture(scope="module")
def client(live: Served) -> Iterator[openai.OpenAI]:
    with _client(live) as client:
        yield client


def _client(live: Served) -> openai.OpenAI:
    return openai.OpenAI(base_url=f"{live.url}/v1", api_key="none", max_retries=0, timeout=LIMIT_S)


def _ended(client: openai.OpenAI, name: str) -> Any:
    deadline = time.monotonic() + LIMIT_S
    while (video := client.videos.retrieve(name)).status not in ("completed", "failed"):
        assert time.monotonic() < deadline
        time.sleep(0.02)
    return video


def test_create_poll_download_list_delete(client: openai.OpenAI) -> None:
    made = client.videos.create_and_poll(prompt="a fox runs", **SMALL)
    assert (made.status, made.progress, made.size, made.model) == ("completed", 100, "32x32", "fox-1")
    assert made.expires_at
    assert made.completed_at
    assert made.expires_at > made.completed_at
    content = client.videos.download_content(made.id).read()
    assert content[4:8] == b"ftyp"
    assert made.id in [video.id for video in client.videos.list()]
    assert client.videos.delete(made.id).deleted
    with pytest.raises(openai.NotFoundError):
        client.videos.retrieve(made.id)


def test_pages(client: openai.OpenAI) -> None:
    names = [client.videos.create(prompt=f"fox {n}", **SMALL).id for n in range(3)]
    assert [video.id for video in client.videos.list(limit=2)][:3] == names[::-1]  # several pages
    assert [video.id for video in client.videos.list(order="asc", after=names[0])] == names[1:]
    for name in names:
        _ended(client, name)
        client.videos.delete(name)


def test_frames_of_seconds(client: openai.OpenAI) -> None:
    seconds: Any = "0.5"
    made = client.videos.create(prompt="a fox", seconds=seconds, **SMALL)
    assert float(made.seconds) == pytest.approx(0.5, abs=0.1)
    assert json.loads(made.to_json())["num_frames"] == 9
    _ended(client, made.id)


@pytest.mark.parametrize(
    ("asked", "param"),
    [
        ({"seconds": "x"}, "seconds"),
        ({"seconds": "-1"}, "seconds"),
        ({"seconds": "1e9"}, "seconds"),
        ({"size": "7x7"}, "size"),
        ({"extra_body": {"num_frames": 8}}, "num_frames"),
        ({"extra_body": {"fps": 60}}, "fps"),
        ({"extra_body": {"num_frames": 9}, "seconds": "1"}, "seconds"),
        ({"input_reference": ("a.png", b"123")}, "input_reference"),
        ({"extra_body": {"remix": "x"}}, "remix"),
    ],
    ids=str,
)
def test_what_cannot_be_honoured_is_refused_by_name(client: openai.OpenAI, asked: Any, param: str | None) -> None:
    with pytest.raises(openai.BadRequestError) as found:
        client.videos.create(**{"prompt": "a fox", **asked})
    assert param is None or found.value.param == param


def test_what_is_not_done_cannot_be_fetched_and_goes_when_deleted(
    plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with served(plan, monkeypatch, data=tmp_path, waits=True) as live, _client(live) as client:
        made = client.videos.create(prompt="a fox", **SMALL)
        live.eventually(lambda: client.videos.retrieve(made.id).status == "in_progress")
        with pytest.raises(openai.ConflictError):
            client.videos.download_content(made.id)
        assert int(httpx2.get(f"{live.url}/v1/videos/{made.id}").headers["openai-poll-after-ms"]) >= 500
        client.videos.delete(made.id)
        live.eventually(lambda: live.gang.told)  # the step that runs is its last
        live.gang.gate.set()
        live.eventually(lambda: not live.scheduler.running)
        with pytest.raises(openai.NotFoundError):
            client.videos.retrieve(made.id)
    assert not list(tmp_path.glob("*.mp4"))


def test_a_failed_job_is_answered_with_200(plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with served(plan, monkeypatch, data=tmp_path) as live, _client(live) as client:
        retries = plan.config.launch.recovery.retries
        live.gang.faults = [RankError(0, "its process died", "died")] * 2 * (retries + 1)
        failed = _ended(client, client.videos.create(prompt="a fox", **SMALL).id)
        assert failed.error is not None
        assert failed.error.code == "RankError"
        assert _ended(client, client.videos.create(prompt="a fox", **SMALL).id).status == "completed"


def test_a_full_disk_is_the_error_of_that_job(plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def write(video: Any, path: Path) -> None:
        path.write_bytes(b"half")
        raise OSError(28, "No space left on device")

    with served(plan, monkeypatch, data=tmp_path, write=write) as live, _client(live) as client:
        failed = _ended(client, client.videos.create(prompt="a fox", **SMALL).id)
        assert failed.error is not None
        assert failed.error.code == "storage"
        assert httpx2.get(f"{live.url}/health").status_code == 200
    assert not list(tmp_path.glob("*.mp4"))
    assert not list(tmp_path.glob(".*.part"))


def test_jobs_outlive_their_server(plan: RunPlan, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also the one that ran; what a server was writing when it was killed goes."""
    with served(plan, monkeypatch, data=tmp_path, waits=True) as live, _client(live) as client:
        names = [client.videos.create(prompt=f"fox {n}", **SMALL).id for n in range(3)]
        live.eventually(lambda: live.scheduler.running)
    (tmp_path / f".{names[0]}.part").write_bytes(b"half")
    with served(plan, monkeypatch, data=tmp_path) as live, _client(live) as client:
        assert [_ended(client, name).status for name in names] == ["completed"] * 3
        assert live.gang.ran[0][0] in ("fox 0", "fox 1")  # the first may just have been done
        assert client.videos.download_content(names[2]).read()[4:8] == b"ftyp"
    assert not list(tmp_path.glob(".*.part"))


def test_jobs_expire(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    job = store.add(GenerateRequest.of("a fox"), 16)
    store.complete(job.id, -10, lambda path: path.write_bytes(b"film"))
    assert store.file(job.id).is_file()
    store.expire()
    assert store.get(job.id) is None
    assert not store.file(job.id).exists()
    store.close()


def test_one_server_for_a_folder(tmp_path: Path) -> None:
    store = JobStore(tmp_path)
    with pytest.raises(LaunchError, match="another server uses it"):
        JobStore(tmp_path)
    store.close()
    JobStore(tmp_path).close()


def test_a_folder_that_cannot_be(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(LaunchError, match="cannot be used"):
        JobStore(tmp_path / "file")
