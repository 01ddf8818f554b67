"""The engine: a gang of ranks that holds one model and answers requests."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import torch

from crossdock.launch.engine.generation import Generation
from crossdock.launch.engine.progress import Delays, Notify, Progress, Steps
from crossdock.launch.engine.recovery import Fault, Snapshots, advice, brief, budget_text, restart, with_less_memory
from crossdock.launch.gangs.choose import MakeGang, choose_gang, choose_launcher
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.contract.result import ContractResult
from crossdock.runtime.errors import CrossdockError, LaunchError, RankError, RequestCancelled, RequestTimeout
from crossdock.runtime.models.latents import number_of_chunks
from crossdock.runtime.pipeline.snapshot import Snapshot
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.request_checks import MAX_PICTURES, check_amounts, check_request
from crossdock.runtime.rank.probe import probe_numbers, probe_request
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.request import GenerateRequest, as_prompts, check_whole
from crossdock.runtime.watch.gang import Gang, Notice

CANCEL_S = 10.0
"""The longest wait for a rank to take note of a cancel."""


class Engine:
    """Use it as a context manager; `close` ends all ranks."""

    def __init__(self, plan: RunPlan, gang: Gang, owns_gang: bool, notify: Notify | None = None) -> None:
        self.gang = gang
        self._notify: Notify = notify or (lambda line: None)
        self._owns_gang = owns_gang
        self._idle = False  # the ranks wait for work: nobody was interrupted in the middle of it
        self._coordinator = Coordinator(plan)
        self._phases = {"launch": 0.0, "load": 0.0, "verify": 0.0}
        self._number = 0  # of the last request
        self._lowered = False  # the budget, for this request
        self._stop_reason: str | None = None  # why the request under way is to be stopped
        self._faults: list[Fault] = []  # survived since the last report
        self._thorough = False  # every byte that arrives is compared, not a sample
        self._rehearses = False  # what arrives is compared before the first step, not in it

    @property
    def plan(self) -> RunPlan:
        """What the ranks hold now."""
        return self._coordinator.plan

    @property
    def contract_result(self) -> ContractResult:
        """On the composition of what the ranks hold now."""
        return self._coordinator.result

    @classmethod
    def start(
        cls,
        config: RunConfig,
        model_dir: str | os.PathLike[str],
        gang: Gang | None = None,
        make_gang: MakeGang | None = None,
        first_request: GenerateRequest | None = None,
        probe: bool = False,
        rehearse: bool = False,
        notify: Notify | None = None,
    ) -> Engine:
        """Plan, launch, load, verify.

        Args:
            gang: a started gang to run on; it is left running at `close`.
            make_gang: without `gang`, makes the engine's own; by default the one that `launch.launcher` names.
            first_request: what is asked for first, where that is known; refused before anything is started.
            probe: compare every byte that arrives on the devices with the checkpoint, and `probe` the numbers.
            rehearse: stream every block once, to compare what arrives here and not in the first step; `probe` does.
            notify: gets a line when a rank was lost and others are started, and when the ranks wait for one of them.

        Raises:
            UserError: the config, the checkpoint or the machine does not do.
            CompositionError: offloading and sharding do not compose.
            RankError: a rank failed.
        """
        device = choose_device(config)
        plan = make_plan(config, Path(model_dir), device)
        if first_request is not None:
            check_request(plan, first_request)
        ranks = gang or (make_gang or choose_gang(choose_launcher(config)))(config.launch, config.world_size, device)
        engine = cls(plan, ranks, gang is None, notify)
        engine._thorough, engine._rehearses = probe, rehearse or probe
        try:
            try:
                engine._bring_up()
            except RankError as error:
                engine._replace_gang(error, attempt=1)
            if probe:
                engine.probe()
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
        negative_prompt: str | None = None,
        frames: int | None = None,
        images_per_prompt: int = 1,
        batch_size: int = 1,
        time_limit_s: float | None = None,
        progress: Progress | None = None,
    ) -> Generation:
        """Generate pictures, or videos: those of the first prompt first; number i is drawn with `seed + i`.

        A rank that fails meanwhile is replaced, and the request goes on from the last steps that were kept; the
        pictures are the same. `launch.recovery` says how often.

        Args:
            batch_size: how many a replica computes at once, whatever their prompts' lengths; what comes of the last
                round is spread evenly.
            time_limit_s: for each round of prompts, faults included; by default `launch.timeouts.request_s`.

        Raises:
            RequestError: the arguments do not fit the model; the engine stays usable.
            RequestCancelled: `cancel` was called, or the time was up; the engine stays usable.
            CompositionError, RankError: the run failed; the engine is closed.
        """
        check_amounts(self.plan.spec, images_per_prompt, batch_size)
        given = as_prompts(prompt)
        check_whole("prompts x images_per_prompt", len(given) * images_per_prompt, 1, MAX_PICTURES)
        prompts = tuple(each for each in given for _ in range(images_per_prompt))
        launch = self.plan.config.launch
        request = GenerateRequest(
            prompts,
            seed,
            steps,
            height,
            width,
            guidance_scale,
            negative_prompt,
            frames,
            time_limit_s=launch.timeouts.request_s if time_limit_s is None else time_limit_s,
            keep_every=launch.recovery.keep_every if self.gang.can_restart else 0,
        )
        check_request(self.plan, request)
        at_once = self.plan.mesh.dp * batch_size
        self._stop_reason, self._lowered = None, False
        done: list[RankResult] = []
        for first in range(0, len(prompts), at_once):
            self._number += 1
            part = prompts[first : first + at_once]
            round_ = replace(request, prompts=part, seed=seed + first, number=self._number)
            done.extend(self._run(round_, progress))
        return Generation(
            [media for result in done for media in result.media],
            [one for result in done if result.latents is not None for one in torch.split(result.latents, 1)],
            self._report(done[-self.plan.mesh.world_size :]),
            [result.timeline for result in done],
        )

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop the request under way at the end of its step; `generate` raises RequestCancelled. For any thread.

        While ranks are being replaced, it ends as soon as the new ones are there.
        """
        self._stop_reason = reason
        with suppress(RankError):  # lost, or not there yet: the stop reason is looked at before the request goes on
            self.gang.rpc(0, RankWorker.cancel, reason, self._number, timeout_s=CANCEL_S)

    def probe(self) -> None:
        """Let every rank run one step with streaming and without it: the same bits, or it raises.

        Raises:
            CompositionError: streaming changed a number.
            RankError: a rank failed; the engine is closed.
        """
        request, timeout_s = probe_request(self.plan), self.plan.config.launch.timeouts.request_s
        self._idle = False
        try:
            probes = self.gang.collective_rpc(probe_numbers, request, timeout_s=timeout_s)
        except CrossdockError:
            self.gang.close()
            raise
        self._idle = True
        self._coordinator.compare(probes)

    def close(self) -> None:
        """Give the model up, its host memory included, and end all ranks, unless they were borrowed. Twice is fine.

        After a failed request the ranks are gone already, and what they had in host memory is kept for a while: an
        engine that is started again with the same layout does not read the checkpoint again.
        """
        if self._idle or not self._owns_gang:
            try:
                self.gang.collective_rpc(RankWorker.teardown, timeout_s=self.plan.config.launch.timeouts.launch_s)
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

    def _bring_up(self) -> None:
        began = time.perf_counter()
        if self._owns_gang:
            self.gang.start()
        self._phases["launch"] = time.perf_counter() - began
        self._load()

    def _load(self) -> None:
        timeouts = self.plan.config.launch.timeouts
        began = time.perf_counter()
        if self.plan.config.offload.is_relative:
            device_bytes = min(self.gang.collective_rpc(RankWorker.device_bytes, timeout_s=timeouts.launch_s))
            plan = make_plan(self.plan.config, self.plan.model_dir, self.plan.device, device_bytes)
            self._coordinator = Coordinator(plan)
        how = self._thorough, self._rehearses
        reports = self.gang.collective_rpc(RankWorker.setup, self.plan, *how, timeout_s=timeouts.load_s)
        loaded = time.perf_counter()
        self._idle = True
        self._coordinator.admit(reports, self._rehearses)
        self._phases |= {"load": loaded - began, "verify": time.perf_counter() - loaded}

    def _run(self, request: GenerateRequest, progress: Progress | None) -> list[RankResult]:
        """One round of prompts, whatever happens to the ranks meanwhile."""
        snapshots = Snapshots(self.plan, self.gang)
        shown, delays = (
            Steps(progress, request.steps * number_of_chunks(self.plan.spec, request.frames)),
            Delays(self._notify),
        )
        first = time.perf_counter()

        def notice(statuses: Mapping[int, RankStatus]) -> None:
            shown.notice(statuses)
            snapshots.notice(statuses)
            delays.notice(statuses)

        for attempt in itertools.count(1):
            start = snapshots.start()
            began = time.perf_counter()
            again = replace(request, spent_s=began - first)
            self._stop_if_asked(again, start[0].step if start else 0)
            try:
                results = self._attempt(again, start, notice)
            except RankError as error:
                lost_s = time.perf_counter() - began
                if error.kind == "collectives":
                    snapshots.forget()  # steps that were done may have exchanged other things than they should
                resumed = snapshots.start()
                self._replace_gang(error, attempt, resumed[0].step if resumed else 0, lost_s)
            else:
                break
        shown.finish()
        return results

    def _stop_if_asked(self, request: GenerateRequest, finished: int) -> None:
        """Between two attempts nobody else does."""
        if self._stop_reason is not None:
            raise RequestCancelled(self._stop_reason, finished)
        if request.time_limit_s is not None and request.spent_s > request.time_limit_s:
            raise RequestTimeout(f"the time limit is {request.time_limit_s:g} s", finished)

    def _attempt(
        self, request: GenerateRequest, start: tuple[Snapshot, ...] | None, notice: Notice
    ) -> list[RankResult]:
        timeouts = self.plan.config.launch.timeouts
        timeout_s = (request.time_limit_s or timeouts.request_s) - request.spent_s + timeouts.collective_s
        self._idle = False
        try:
            results = self.gang.collective_rpc(RankWorker.generate, request, start, timeout_s=timeout_s, notice=notice)
            self._coordinator.review(results)
        except RequestCancelled:
            self._idle = True
            raise
        except RankError:
            raise
        except CrossdockError:
            self.gang.close()  # the other ranks may hang in a collective
            raise
        self._idle = True
        return results

    def _replace_gang(self, error: RankError, attempt: int, resumed_after: int = 0, lost_s: float = 0.0) -> None:
        """New ranks with the model, after `error` ended attempt number `attempt`.

        Raises:
            RankError: there have been enough attempts, or memory ran out and cannot be saved; the gang is closed.
        """
        self._idle = False
        began = time.perf_counter()
        remedy, meanwhile = "new ranks", list[RankError]()

        def lost_again(error: RankError) -> None:
            meanwhile.append(error)
            if error.kind == "memory":
                self._save_memory(error)

        attempts = self.plan.config.launch.recovery.retries - attempt + 1
        try:
            if error.kind == "memory":
                remedy = self._save_memory(error)
            if attempts < 1 or error.kind == "late" or not self.gang.can_restart:
                raise error
            self._notify(f"{brief(error)}; remedy: {remedy}")
            restart(self.gang, self._load, attempts, lost_again)
        except BaseException:
            self.gang.close()
            raise
        recovery_s = time.perf_counter() - began
        again = tuple(map(str, meanwhile))
        self._faults.append(Fault(error.rank, error.kind, str(error), resumed_after, lost_s, recovery_s, remedy, again))

    def _save_memory(self, error: RankError) -> str:
        """Lower the budget, once; says from what to what."""
        plan = None if self._lowered else with_less_memory(self.plan)
        if plan is None:
            raise RankError(error.rank, f"{error.message}; {advice(self.plan)}", "memory")
        self._lowered = True
        remedy = f"device budget lowered from {budget_text(self.plan)} to {budget_text(plan)}"
        self._coordinator = Coordinator(plan)
        return remedy

    def _report(self, results: Sequence[RankResult]) -> dict[str, Any]:
        rows, phases, note = [], dict(self._phases), results[0].schedule_note
        faults, self._faults = self._faults, []
        for result in sorted(results, key=lambda result: result.rank):
            row = asdict(result.measurements)
            for phase, seconds in row.pop("phases_s").items():
                if phase in ("encode", "denoise", "decode"):
                    phases[phase] = max(phases.get(phase, 0.0), seconds)
            rows.append(row)
        return {
            "layout": self.plan.layout_name,
            "ranks": rows,
            # verdict: what schedule_note was called before, for one version
            "schedule": {**asdict(self.plan.schedule_report(note)), "verdict": note},
            "composition": self._coordinator.composition,
            "faults": [asdict(fault) for fault in faults],
            "phases_s": {phase: round(seconds, 4) for phase, seconds in phases.items()},
        }


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
