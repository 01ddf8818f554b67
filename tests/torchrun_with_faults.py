"""What torchrun starts in `test_torchrun_faults`: the real program, with a fault planted in one try of the run.

PLANTED is JSON: per try `{"rank", "kind", "step"}`, or null, where only a thread is left behind. Into the folder NOTES
go the processes and the moment of the fault of every try.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

from crossdock.launch.gangs.torchrun_gang import connect_store
from crossdock.launch.torchrun import main
from crossdock.runtime.rank.worker import RankWorker

STORE_S = 5.0
STEP_S = 0.4
"""Added to every step of a try with a fault, so that each is seen."""
PASSES = 2
"""Of the model, in a step with guidance."""
TRY = int(os.environ["TORCHELASTIC_RESTART_COUNT"])
NOTES = Path(os.environ["NOTES"])


def note(name: str, text: str = "") -> None:
    (NOTES / f"try{TRY}.{name}").write_text(text)


def _skip_one(worker: RankWorker) -> None:
    group = worker.loaded.mesh.groups["tp"]
    assert group is not None

    def all_reduce(tensor: Any) -> None:
        del group.all_reduce  # type: ignore[attr-defined]

    group.all_reduce = all_reduce  # type: ignore[method-assign]


def _other_size(worker: RankWorker) -> None:
    group = worker.loaded.mesh.groups["tp"]
    assert group is not None

    def all_reduce(tensor: Any) -> None:
        del group.all_reduce  # type: ignore[attr-defined]
        group.all_reduce(tensor.new_ones(7))

    group.all_reduce = all_reduce  # type: ignore[method-assign]


def _end(kind: str, worker: RankWorker) -> None:
    note("fault", str(time.time()))
    if kind == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif kind == "stop":
        os.kill(os.getpid(), signal.SIGSTOP)
        time.sleep(60)
    elif kind == "raise":
        raise ValueError("planted")
    elif kind == "skip":
        _skip_one(worker)
    elif kind == "size":
        _other_size(worker)
    elif kind == "late":
        worker.stopping._limit_s = 0.0


def _plant(worker: RankWorker, planted: dict[str, Any]) -> None:
    worker.loaded.model.register_forward_pre_hook(lambda *_: time.sleep(STEP_S))
    if worker.rank != planted["rank"]:
        return

    passes: list[int] = []

    def look(*_: Any) -> None:
        if worker.status().step == planted["step"]:
            passes.append(1)
        if len(passes) == PASSES:
            handle.remove()
            time.sleep(STEP_S)  # until others know that it is here
            _end(planted["kind"], worker)

    blocks = worker.loaded.model.single_transformer_blocks  # a collective that is left out is the last of the step
    handle = blocks[-1].attn.register_forward_pre_hook(look)  # type: ignore[index, union-attr]


def _ask_forever() -> None:
    """As a watch that has not ended when its rank is done: it is inside of torch's store most of the time."""
    store = connect_store(STORE_S)
    with contextlib.suppress(RuntimeError):  # torchrun is gone
        while True:
            store.set("asked", "again")


def _with_fault(generate: Callable[..., Any], planted: dict[str, Any]) -> Callable[..., Any]:
    def faulty(worker: RankWorker, *args: Any) -> Any:
        _plant(worker, planted)
        return generate(worker, *args)

    return faulty


if __name__ == "__main__":
    note(f"rank{os.environ['RANK']}.pid", str(os.getpid()))
    planted = json.loads(os.environ["PLANTED"])[TRY]
    if planted is None:
        threading.Thread(target=_ask_forever, daemon=True).start()
    else:
        RankWorker.generate = _with_fault(RankWorker.generate, planted)  # type: ignore[method-assign]
    main()
