"""A model of the hub becomes a directory: what a run reads is fetched to huggingface_hub's cache, once per node."""

from __future__ import annotations

import fcntl
import logging
import re
import shutil
import time
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

from huggingface_hub import HfApi, constants, get_cached_repo_tree, get_hf_file_metadata, hf_hub_url, snapshot_download
from huggingface_hub.errors import CachedRepoTreeNotFoundError
from huggingface_hub.utils import logging as hub_logging
from huggingface_hub.utils import tqdm  # type: ignore[attr-defined]

from crossdock.launch.hub.blobs import Blob, fetch_blobs
from crossdock.launch.hub.names import HubName
from crossdock.launch.hub.problems import disk_full, explained
from crossdock.launch.hub.progress import FETCH_S, Notify, Tell
from crossdock.launch.hub.wanted import INDICES, index_of, wanted_files
from crossdock.runtime.errors import LaunchError
from crossdock.runtime.models.checkpoint import read_json
from crossdock.runtime.models.families import spec_for

_LOOK_S = 0.5
_SHA256 = re.compile(r"[0-9a-f]{64}")


class _Silent(tqdm):
    """huggingface_hub's own bars are not shown."""

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{**options, "disable": True})  # type: ignore[no-untyped-call]


def pinned(name: HubName, cache: Path | None = None) -> HubName:
    """With the commit that its revision is now; where the hub cannot be reached, that of the last time.

    Raises:
        UserError: there is no such model, it may not be read, or nothing is known of it here.
    """
    cache = cache or default_cache()
    with explained(name, cache), _quiet():
        found = HfApi().resolve_revision(name.repo, revision=name.revision, cache_dir=cache)
        return HubName(name.repo, found.resolved)


def fetch(name: HubName, tell: Tell, notify: Notify, cache: Path | None = None, without: Collection[str] = ()) -> Path:
    """The directory with what a run reads of `name`. What is there already is not fetched again.

    Args:
        without: components whose weights it does not read.

    Raises:
        UserError: it cannot be had, or is in a format that is not read; it says the way out.
    """
    cache = cache or default_cache()
    commit = pinned(name, cache).revision or ""
    with explained(name, cache), _quiet(), _one_at_a_time(cache / ".locks", name, notify):
        snapshot = _snapshot(name, commit, cache, [INDICES[0]])
        files = _listing(name, commit, cache, snapshot)
        index = index_of(name.repo, files)
        snapshot = _snapshot(name, commit, cache, [index])
        wanted = wanted_files(name.repo, files, read_json(snapshot / index), spec_for(snapshot), without)
        weights = [path for path in wanted if path.endswith(".safetensors")]
        _fetch_weights(name, commit, cache, weights, snapshot, tell)
        return _snapshot(name, commit, cache, [index, *wanted])


def default_cache() -> Path:
    return Path(constants.HF_HUB_CACHE).expanduser().resolve()


def _snapshot(name: HubName, commit: str, cache: Path, files: list[str]) -> Path:
    """`files` as the cache shows them, fetched where they are small; raises where one is missing and cannot be had."""
    found = snapshot_download(
        name.repo, revision=commit, cache_dir=cache, allow_patterns=files, tqdm_class=_Silent, library_name="crossdock"
    )
    return Path(found)


def _listing(name: HubName, commit: str, cache: Path, snapshot: Path) -> list[str]:
    """The repository's files; where nobody has listed them and the hub is away, those that are here."""
    try:
        return [file.path for file in get_cached_repo_tree(name.repo, revision=commit, cache_dir=cache)]
    except CachedRepoTreeNotFoundError:  # the cache was filled by an older huggingface_hub
        return [path.relative_to(snapshot).as_posix() for path in snapshot.rglob("*") if path.is_file()]


def _fetch_weights(name: HubName, commit: str, cache: Path, paths: Sequence[str], snapshot: Path, tell: Tell) -> None:
    """Those that are not here, if all of them find room; what HTTP does not bring is left to huggingface_hub."""
    blobs: dict[str, Blob] = {}
    for url in (hf_hub_url(name.repo, path, revision=commit) for path in paths if not (snapshot / path).exists()):
        found = get_hf_file_metadata(url)
        if found.etag and found.size and _SHA256.fullmatch(found.etag):
            blobs[found.etag] = Blob(url, found.etag, found.size, snapshot.parents[1] / "blobs")
    absent = [blob for blob in blobs.values() if not blob.path.exists()]
    missing_bytes = sum(blob.size - blob.part_bytes for blob in absent)
    free_bytes = shutil.disk_usage(snapshot).free
    if missing_bytes > free_bytes:
        raise disk_full(name, cache, missing_bytes, free_bytes)
    fetch_blobs([blob for blob in absent if blob.size <= constants.MAX_HTTP_DOWNLOAD_SIZE], tell)


@contextmanager
def _quiet() -> Iterator[None]:
    """What huggingface_hub warns of is said by `explained`, or went well in the end."""
    before = hub_logging.get_verbosity()
    hub_logging.set_verbosity(logging.ERROR)
    try:
        yield
    finally:
        hub_logging.set_verbosity(before)


@contextmanager
def _one_at_a_time(folder: Path, name: HubName, notify: Notify) -> Iterator[None]:
    """Of the processes of a node; who comes later finds what the first one has fetched."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        file = (folder / f"crossdock--{name.repo.replace('/', '--')}.lock").open("w")
    except OSError:  # read only, or full: what is there can be read all the same
        yield
        return
    with file:  # closing it ends the lock, as the end of the process does
        _lock(file, name, notify)
        yield


def _lock(file: IO[str], name: HubName, notify: Notify) -> None:
    deadline, waits = time.monotonic() + FETCH_S, False
    while True:
        try:
            return fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            if not waits:
                notify(f"{name}: another process of this machine fetches it; waiting")
            waits = True
        except OSError:  # a file system without locks
            return None
        if time.monotonic() > deadline:
            raise LaunchError(
                f"{name}: another process of this machine has been fetching it for {FETCH_S / 3600:g} h; end it, and "
                "start again: what it has fetched is kept"
            )
        time.sleep(_LOOK_S)
