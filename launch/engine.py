"""The engine: a gang of ranks that holds one model and answers requests."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from crossdock.launch.arguments import Outputs
from crossdock.runtime.config import LaunchConfig, RunConfig
from crossdock.runtime.coordinator import Coordinator
from crossdock.runtime.errors import CrossdockError, LaunchError
from crossdock.runtime.gang import Gang
from crossdock.runtime.plan import RunPlan, check_request, make_plan
from crossdock.runtime.reports import RankTrace
from crossdock.runtime.request import GenerateRequest
from crossdock.runtime.trace_file import chrome_trace
from crossdock.runtime.worker import RankResult, RankWorker

Progress = Callable[[int, int], None]
"""Called with (finished steps, all steps)."""


MakeGang = Callable[[LaunchConfig, int, str], Gang]
"""Makes a gang from (launch section, number of ranks, "cpu" or "cuda")."""


@dataclass(frozen=True)
class Generation:
    """The answer to a request, in the order of its prompts.

    Attributes:
        latents: per prompt `[1, channels, height, width]`, fp32, what diffusers returns with `output_type="latent"`.
        report: the content of `report.json`.
        trace: per rank, and per round of prompts, what it did when.
    """

    images: list[Image.Image]
    latents: list[Tensor]
    report: dict[str, Any]
    trace: list[RankTrace]


class Engine:
    """Use it as a context manager; `close` ends all ranks."""

    def __init__(self, plan: RunPlan, gang: Gang, owns_gang: bool, launch_s: float) -> None:
        self.gang = gang
        self._owns_gang = owns_gang
        self._idle = False  # the ranks wait for work: nobody was interrupted in the middle of it
        self._coordinator = Coordinator(plan)
        self._phases = {"launch": launch_s, "load": 0.0, "verify": 0.0}

    @property
    def plan(self) -> RunPlan:
        """What the ranks hold now."""
        return self._coordinator.plan

    @classmethod
    def start(
        cls,
        config: RunConfig,
        model_dir: str | os.PathLike[str],
        gang: Gang | None = None,
        make_gang: MakeGang | None = None,
        first_request: GenerateRequest | None = None,
    ) -> Engine:
        """Plan, launch, load, verify.

        Args:
            gang: a started gang to run on; it is left running at `close`.
            make_gang: without `gang`, makes the engine's own; by default one of Ray actors.
            first_request: what is asked for first, where that is known; refused before anything is started.

        Raises:
            UserError: the config, the checkpoint or the machine does not do.
            CompositionError: offloading and sharding do not compose.
            RankError: a rank failed.
        """
        device = choose_device(config)
        plan = make_plan(config, Path(model_dir), device)
        if first_request is not None:
            check_request(plan, first_request)
        began = time.perf_counter()
        if gang is not None:
            engine = cls(plan, gang, owns_gang=False, launch_s=0.0)
        else:
            gang = (make_gang or _ray_gang)(config.launch, config.world_size, device)
            gang.start()
            engine = cls(plan, gang, owns_gang=True, launch_s=time.perf_counter() - began)
        try:
            engine._load()
        except BaseException:
            engine.close()
            raise
        return engine

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        seed: int = 0,
        steps: int = 4,
        height: int = 256,
        width: int = 256,
        guidance_scale: float | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Generate one picture per prompt; prompt number i is drawn with `seed + i`.

        Raises:
            RequestError: the arguments do not fit the model; the engine stays usable.
            CompositionError, RankError: the run failed; the engine is closed.
        """
        prompts = (prompt,) if isinstance(prompt, str) else tuple(prompt)
        request = GenerateRequest(prompts, seed, steps, height, width, guidance_scale)
        check_request(self.plan, request)
        replicas = self.plan.mesh.dp
        done: list[RankResult] = []
        for first in range(0, len(prompts), replicas):
            part = GenerateRequest(
                prompts[first : first + replicas], seed + first, steps, height, width, guidance_scale
            )
            done.extend(self._run(part, progress))
        finished = [result for result in done if result.image is not None and result.latents is not None]
        return Generation(
            [result.image for result in finished if result.image is not None],
            [result.latents for result in finished if result.latents is not None],
            self._report(done[-self.plan.mesh.world_size :]),
            [result.timeline for result in done],
        )

    def close(self) -> None:
        """Give the model up, its host memory included, and end all ranks, unless they were borrowed. Twice is fine.

        After a failed request the ranks are gone already, and what they had in host memory is kept for a while: an
        engine that is started again with the same layout does not read the checkpoint again.
        """
        if self._idle or not self._owns_gang:
            try:
                self.gang.call(RankWorker.teardown, timeout_s=self.plan.config.launch.timeouts.launch_s)
            except CrossdockError:  # a rank hangs or is gone: the gang is of no use to its owner either
                self.gang.close()
        if self._owns_gang:
            self.gang.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def _load(self) -> None:
        timeouts = self.plan.config.launch.timeouts
        began = time.perf_counter()
        if self.plan.config.offload.is_relative:
            device_bytes = min(self.gang.call(RankWorker.device_bytes, timeout_s=timeouts.launch_s))
            plan = make_plan(self.plan.config, self.plan.model_dir, self.plan.device, device_bytes)
            self._coordinator = Coordinator(plan)
        reports = self.gang.call(RankWorker.setup, self.plan, timeout_s=timeouts.load_s)
        loaded = time.perf_counter()
        self._idle = True
        self._coordinator.admit(reports)
        self._phases |= {"load": loaded - began, "verify": time.perf_counter() - loaded}

    def _run(self, request: GenerateRequest, progress: Progress | None) -> list[RankResult]:
        def watch(finished: int) -> None:
            if progress is not None:
                progress(finished, request.steps)

        timeout_s = self.plan.config.launch.timeouts.request_s
        self._idle = False
        try:
            results = self.gang.call(RankWorker.generate, request, timeout_s=timeout_s, watch=watch)
            self._coordinator.review(results)
        except CrossdockError:
            self.gang.close()  # the other ranks may hang in a collective
            raise
        self._idle = True
        return results

    def _report(self, results: Sequence[RankResult]) -> dict[str, Any]:
        rows, phases = [], dict(self._phases)
        for result in sorted(results, key=lambda result: result.rank):
            row = asdict(result.measurements)
            for phase, seconds in row.pop("phases_s").items():
                if phase in ("encode", "denoise", "decode"):
                    phases[phase] = max(phases.get(phase, 0.0), seconds)
            rows.append(row)
        return {
            "layout": self.plan.layout_name,
            "ranks": rows,
            "schedule": asdict(self.plan.schedule_report(results[0].verdict)),
            "composition": self._coordinator.composition,
            "phases_s": {phase: round(seconds, 4) for phase, seconds in phases.items()},
        }


def _ray_gang(config: LaunchConfig, world_size: int, device: str) -> Gang:
    try:
        from crossdock.launch.ray_gang import RayGang
    except ImportError:
        raise LaunchError("ray is not installed; run: pip install 'crossdock[ray]', or start with torchrun") from None
    return RayGang(config, world_size, device)


def choose_device(config: RunConfig) -> str:
    """ "cuda" or "cpu", from `launch.device`.

    Raises:
        LaunchError: more ranks than GPUs, on this machine; a cluster is asked when the gang starts.
    """
    wanted, gpus = config.launch.device, torch.cuda.device_count()
    remote = config.launch.ray_address is not None
    device = ("cuda" if gpus else "cpu") if wanted == "auto" else wanted
    if device == "cuda" and not remote and gpus < config.world_size:
        raise LaunchError(
            f"{config.world_size} ranks need {config.world_size} GPUs, but this machine has {gpus}; "
            "lower the degrees, or use device: cpu",
            "launch.device",
        )
    return device


def write_outputs(generation: Generation, outputs: Outputs) -> list[Path]:
    """Write the pictures, and what else is asked for; each file appears whole or not at all."""
    paths = outputs.image_paths(len(generation.images))
    for image, path in zip(generation.images, paths, strict=True):
        _write(path, partial(image.save, format=_format(path)))
    if outputs.latents is not None:
        latents = torch.cat(generation.latents).contiguous()
        _write(outputs.latents, lambda part: save_file({"latents": latents}, part))
    if outputs.report is not None:
        text = json.dumps(generation.report, indent=2) + "\n"
        _write(outputs.report, lambda part: part.write_text(text, encoding="utf-8"))
    if outputs.trace is not None:
        content = json.dumps(chrome_trace(generation.trace))
        _write(outputs.trace, lambda part: part.write_text(content, encoding="utf-8"))
    return paths


def _write(path: Path, write: Callable[[Path], Any]) -> None:
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        write(part)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)


def _format(path: Path) -> str:
    return Image.registered_extensions()[path.suffix.lower()]
