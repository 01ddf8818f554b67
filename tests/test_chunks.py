"""Videos that a pipeline makes chunk by chunk: how many steps there are, and what is decoded between two chunks."""

from __future__ import annotations

from contextlib import nullcontext
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from crossdock.parallel.mesh import Mesh
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import RequestError
from crossdock.runtime.models.families import SPECS
from crossdock.runtime.models.latents import number_of_chunks
from crossdock.runtime.pipeline.denoise_loop import DenoiseLoop, StepEnd
from crossdock.runtime.pipeline.replicate import replicated
from crossdock.runtime.plan.request_checks import check_request
from crossdock.runtime.rank.probe.probe import probe_request
from crossdock.runtime.request import GenerateRequest

HELIOS = SPECS["helios"]


@pytest.mark.parametrize(("frames", "chunks"), [(33, 1), (34, 2), (66, 2), (99, 3), (None, 4)])
def test_number_of_chunks(frames: int | None, chunks: int) -> None:
    assert number_of_chunks(HELIOS, frames) == chunks


def test_other_families_make_one() -> None:
    assert {number_of_chunks(spec, 121) for spec in SPECS.values() if spec is not HELIOS} == {1}


def test_the_loop_counts_the_steps_of_all_chunks() -> None:
    ends: list[StepEnd] = []
    pipe: Any = SimpleNamespace(scheduler=SimpleNamespace(timesteps=[3, 2, 1]))
    loop = DenoiseLoop(torch.device("cpu"), (), ends.append, resume=None, chunks=2)
    transformer = torch.nn.Identity()
    between = []
    with loop.watching(transformer):
        for number in range(6):
            transformer(torch.zeros(1))
            loop.tick(pipe, number % 3, pipe.scheduler.timesteps[number % 3], {"latents": torch.full((1,), number)})
            between.append(loop.between_chunks)
    assert [(end.finished, end.total) for end in ends] == [(number, 6) for number in range(1, 7)]
    assert between == [False, False, True, False, False, False]
    assert len(loop.step_ms()) == 6
    assert loop.latents is not None
    assert loop.latents.item() == 5


def test_decoding_between_chunks_is_no_part_of_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    now = iter([0.0, 1.0, 5.0, 6.0])  # a step from 0 to 1, decoding until 5, a step from 5 to 6
    monkeypatch.setattr(DenoiseLoop, "_now", lambda self: next(now))
    pipe: Any = SimpleNamespace(scheduler=SimpleNamespace(timesteps=[1]))
    loop = DenoiseLoop(torch.device("cpu"), (), lambda end: None, resume=None, chunks=2)
    transformer = torch.nn.Identity()
    with loop.watching(transformer):
        for _ in range(2):
            transformer(torch.zeros(1))
            loop.tick(pipe, 0, 1, {"latents": torch.zeros(1)})
    assert loop.step_ms() == [1000.0, 1000.0]


def test_shapes_only_sends_no_values() -> None:
    """What the first rank returns, another one gets as zeros; nothing but shapes travels."""
    sent: list[Any] = []

    class Pair:
        def broadcast_object(self, value: Any, source: int) -> Any:
            sent.append(value)
            return sent[0]

        def broadcast(self, tensor: torch.Tensor, source: int) -> None:
            raise AssertionError("values are sent")

    def mesh(rank: int) -> Mesh:
        return SimpleNamespace(rank=rank, ranks={"replica": (0, 1)}, groups={"replica": Pair()})  # type: ignore[return-value]

    def decode() -> tuple[torch.Tensor]:
        return (torch.ones(2, 3, dtype=torch.bfloat16),)

    shared = [replicated(decode, torch.device("cpu"), mesh(rank), nullcontext, shapes_only=True) for rank in (0, 1)]
    first, other = shared[0](), shared[1]()
    assert torch.equal(first[0], decode()[0])
    assert torch.equal(other[0], torch.zeros(2, 3, dtype=torch.bfloat16))


@pytest.mark.parametrize(("frames", "told"), [(66, None), (65, "a multiple of 33, such as 33"), (9, "such as 33")])
def test_frames_are_whole_chunks(frames: int, told: str | None) -> None:
    held = {"device": "cpu", "pipeline_dtype": torch.float32, "decoder_features": 3}
    layout = SimpleNamespace(spec=HELIOS, pixel_multiple=16, frame_multiple=4, **held)
    plan = SimpleNamespace(layout=layout, config=RunConfig())
    request = GenerateRequest.of("a", frames=frames)
    if told is None:
        check_request(plan, request)  # type: ignore[arg-type]
    else:
        with pytest.raises(RequestError, match=told):
            check_request(plan, request)  # type: ignore[arg-type]


def test_the_probe_makes_one_chunk() -> None:
    layout = SimpleNamespace(spec=HELIOS, pixel_multiple=16, frame_multiple=4)
    assert probe_request(layout).frames == 33  # type: ignore[arg-type]
    layout.spec = replace(HELIOS, chunk_frames=None)
    assert probe_request(layout).frames == 5  # type: ignore[arg-type]
