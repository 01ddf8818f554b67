"""Every error that crossdock raises on purpose.

    CrossdockError                exit code 1
    ├── UserError                 exit code 2: the input is wrong; the message says what, where and what to do
    │   ├── ConfigError           the YAML file or a RunConfig
    │   ├── CheckpointError       the model directory
    │   ├── RequestError          the arguments of one generation
    │   │   └── RequestRefused    the pipeline does not take them, say all ranks; they take the next request
    │   └── LaunchError           what the machine lacks: GPUs, a free port, an optional package
    ├── CompositionError          offloading and sharding do not compose; carries the violations (contract/result.py)
    ├── RankError                 a rank raised, died or did not answer in time; carries the rank
    ├── EngineClosedError         a request came to an engine, or waited in one, that was closed or whose ranks are gone
    ├── EncodingRefused           some tensors are not to be encoded, say all ranks; they take the next plan
    └── RequestCancelled          a request was stopped between two steps, as asked; the ranks take the next one
        └── RequestTimeout        its own time limit was up

`offload/` and `parallel/` stand below this module and raise built-in exceptions.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal


class CrossdockError(Exception):
    """Base of all; `exit_code` is what the command line returns."""

    exit_code = 1


class UserError(CrossdockError):
    """The user's input is wrong. One message: what, where, what to do.

    `key` is the key path in the config that the message is about, where there is one: `parallel.tp_degree`.
    """

    exit_code = 2

    def __init__(self, message: str, key: str | None = None) -> None:
        super().__init__(message, key)
        self.message = message
        self.key = key

    def __str__(self) -> str:
        return f"{self.key}: {self.message}" if self.key else self.message


class ConfigError(UserError):
    """The parallel-config YAML file, or a `RunConfig` built in Python."""


class CheckpointError(UserError):
    """The model directory: a missing, truncated or unsuitable file or tensor."""


class RequestError(UserError):
    """The arguments of one generation: size, steps, output path."""


class RequestRefused(RequestError):  # noqa: N818 - no rank's fault
    """A pipeline does not take what it was given. On all ranks; the gang is as good as before."""


class LaunchError(UserError):
    """What the machine or the installation lacks."""


FaultKind = Literal["raised", "memory", "cut off", "died", "stopped", "silent", "hangs", "late", "collectives"]
"""raised: an exception; memory: the device has none left; cut off: a collective failed, so another rank is to blame;
died, stopped: its process; silent: it does not answer; hangs: it answers, but did not come where the others waited for
it as long as they may; late: it was not done in time; collectives: it issued others than its group.
"""


class RankError(CrossdockError):
    """A rank raised, died or did not answer in time."""

    def __init__(self, rank: int, message: str, kind: FaultKind = "raised") -> None:
        super().__init__(rank, message, kind)
        self.rank = rank
        self.message = message
        self.kind = kind

    def __str__(self) -> str:
        return f"rank {self.rank}: {self.message}"


class EngineClosedError(CrossdockError):
    """The engine was closed, or has given its ranks up, before the request could begin."""

    def __init__(self, why: str) -> None:
        super().__init__(why)
        self.why = why

    def __str__(self) -> str:
        return f"the engine takes no requests: {self.why}; start a new one"


class EncodingRefused(CrossdockError):  # noqa: N818 - not a fault
    """Of some tensors a codec makes no fewer bytes, found at load, on all ranks; another plan leaves them as they are.

    `plain`: block -> their names in it.
    """

    def __init__(self, plain: Mapping[str, frozenset[str]]) -> None:
        super().__init__(plain)
        self.plain = plain

    def __str__(self) -> str:
        names = ", ".join(f"{block}.{name}" for block, names in self.plain.items() for name in sorted(names))
        return f"not to be encoded: {names}"


class RequestCancelled(CrossdockError):  # noqa: N818 - not a fault
    """A request was stopped at a step's end, on all ranks; the gang is as good as before.

    `finished_steps` counts the steps of the request that were done.
    """

    def __init__(self, reason: str, finished_steps: int) -> None:
        super().__init__(reason, finished_steps)
        self.reason = reason
        self.finished_steps = finished_steps

    def __str__(self) -> str:
        return f"stopped after step {self.finished_steps}: {self.reason}"


class RequestTimeout(RequestCancelled):
    """A request took longer than its time limit."""
