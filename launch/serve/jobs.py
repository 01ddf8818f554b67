"""Video jobs in SQLite, with their files beside it: they outlive the server."""

from __future__ import annotations

import fcntl
import json
import os
import secrets
import sqlite3
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import IO, Any, Literal

from crossdock.runtime.errors import LaunchError
from crossdock.runtime.request import GenerateRequest, RequestItem

Status = Literal["queued", "completed", "failed"]
"""What runs is queued until it is done: whoever stops meanwhile leaves it so."""
_COLUMNS = "id, created_at, status, request, fps, completed_at, expires_at, code, message"
_SCHEMA = """
CREATE TABLE IF NOT EXISTS jobs (
    place INTEGER PRIMARY KEY AUTOINCREMENT, id TEXT NOT NULL UNIQUE, created_at INTEGER NOT NULL, status TEXT NOT NULL,
    request TEXT NOT NULL, fps INTEGER NOT NULL, completed_at INTEGER, expires_at INTEGER, code TEXT, message TEXT
)
"""


@dataclass(frozen=True)
class Job:
    """Times in seconds since 1970. `code`, `message`: why it failed."""

    id: str
    created_at: int
    status: Status
    request: GenerateRequest
    fps: int
    completed_at: int | None = None
    expires_at: int | None = None
    code: str | None = None
    message: str | None = None


class JobStore:
    """Of one server at a time. For any thread."""

    def __init__(self, folder: Path) -> None:
        """
        Raises:
            LaunchError: another server has the folder, or it cannot be written.
        """
        self.folder = folder
        self._lock = threading.Lock()
        try:
            folder.mkdir(parents=True, exist_ok=True, mode=0o700)
            self._held = _hold(folder / "lock")
            for part in folder.glob(".*.part"):  # of a server that was killed while it wrote
                part.unlink()
            self._db = sqlite3.connect(folder / "jobs.sqlite", check_same_thread=False, isolation_level=None)
            self._db.execute("PRAGMA journal_mode=WAL")
            self._db.execute(_SCHEMA)
        except BlockingIOError:
            raise LaunchError(f"--data {folder}: another server uses it; give each its own") from None
        except (OSError, sqlite3.Error) as error:
            raise LaunchError(f"--data {folder}: cannot be used: {error}") from None

    def add(self, request: GenerateRequest, fps: int) -> Job:
        """
        Raises:
            sqlite3.Error: nothing can be written.
        """
        job = Job(f"video_{secrets.token_hex(16)}", int(time.time()), "queued", request, fps)
        values = (job.id, job.created_at, job.status, json.dumps(asdict(request)), fps)
        self._run("INSERT INTO jobs (id, created_at, status, request, fps) VALUES (?, ?, ?, ?, ?)", *values)
        return job

    def get(self, name: str) -> Job | None:
        return next(iter(self._jobs("WHERE id = ?", name)), None)

    def page(self, after: str | None, limit: int, newest_first: bool) -> list[Job]:
        """At most `limit` jobs behind `after`; an unknown one is the first page's end."""
        order, than = ("DESC", "<") if newest_first else ("ASC", ">")
        where = f"WHERE place {than} (SELECT place FROM jobs WHERE id = ?)" if after is not None else ""
        return self._jobs(f"{where} ORDER BY place {order} LIMIT {limit:d}", *([] if after is None else [after]))

    def unfinished(self) -> list[Job]:
        """Oldest first."""
        return self._jobs("WHERE status = 'queued' ORDER BY place")

    def complete(self, name: str, keep_s: float, write: Callable[[Path], Any]) -> None:
        """`write` gets the path of a file that becomes the job's when it is whole.

        Raises:
            OSError, sqlite3.Error: there is no room.
        """
        part = self.folder / f".{name}.part"
        try:
            write(part)
            part.replace(self.file(name))
        finally:
            part.unlink(missing_ok=True)
        now = int(time.time())
        done = "UPDATE jobs SET status = 'completed', completed_at = ?, expires_at = ? WHERE id = ?"
        if not self._run(done, now, now + int(keep_s), name):
            self.file(name).unlink(missing_ok=True)  # deleted meanwhile

    def fail(self, name: str, keep_s: float, code: str, message: str) -> None:
        now = int(time.time())
        failed = (
            "UPDATE jobs SET status = 'failed', completed_at = ?, expires_at = ?, code = ?, message = ? WHERE id = ?"
        )
        self._run(failed, now, now + int(keep_s), code, message, name)

    def delete(self, name: str) -> None:
        self._run("DELETE FROM jobs WHERE id = ?", name)
        self.file(name).unlink(missing_ok=True)

    def expire(self) -> None:
        """Delete what is out of date."""
        for job in self._jobs("WHERE expires_at < ?", int(time.time())):
            self.delete(job.id)

    def file(self, name: str) -> Path:
        """Of a job's own id, never of a client's text."""
        return self.folder / f"{name}.mp4"

    def close(self) -> None:
        with self._lock:
            self._db.close()
        self._held.close()

    def _jobs(self, where: str, *values: Any) -> list[Job]:
        with self._lock:
            rows = self._db.execute(f"SELECT {_COLUMNS} FROM jobs {where}", values).fetchall()
        named = (dict(zip(_COLUMNS.split(", "), row, strict=True)) for row in rows)
        return [Job(**{**row, "request": _request(row["request"])}) for row in named]

    def _run(self, statement: str, *values: Any) -> int:
        with self._lock:
            return self._db.execute(statement, values).rowcount


def _request(text: str) -> GenerateRequest:
    fields = json.loads(text)
    return GenerateRequest(**{**fields, "items": tuple(RequestItem(**item) for item in fields["items"])})


def _hold(path: Path) -> IO[str]:
    """Until the file is closed, or the process ends however it does.

    Raises:
        BlockingIOError: another process holds it.
    """
    file = path.open("w")
    try:
        os.set_inheritable(file.fileno(), False)
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BaseException:
        file.close()
        raise
    return file
