"""The engine: a gang of ranks that holds one model and answers requests."""

from __future__ import annotations

import itertools
import os
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, replace
from types import TracebackType
from typing import Any, Self, Unpack

import torch
from torch import Tensor

from crossdock.launch.engine.generation import Generation
from crossdock.launch.engine.progress import Delays, Notify, Preview, Progress, Steps, Waiting
from crossdock.launch.engine.ranks import Ranks
from crossdock.launch.engine.recovery import RPC_S, Fault, Snapshots, Survived, brief
from crossdock.launch.engine.request_queue import RequestQueue
from crossdock.launch.engine.request_run import RequestHandle, RequestRun
from crossdock.launch.gangs.choose import MakeGang, choose_device, choose_gang, choose_launcher, classes_of
from crossdock.launch.hub.locate import model_directory
from crossdock.runtime.adapters.lora import described
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.result import ContractResult
from crossdock.runtime.errors import ConfigError, EngineClosedError, RankError, RequestCancelled, RequestTimeout
from crossdock.runtime.models.latents import number_of_chunks
from crossdock.runtime.plan.complete_spec import not_proven, what_is_inferred
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.request_checks import check_request
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.reports.rank_result import RankResult
from crossdock.runtime.reports.status import RankStatus
from crossdock.runtime.request import GenerateRequest, RankRequest, RequestOptions
from crossdock.runtime.watch.gang import Gang

CANCEL_S = 10.0
"""The longest wait for a rank to take note of a cancel."""
CLOSE_S = 30.0
"""How long `close` waits for the step under way to end."""


class Engine:
    """Use it as a context manager; `close` ends all ranks.

    Attributes:
        statuses: what was last heard of the ranks while they worked.
    """

    def __init__(
        self,
        plan: RunPlan,
        gang: Gang,
        owns_gang: bool,
        notify: Notify | None = None,
        thorough: bool = False,
        rehearses: bool = False,
        waiting: Waiting | None = None,
    ) -> None:
        self.gang = gang
        self._ranks = Ranks(plan, gang, owns_gang, notify or (lambda line: None), thorough, rehearses, waiting)
        self._queue = RequestQueue(self._execute, threaded=gang.own_rank is None)
        self._number = 0  # of the last round of pictures
        self._unreported: list[Fault] = []  # survived at the start, and in requests that were stopped
        self.statuses: Mapping[int, RankStatus] = {}
        self._abandoned = False  # closed while somebody still worked

    @property
    def plan(self) -> RunPlan:
        """What the ranks hold now."""
        return self._ranks.plan

    @property
    def contract_result(self) -> ContractResult:
        """On the composition of what the ranks hold now."""
        return self._ranks.coordinator.result

    @property
    def closed(self) -> bool:
        """It takes no more requests: it was closed, or its ranks are gone for good."""
        return self._queue.closed

    @property
    def working(self) -> bool:
        """A request is under way."""
        return self._queue.current is not None

    @property
    def recovering(self) -> bool:
        """Ranks are being replaced. For any thread."""
        return self._ranks.replacing

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
        waiting: Waiting | None = None,
    ) -> Engine:
        """Plan, launch, load, verify.

        Args:
            model_dir: or a hub id, `org/name[@revision]`; what is not here yet is fetched.
            gang: a started gang to run on; it is left running at `close`.
            make_gang: without `gang`, makes the engine's own; by default the one that `launch.launcher` names.
            first_request: what is asked for first, where that is known; refused before anything is loaded.
            probe: compare every byte that arrives on the devices with the checkpoint, and `probe` the numbers; these
                also where a layout rests on what was inferred.
            rehearse: stream every block once, to compare what arrives here and not in the first step; `probe` does.
            notify: gets a line when a rank was lost and others are started, and when the ranks wait for one of them.
            waiting: gets what the ranks do while they start.

        Raises:
            UserError: the config, the checkpoint or the machine does not do.
            CompositionError: offloading and sharding do not compose.
            RankError: a rank failed.
        """
        device = choose_device(config)
        directory = model_directory(model_dir, notify or (lambda line: None), without=config.single_files)
        ranks = gang or (make_gang or choose_gang(choose_launcher(config)))(config.launch, config.world_size, device)
        try:
            if gang is None:
                ranks.begin(classes_of(directory))  # which takes longer than the plan
                if waiting is not None:
                    waiting("importing", 0, 0)
            plan = make_plan(config, directory, device)
            if first_request is not None:
                check_request(plan, first_request)
        except BaseException:
            if gang is None:
                ranks.close()
            raise
        if notify is not None and (inferred := what_is_inferred(plan)):
            notify(inferred[0])
        engine = cls(plan, ranks, gang is None, notify, probe, rehearse or probe, waiting)
        try:
            engine._ranks.start(survived := Survived())
            engine._unreported = survived.faults
            if probe or not_proven(plan):
                engine.probe()
        except BaseException as error:
            engine.close()
            if isinstance(error, RankError) and error.kind == "raised" and not_proven(plan):
                family = plan.layout.spec.family
                why = f"no family describes {family}, and cut as it was inferred it does not run: {brief(str(error))}"
                raise ConfigError(why, "parallel") from error
            raise
        return engine

    def generate(
        self,
        prompt: str | Sequence[str],
        *,
        progress: Progress | None = None,
        **options: Unpack[RequestOptions],
    ) -> Generation:
        """Generate pictures, or videos: those of the first prompt first; number i is drawn with `seed + i`.

        A rank that fails meanwhile is replaced, and the request goes on from the last steps that were kept; the
        pictures are the same. `launch.recovery` says how often.

        Args:
            progress: called after every step of a round of pictures.
            options: what else a `GenerateRequest` has, and `seed` and `negative_prompt` for all prompts.

        Raises:
            RequestError: the arguments do not fit the model; the engine stays usable.
            RequestCancelled: `cancel` was called, or the time was up; the engine stays usable.
            CompositionError, RankError: the run failed; the engine is closed.
            EngineClosedError: it was closed before.
        """
        return self.run(GenerateRequest.of(prompt, **options), progress)

    def run(self, request: GenerateRequest, progress: Progress | None = None) -> Generation:
        """Submit and wait; raises what `generate` does. For any thread, like `submit`."""
        run = self._begin(request, progress)
        try:
            return self._queue.perform(run)
        except BaseException:
            if not run.outcome.done():  # somebody interrupts who only waited
                self._stop(run, "interrupted")
            raise

    def submit(
        self, request: GenerateRequest, progress: Progress | None = None, preview: Preview | None = None
    ) -> RequestHandle:
        """Put a request at the end of the queue. For any thread; `progress` and `preview` are called on another one.

        Args:
            preview: gets latents meanwhile: of the last step of a round of pictures that was seen, not of all.

        Where torchrun starts the ranks, every rank has to submit the same requests in the same order and ask for their
        results in the same order, on one thread: a request runs while somebody waits for it or for a later one.

        Raises:
            RequestError: it does not fit the model.
            EngineClosedError: the engine is closed.
        """
        run = self._begin(request, progress, preview)
        self._queue.submit(run)
        return RequestHandle(run, self._queue.wait, self._stop)

    def cancel(self, reason: str = "cancelled") -> None:
        """Stop the request under way at the end of its step; `generate` raises RequestCancelled. For any thread.

        While ranks are being replaced, it ends as soon as the new ones are there. Where none is under way, none is
        stopped, also none that waits: those are cancelled by their handles.
        """
        if (run := self._queue.current) is not None:
            self._stop(run, reason)

    def probe(self) -> None:
        """Let every rank run one small step with streaming and without it: the same bits, or it raises; and one rank of
        each guidance branch the unsharded model: every block returns the same, but for rounding, or it raises.

        Raises:
            CompositionError: streaming changed a number, or sharding one by more than its rounding.
            RankError: a rank failed; the engine is closed.
        """
        with self._queue.alone():
            try:
                self._ranks.probe()
            finally:
                self._close_if_gone()

    def close(self) -> None:
        """Give the model up, its host memory included, and end all ranks, unless they were borrowed. Twice is fine.

        Requests that wait end with EngineClosedError, and the one under way is cancelled; if it does not end with its
        step in time, its ranks are ended.

        After a failed request the ranks are gone already.
        """
        self._queue.close("it was closed")
        if (run := self._queue.current) is not None:
            self._stop(run, "the engine was closed")
        self._ranks.ending = True
        if not self._queue.join(CLOSE_S):
            self.gang.close()  # the call that is under way fails
            self._abandoned = not self._queue.join(CLOSE_S)
        self._ranks.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    # -- requests ------------------------------------------------------------------------------------------------

    def _begin(self, request: GenerateRequest, progress: Progress | None, preview: Preview | None = None) -> RequestRun:
        check_request(self.plan, request)
        rounds = -(-len(request.items) * request.images_per_prompt // self._at_once(request))
        steps = rounds * request.steps * number_of_chunks(self.plan.layout.spec, request.frames)
        return RequestRun(request, steps, progress, preview)

    def _at_once(self, request: GenerateRequest) -> int:
        return self.plan.layout.mesh.dp * request.batch_size

    def _stop(self, run: RequestRun, reason: str) -> None:
        run.ask_to_stop(reason)
        if self._queue.withdraw(run):
            run.outcome.set_exception(RequestCancelled(reason, 0))
        elif not run.outcome.done():
            self._tell(run, CANCEL_S)

    def _tell(self, run: RequestRun, timeout_s: float) -> None:
        """Let a rank know that the round under way is to stop, if it is; the others hear of it at the step's end."""
        reason, number = run.stop_reason, run.number
        if reason is not None and number != run.told:
            with suppress(RankError):  # lost, or not there yet: the stop reason is looked at before it goes on
                self.gang.rpc(self.gang.own_rank or 0, RankWorker.cancel, reason, number, timeout_s=timeout_s)
                run.told = number

    def _execute(self, run: RequestRun) -> None:
        try:
            generation = self._generation(run)
        except BaseException as error:
            self._unreported += run.survived.faults
            self._close_if_gone()
            if self._abandoned:  # `close` has not waited: perhaps new ranks have come up since
                self.gang.close()
            broken_off = self._ranks.ending and not isinstance(error, RequestCancelled)
            run.outcome.set_exception(EngineClosedError("it was closed") if broken_off else error)
            if not isinstance(error, Exception):
                raise
        else:
            run.outcome.set_result(generation)

    def _close_if_gone(self) -> None:
        if self._ranks.gone is not None:
            self._queue.close(f"its ranks are gone ({self._ranks.gone})")

    def _generation(self, run: RequestRun) -> Generation:
        self._ranks.renew()
        launch, pictures, done = self.plan.config.launch, run.request.pictures, list[RankResult]()
        limit_s, keep_every = run.request.time_limit_s, launch.recovery.keep_every if self.gang.can_restart else 0
        keep_every = 1 if run.preview is not None and self.plan.layout.spec.resumes else keep_every
        asked = replace(run.request, time_limit_s=launch.timeouts.request_s if limit_s is None else limit_s)
        for first in range(0, len(pictures), at_once := self._at_once(asked)):
            self._number += 1
            part = replace(asked, items=pictures[first : first + at_once], images_per_prompt=1)
            done.extend(self._round(run, RankRequest(part, self._number, keep_every=keep_every)))
        return Generation(
            [media for result in done for media in result.media],
            _split(result.latents for result in done),
            _split(result.returned_latents for result in done),
            self._report(done[-self.plan.layout.mesh.world_size :], run.survived.faults),
            [result.timeline for result in done],
        )

    def _round(self, run: RequestRun, request: RankRequest) -> list[RankResult]:
        """One round of pictures, whatever happens to the ranks meanwhile."""
        snapshots = Snapshots(self.plan.layout, self.gang, run.preview)
        asked, delays = request.asked, Delays(self._ranks.notify)
        shown = Steps(run.end_step, asked.steps * number_of_chunks(self.plan.layout.spec, asked.frames))
        first = time.perf_counter()
        run.number = request.number

        def notice(statuses: Mapping[int, RankStatus]) -> None:
            self.statuses = dict(statuses)
            shown.notice(statuses)
            snapshots.notice(statuses)
            delays.notice(statuses)
            self._tell(run, RPC_S)

        for attempt in itertools.count(1):
            start = snapshots.start()
            began = time.perf_counter()
            again = replace(request, spent_s=began - first)
            self._stop_if_asked(run, again, start[0].step if start else 0)
            try:
                results = self._ranks.generate(again, start, notice)
            except RankError as error:
                lost_s = time.perf_counter() - began
                if error.kind == "collectives":
                    snapshots.forget()  # steps that were done may have exchanged other things than they should
                resumed = snapshots.start()
                self._ranks.replace(error, attempt, run.survived, resumed[0].step if resumed else 0, lost_s)
            else:
                break
        shown.finish()
        return results

    def _stop_if_asked(self, run: RequestRun, request: RankRequest, finished: int) -> None:
        """Between two attempts nobody else does."""
        if self.gang.own_rank is not None:
            self._tell(run, CANCEL_S)  # the other ranks begin: all have to stop at one place
            return
        if (reason := run.stop_reason) is not None:
            raise RequestCancelled(reason, finished)
        limit_s = request.asked.time_limit_s
        if limit_s is not None and request.spent_s > limit_s:
            raise RequestTimeout(f"the time limit is {limit_s:g} s", finished)

    def _report(self, results: Sequence[RankResult], faults: list[Fault]) -> dict[str, Any]:
        rows, phases, note = [], dict(self._ranks.phases), results[0].schedule_note
        faults, self._unreported = self._unreported + faults, []
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
            "schedule": {**self.plan.memory.schedule_report(note), "verdict": note},
            "inferred": list(what_is_inferred(self.plan)),
            "loras": described(self.plan.layout.loras),
            "composition": self._ranks.coordinator.composition,
            "faults": [asdict(fault) for fault in faults],
            "phases_s": {phase: round(seconds, 4) for phase, seconds in phases.items()},
        }


def _split(batches: Iterable[Tensor | None]) -> list[Tensor]:
    return [one for batch in batches if batch is not None for one in torch.split(batch, 1)]
