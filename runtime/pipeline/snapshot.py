"""Snapshots of a denoise loop, from which an interrupted request goes on.

A pipeline's loop lets others in at one place, the callback at a step's end. So a resumed loop begins one step early:
that step is run again, and everything it left behind is replaced by the snapshot. One step is paid for it, and nothing
depends on the family, on how its pipeline packs latents, or on what its scheduler remembers.
"""

from __future__ import annotations

import copy
import functools
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Self

import torch
from torch import Tensor

from crossdock.runtime.errors import RequestError
from crossdock.runtime.models.diffusers_api import Scheduler, Timestep, replace_scheduler_state, scheduler_state


@dataclass(frozen=True)
class Snapshot:
    """A denoise loop at a step's end. It can be pickled, and used more than once.

    Attributes:
        step: the last one that is done, counted from 1.
        timestep: of that step, as the pipeline's loop has it.
        latents: as the pipeline's loop holds them: shape, layout and dtype are the pipeline's own. On the CPU.
        scheduler: all of the scheduler's attributes but its configuration; tensors on the CPU.
        random: the states of the request's random generators.
    """

    step: int
    timestep: float
    latents: Tensor
    scheduler: Mapping[str, object]
    random: tuple[Tensor, ...]

    @classmethod
    def take(
        cls,
        step: int,
        timestep: Timestep,
        latents: Tensor,
        scheduler: Scheduler,
        generators: Sequence[torch.Generator],
    ) -> Self:
        """At a step's end. Shares no memory with the loop, which goes on."""
        state = {name: _to_host(value) for name, value in scheduler_state(scheduler).items()}
        random = tuple(generator.get_state() for generator in generators)
        return cls(step, float(timestep), latents.detach().to("cpu", copy=True), state, random)

    def restore(
        self, timestep: Timestep, latents: Tensor, scheduler: Scheduler, generators: Sequence[torch.Generator]
    ) -> Tensor:
        """Replace what the repeated step left behind, and return the latents to go on with, on `latents`' device.

        Raises:
            RequestError: the loop is not at the snapshot's step, or makes other latents.
        """
        found = (float(timestep), latents.shape, latents.dtype, len(generators))
        expected = (self.timestep, self.latents.shape, self.latents.dtype, len(self.random))
        if found != expected:
            raise RequestError(
                f"resume: the snapshot after step {self.step} is of another request: (timestep, shape, dtype, "
                f"generators) are {found} in this one, {expected} in the snapshot; start from the first step"
            )
        state = {name: _from_host(value, latents.device) for name, value in self.scheduler.items()}
        replace_scheduler_state(scheduler, state)
        for generator, random in zip(generators, self.random, strict=True):
            generator.set_state(random)
        return self.latents.to(latents.device, copy=True)


def common_start(kept: Sequence[Sequence[Snapshot]]) -> tuple[Snapshot, ...] | None:
    """Of what every replica kept, the snapshots of the last step that all have; None: there is no such step.

    All replicas go on from one step, for ranks of several replicas may share blocks.
    """
    by_step = [{snapshot.step: snapshot for snapshot in snapshots} for snapshots in kept]
    steps = set.intersection(*map(set, by_step)) if by_step else set()
    return tuple(snapshots[max(steps)] for snapshots in by_step) if steps else None


def of_replica(resume: Sequence[Snapshot | None] | None, replica: int, replicas: int) -> Snapshot | None:
    """Where this replica goes on; None: at the beginning.

    Raises:
        RequestError: `resume` is not one snapshot per replica, all of one step.
    """
    if resume is None:
        return None
    steps = [snapshot.step if snapshot is not None else 0 for snapshot in resume]
    if len(steps) != replicas or len(set(steps)) > 1:
        raise RequestError(
            f"resume: found snapshots of steps {steps}; allowed: one for each of {replicas} replicas, of one step"
        )
    return resume[replica]


@contextmanager
def beginning_at(scheduler: Scheduler, step: int) -> Iterator[None]:
    """A pipeline that runs inside begins with this step, counted from 1, instead of the first.

    Raises:
        RequestError: the request has fewer steps.
    """
    original = scheduler.set_timesteps

    @functools.wraps(original)  # pipelines look at the signature
    def set_timesteps(*args: object, **kwargs: object) -> None:
        original(*args, **kwargs)
        there = len(scheduler.timesteps)
        if not 1 <= step <= there:
            raise RequestError(f"resume: the snapshot is of step {step}, but this request has {there}; start anew")
        scheduler.timesteps = scheduler.timesteps[step - 1 :]

    scheduler.set_timesteps = set_timesteps
    try:
        yield
    finally:
        vars(scheduler).pop("set_timesteps", None)  # restoring a snapshot takes it off too


@dataclass(frozen=True)
class _OnDevice:
    """The CPU copy of a tensor that was on an accelerator, and goes back to one."""

    tensor: Tensor


def _to_host(value: object) -> object:
    if isinstance(value, Tensor):
        copied = value.detach().to("cpu", copy=True)
        return copied if value.device.type == "cpu" else _OnDevice(copied)
    if isinstance(value, list):
        return [_to_host(item) for item in value]
    return copy.deepcopy(value)


def _from_host(value: object, device: torch.device) -> object:
    if isinstance(value, _OnDevice):
        return value.tensor.to(device, copy=True)
    if isinstance(value, list):
        return [_from_host(item, device) for item in value]
    return copy.deepcopy(value)
