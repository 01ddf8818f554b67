"""Host memory that outlives the ranks: the process that starts them on a node holds it open, and maps nothing.

So a gang that crashed starts again without reading the checkpoint. The memory has no name anywhere: when its holder
and the ranks are gone, however they ended, the kernel has freed it. This module does without torch.
"""

from __future__ import annotations

import json
import os
from collections.abc import Callable
from dataclasses import astuple
from typing import Any

from crossdock.offload.memory.store_handle import HostStoreHandle

ANSWER_S = 10.0
"""The longest wait for a holder's answer."""


class KeptStores:
    """In the holder: (key, store) by the part of the model that is in it."""

    def __init__(self) -> None:
        self._kept: dict[str, tuple[str, HostStoreHandle]] = {}

    def answer(self, question: str) -> str:
        """A rank's question, as JSON; what is not to be had is null."""
        what, *arguments = json.loads(question)
        found = None
        match what, arguments:
            case "find", [part, key]:
                found = self._find(part, key)
            case "keep", [part, key, *handle] if self._find(part, key) is None:
                self._keep(part, key, HostStoreHandle(*handle))
            case "drop", []:
                self.drop()
        return json.dumps(found and astuple(found))

    def drop(self) -> None:
        for _, handle in self._kept.values():
            os.close(handle.fd)
        self._kept.clear()

    def _find(self, part: str, key: str) -> HostStoreHandle | None:
        kept = self._kept.get(part)
        if kept is None or kept[0] == key:
            return kept and kept[1]
        os.close(self._kept.pop(part)[1].fd)  # before the other one takes as much
        return None

    def _keep(self, part: str, key: str, handle: HostStoreHandle) -> None:
        try:
            self._kept[part] = key, HostStoreHandle(os.getpid(), handle.open(), handle.nbytes)
        except OSError:  # the rank has ended meanwhile
            return


class StoreHolder:
    """On a rank. It is a cache: no answer is a no, and the run goes on without.

    `ask`: brings a question to the holder's `KeptStores.answer`. Any failure is an OSError.
    """

    def __init__(self, ask: Callable[[str], str]) -> None:
        self._ask = ask

    def find(self, part: str, key: str) -> HostStoreHandle | None:
        """The store of this part of the model, if its bytes are those of `key`; if not, it is given up."""
        found = self._asked("find", part, key)
        return HostStoreHandle(*found) if found else None

    def keep(self, part: str, key: str, handle: HostStoreHandle) -> None:
        """Hold a store whose bytes are all written."""
        self._asked("keep", part, key, *astuple(handle))

    def drop(self) -> None:
        """Nobody will need the bytes again."""
        self._asked("drop")

    def _asked(self, *question: str | int) -> Any:
        try:
            return json.loads(self._ask(json.dumps(question)))
        except OSError:
            return None
