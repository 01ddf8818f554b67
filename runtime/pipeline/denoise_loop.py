"""A pipeline's denoise loop from outside: its steps, their times, and what its random numbers come from."""

from __future__ import annotations

import functools
import inspect
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import count
from typing import Any

import torch
from torch import Tensor, nn

from crossdock.runtime.models.diffusers_api import Pipeline, Scheduler, Timestep, variant
from crossdock.runtime.pipeline.snapshot import Snapshot


@dataclass(frozen=True)
class StepEnd:
    """A step of the denoise loop has ended.

    Attributes:
        finished: how many steps of the request are done.
        total: how many there are.
        repeated: a resumed loop only ran this step to get to where it goes on; it was done before.
        snapshot: takes one; to be called before the next step begins.
        pipe, timestep, latents: as the loop has them.
    """

    finished: int
    total: int
    repeated: bool
    snapshot: Callable[[], Snapshot]
    pipe: Pipeline
    timestep: Timestep
    latents: Tensor


class Observer:
    """Is told what goes into the steps of a run. This one is not interested."""

    def given(self, name: str, value: object) -> None:
        """Before the first step: what was asked for, and what encoders returned. The same on all ranks of a replica."""

    def called(self, transformer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        """The pipeline calls a transformer."""


@contextmanager
def own_randomness(device: torch.device, seed: int) -> Iterator[tuple[torch.Generator, ...]]:
    """The generators that a scheduler draws from which takes none: the process's.

    They are seeded inside, with a number that has nothing to do with the initial noise, and put back afterwards.
    """
    cuda = [device] if device.type == "cuda" else []
    with torch.random.fork_rng(cuda):
        generators = (torch.default_generator, *(torch.cuda.default_generators[d.index or 0] for d in cuda))
        for generator in generators:
            generator.manual_seed(random.Random(seed).getrandbits(63))
        yield generators


@contextmanager
def drawing_from(scheduler: Scheduler, generator: object) -> Iterator[None]:
    """What the scheduler's steps draw comes from the request's own generators, of which pipelines do not tell it.

    Args:
        generator: as the pipeline has it: of several pictures a list.
    """
    original = type(scheduler)
    if "generator" not in inspect.signature(original.step).parameters:
        yield
        return

    @functools.wraps(original.step)  # pipelines look at the signature
    def step(scheduler: Scheduler, *args: object, **kwargs: object) -> object:
        call: Callable[..., object] = original.step
        return call(scheduler, *args, **{"generator": generator, **kwargs})

    scheduler.__class__ = variant(original, step=step)
    try:
        yield
    finally:
        scheduler.__class__ = original


class DenoiseLoop:
    """The denoise loop as its callback sees it: resumes, counts, and takes the time of each step.

    On CUDA the time is taken by device events, so that no step is made to wait for the device.

    Attributes:
        finished: steps that are done, of all chunks.
        latents: as the last step left them; None before the first.
        between_chunks: one is done, and another one follows.
        chunks: the last latents of each that is done.
    """

    def __init__(
        self,
        device: torch.device,
        generators: tuple[torch.Generator, ...],
        on_step: Callable[[StepEnd], None],
        resume: Snapshot | None,
        chunks: int = 1,
        observer: Observer | None = None,
        before_steps: Callable[[], None] = lambda: None,
    ) -> None:
        """
        Args:
            chunks: how often all steps are run.
            before_steps: called once, when a transformer is called for the first time.
        """
        self._cuda = device.type == "cuda"
        self._generators = generators
        self._on_step = on_step
        self._resume = resume
        self._chunks = chunks
        self.chunks: list[Tensor] = []
        self._observer = observer or Observer()
        self._before_steps: Callable[[], None] | None = before_steps
        self.finished = 0 if resume is None else resume.step - 1
        self._began: Any = None  # when the step that runs did
        self._steps: list[tuple[Any, Any]] = []  # begin and end of those that are done
        self.latents: Tensor | None = None
        self.between_chunks = False

    @contextmanager
    def watching(self, *transformers: nn.Module) -> Iterator[None]:
        """The first step begins with the first call of a transformer."""
        handles = [each.register_forward_pre_hook(self._begin, prepend=True, with_kwargs=True) for each in transformers]
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    @contextmanager
    def told_by(self, pipe: Pipeline) -> Iterator[dict[str, object]]:
        """What `pipe` has to be called with, inside, for `tick` to be called at each step's end.

        Some pipelines have no argument for it: there, what the scheduler's step returns are the step's last latents.
        """
        if "callback_on_step_end" in inspect.signature(pipe.__call__).parameters:
            yield {"callback_on_step_end": self.tick}
            return
        scheduler, original, steps = pipe.scheduler, type(pipe.scheduler), count()

        def step(
            scheduler: Scheduler, output: Tensor, timestep: Timestep, *args: object, **kwargs: object
        ) -> tuple[Tensor, ...]:
            latents, *others = original.step(scheduler, output, timestep, *args, **kwargs)
            return self.tick(pipe, next(steps), timestep, {"latents": latents})["latents"], *others

        # in its class: what the scheduler itself holds goes into snapshots
        scheduler.__class__ = variant(original, step=step)
        try:
            yield {}
        finally:
            scheduler.__class__ = original

    def tick(self, pipe: Pipeline, step: int, timestep: Timestep, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        repeated = self._resume is not None and self.finished == self._resume.step - 1
        self.finished += 1
        finished = self.finished
        if self._resume is not None and repeated:
            latents = self._resume.restore(timestep, tensors["latents"], pipe.scheduler, self._generators)
            tensors = {**tensors, "latents": latents}
        self.latents = tensors["latents"]
        steps, now = len(pipe.scheduler.timesteps), self._now()
        if not repeated:
            self._steps.append((self._began, now))
        if finished % steps == 0:
            self.chunks.append(tensors["latents"])
        self.between_chunks = finished % steps == 0 and finished < steps * self._chunks
        self._began = None if self.between_chunks else now

        def snapshot() -> Snapshot:
            return Snapshot.take(finished, timestep, tensors["latents"], pipe.scheduler, self._generators)

        self._on_step(StepEnd(finished, steps * self._chunks, repeated, snapshot, pipe, timestep, tensors["latents"]))
        return tensors

    def step_ms(self) -> list[float]:
        if self._cuda:
            torch.cuda.synchronize()
            return [before.elapsed_time(after) for before, after in self._steps]
        return [(after - before) * 1e3 for before, after in self._steps]

    def _begin(self, transformer: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> None:
        if self._before_steps is not None:
            self._before_steps()
            self._before_steps = None
        self._observer.called(transformer, args, kwargs)
        if self._began is None:
            self._began = self._now()

    def _now(self) -> Any:
        if not self._cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)  # type: ignore[no-untyped-call]
        event.record()
        return event
