"""From what a model is called to its directory on this machine; huggingface_hub is imported where it is needed."""

from __future__ import annotations

import os
from collections.abc import Collection
from pathlib import Path

from crossdock.launch.hub.names import hub_name, name_of_snapshot
from crossdock.launch.hub.progress import Notify, Tell, fetch_lines


def model_directory(
    model: str | os.PathLike[str], notify: Notify, tell: Tell | None = None, without: Collection[str] = ()
) -> Path:
    """A path as it is; of a hub id, the directory with what a run reads, which is fetched if it is not there.

    Args:
        tell: gets the bytes that are there and all; by default `notify` gets a line now and then.
        without: components whose weights the run does not read.

    Raises:
        UserError: it cannot be fetched; the message says the way out.
    """
    if (name := hub_name(model)) is None:
        return Path(model)
    from crossdock.launch.hub.fetch import fetch

    return fetch(name, tell or fetch_lines(str(name), notify), notify, without=without)


def fetch_here(worker: object, directory: Path, without: Collection[str] = ()) -> None:
    """For a rank on another node than the driver's: what lies in `directory` there, a folder of the hub's cache, is
    fetched to the same path here, once per node, unless that is shared. With this node's own token.

    Raises:
        UserError: it cannot be fetched.
    """
    if (name := name_of_snapshot(directory)) is not None:
        from crossdock.launch.hub.fetch import fetch

        fetch(name, lambda done, total: None, lambda line: None, directory.parents[2], without)
