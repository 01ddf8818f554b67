"""What the server adds to a request, and what batches give: side by side, on the same ranks.

    python tests/benchmarks/serving.py [--rounds 20]

A request is run by `Engine.run` and asked for over HTTP, in turn, on the ranks of one engine; then four clients at once
ask, with batches and without. Medians.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import threading
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from functools import partial
from pathlib import Path

import httpx2
import uvicorn

from crossdock.launch.engine.engine import Engine
from crossdock.launch.engine.progress import Notify
from crossdock.launch.serve.metrics import Metrics
from crossdock.launch.serve.previews import Previews
from crossdock.launch.serve.scheduler import Scheduler
from crossdock.launch.serve.service import OwnEngine
from crossdock.launch.serve.web.app import build_app
from crossdock.launch.serve.web.desk import Desk
from crossdock.launch.serve.web.schemas import Defaults
from crossdock.launch.serve.web.server import ServeOptions, listen
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.models.tiny.make_checkpoint import make_checkpoint
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.request import GenerateRequest

SIZE, STEPS = 128, 8
BODY = {"prompt": "a red fox", "size": f"{SIZE}x{SIZE}", "num_inference_steps": STEPS, "seed": 1}


def timed(work: Callable[[], object]) -> float:
    began = time.perf_counter()
    work()
    return time.perf_counter() - began


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--rounds", type=int, default=20)
    rounds = parser.parse_args().rounds
    with tempfile.TemporaryDirectory() as folder:
        directory = Path(folder) / "model"
        make_checkpoint("flux2-klein", directory)
        config = RunConfig.parse({"offload": {"layerwise": True}})
        plan = make_plan(config, directory, "cpu")
        engine: Engine

        def start(notify: Notify) -> Engine:
            nonlocal engine
            engine = Engine.start(config, directory, notify=notify)
            return engine

        service = OwnEngine(plan, start, 4, print)
        most = 4
        scheduler = Scheduler(service.begin, lambda request: most, 64)
        usual = Defaults(name="tiny", width=SIZE, height=SIZE, steps=STEPS)
        listener = listen(ServeOptions(port=0))
        app = build_app(Desk(service, scheduler, usual, Metrics(), "0", Previews()), None)
        web = uvicorn.Server(uvicorn.Config(app, log_config=None, access_log=False, lifespan="off"))
        threading.Thread(target=partial(web.run, sockets=[listener]), daemon=True).start()
        url = f"http://127.0.0.1:{listener.getsockname()[1]}/v1/images/generations"
        request = GenerateRequest.of("a red fox", seed=1, steps=STEPS, height=SIZE, width=SIZE)
        try:
            with httpx2.Client(timeout=600) as client, ThreadPoolExecutor(4) as four:
                client.post(url, json=BODY).raise_for_status()
                alone, served = [], []
                for _ in range(rounds):
                    alone.append(timed(lambda: engine.run(request)))
                    served.append(timed(lambda: client.post(url, json=BODY).raise_for_status()))
                added = statistics.median(b - a for a, b in zip(alone, served, strict=True))
                median = statistics.median(alone)
                print(f"Engine.run {median * 1e3:.1f} ms, HTTP {statistics.median(served) * 1e3:.1f} ms")
                print(f"the server adds {added * 1e3:.1f} ms ({added / median:.1%})")

                def ask(seed: int) -> None:
                    client.post(url, json=BODY | {"seed": seed}).raise_for_status()

                times: dict[int, list[float]] = {1: [], 4: []}
                for _ in range(max(rounds // 4, 3)):
                    for most in times:
                        times[most].append(timed(lambda: list(four.map(ask, range(4)))))
                single, batched = (statistics.median(times[count]) for count in (1, 4))
                print(f"four at once: {single:.2f} s one by one, {batched:.2f} s in a batch: {single / batched:.2f}")
                print(f"a batch of 4 against 4 alone: latents {_apart(engine, request):.1e} apart")
        finally:
            scheduler.close(60)
            service.close()
            web.should_exit = True
            listener.close()


def _apart(engine: Engine, request: GenerateRequest) -> float:
    """The greatest difference of latents, relative to the greatest of them."""
    items = tuple(replace(request.items[0], seed=seed) for seed in range(4))
    together = engine.run(replace(request, items=items, batch_size=4)).latents
    alone = [engine.run(replace(request, items=(item,))).latents[0] for item in items]
    return max(float((a - b).abs().max() / b.abs().max()) for a, b in zip(together, alone, strict=True))


if __name__ == "__main__":
    main()
