"""The device budget: obeyed by the whole pipeline, used up where it helps, and nothing but speed depends on it."""

from __future__ import annotations

import asyncio
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any, cast

import diffusers
import pytest
import torch
from one_rank import admitted, rank_request
from torch import Tensor

import crossdock.runtime.plan.reschedule as rescheduling
from crossdock.launch.engine.engine import Engine
from crossdock.offload.codecs.codec import Identity
from crossdock.offload.live.resting import is_resting
from crossdock.offload.schedule.residency import Costs, steady_step_s
from crossdock.offload.stream.block import Home
from crossdock.offload.stream.measured_costs import slowest
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coordinator import Coordinator
from crossdock.runtime.errors import ConfigError, LaunchError
from crossdock.runtime.models.checkpoint import read_model_index
from crossdock.runtime.pipeline.pipeline import RankPipeline
from crossdock.runtime.pipeline.presence import ActiveComponent
from crossdock.runtime.plan.component_needs import component_needs
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.plan.plan import RunPlan
from crossdock.runtime.plan.reschedule import RankObservation, reschedule
from crossdock.runtime.rank.weights.kept_stores import KeptStores, StoreHolder
from crossdock.runtime.rank.weights.load import HostPart
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.watch.gang import Gang
from layouts import FAMILIES
from reference import ODD_SIZE, PROMPT, TOLERANCE, max_error, reference_latents
from tiers import how_many, not_quick, pairs, some, thorough
from toy_blocks import build

pytestmark = not_quick

Checkpoints = dict[str, Path]
GangOf = Callable[[int], Gang]
REQUEST = rank_request(PROMPT, height=ODD_SIZE[0], width=ODD_SIZE[1])


def _plan(directory: Path, **offload: Any) -> RunPlan:
    config = RunConfig.parse({"offload": {"layerwise": True, **offload}})
    return make_plan(config, directory, "cpu", device_bytes=2**33)


def _minimum(directory: Path) -> int:
    with pytest.raises(ConfigError) as caught:
        _plan(directory, device_budget="1KiB")
    return int(str(caught.value).split("at least ")[1].split(" ")[0])


def _device_bytes(worker: RankWorker) -> int:
    """Distinct storages behind the transformer, the text encoder and the VAE: all that can be used on the device."""
    pipe = worker.loaded.pipeline.pipe
    modules = [worker.loaded.model, pipe.vae, pipe.text_encoder]
    tensors = [tensor for module in modules for tensor in (*module.parameters(), *module.buffers())]
    there = [tensor.untyped_storage() for tensor in tensors if not is_resting(tensor)]
    storages = {storage.data_ptr(): storage.nbytes() for storage in there}
    return sum(storages.values())


@pytest.mark.parametrize("family", some(FAMILIES, 1))
def test_budgets_from_least_to_whole(family: str, checkpoints: Checkpoints) -> None:
    """From the minimum to the whole model: same bits, the peak of the whole pipeline within the budget, fewer bytes
    moved with every step up, none at the end; one byte below the minimum is refused.
    """
    directory = checkpoints[family]
    least = _minimum(directory)
    memory = _plan(directory).memory
    whole = sum(block.layout.slot_bytes for block in memory.blocks) + memory.outside_bytes
    last = how_many(2, 2, 9)
    budgets = [least + (whole + 4096 - least) * tenth // last for tenth in range(last + 1)]
    expected = reference_latents(directory, size=ODD_SIZE)
    moved, first, encoder_bytes = [], None, 0
    for budget in budgets:
        with admitted(_plan(directory, device_budget=f"{budget}B", prefetch=1)) as worker:
            latents = worker.generate(REQUEST).latents
            again = worker.generate(REQUEST)
            held = _device_bytes(worker)
            encoder_bytes = sum(p.nbytes for p in worker.loaded.pipeline.pipe.text_encoder.parameters())
        assert latents is not None
        first = latents if first is None else first
        assert torch.equal(latents, first)
        assert again.latents is not None
        assert torch.equal(again.latents, first), "the second request differs"
        assert max(held, again.measurements.peak_weight_bytes) <= budget
        moved.append(again.measurements.h2d_bytes_per_step)
    print(f"{family}: budgets {budgets[0]} to {budgets[-1]}, text encoder {encoder_bytes}; per step {moved}")
    assert max_error(first, expected) <= TOLERANCE if first is not None else False
    assert moved == sorted(moved, reverse=True)
    assert moved[0] > 5 * moved[-1]
    assert memory.turn_bytes["text_encoder"] < encoder_bytes, "it is not streamed"


@thorough
@pytest.mark.parametrize("config", some([{"dp_degree": 2, "hsdp": {"shard": 2}}, {"tp_degree": 2}], 1), ids=str)
def test_budgets_of_several_ranks(config: dict[str, Any], gang_of: GangOf, checkpoints: Checkpoints) -> None:
    """The first rank also runs encoder and VAE; what it evicts for them, a shard group has to load together."""
    results = []
    for budget in ("3300KiB", "4MiB", 1.0, "auto"):
        run = RunConfig.parse({"parallel": config, "offload": {"layerwise": True, "device_budget": budget}})
        with Engine.start(run, checkpoints["flux2-klein"], gang_of(2)) as engine:
            prompts = [PROMPT] * run.parallel.dp_degree
            for _ in range(2):
                generation = engine.generate(prompts, height=ODD_SIZE[0], width=ODD_SIZE[1])
                results.append(generation.latents[0])
            peaks = [row["peak_weight_bytes"] for row in generation.report["ranks"]]
            plan, schedule = engine.plan, generation.report["schedule"]
        budget_and_arena = plan.memory.budget_bytes, plan.memory.arena_bytes
        assert plan.memory.budget_bytes is not None
        assert max(peaks) <= plan.memory.budget_bytes
        assert (schedule["budget_bytes"], schedule["arena_bytes"]) == budget_and_arena
    assert all(torch.equal(found, results[0]) for found in results)
    assert "improved" in schedule["schedule_note"], "auto takes what is free once it is known"
    assert len(schedule["resident"]) == len(plan.memory.blocks)


@thorough
@pytest.mark.parametrize("family", FAMILIES)
def test_more_memory_is_never_slower(family: str, checkpoints: Checkpoints) -> None:
    """With the prefetch distance left to the engine: the predicted step, which is proven optimal at the end."""
    directory = checkpoints[family]
    least = _minimum(directory)
    plans = [_plan(directory, device_budget=f"{least + step * 2**19}B") for step in range(16)]
    steps = [plan.memory.residency.step_s for plan in plans]
    assert steps == sorted(steps, reverse=True)
    assert plans[-1].memory.residency.optimal
    assert plans[-1].memory.residency.exposed_s == pytest.approx(0.0, abs=1e-9)


def test_a_fraction_needs_the_device(checkpoints: Checkpoints) -> None:
    """Half of a device that is too small is refused like any small budget, with the bytes that it comes to."""
    config = RunConfig.parse({"offload": {"layerwise": True, "device_budget": 0.5}})
    assert make_plan(config, checkpoints["z-image"], "cpu").memory.budget_bytes is None
    with pytest.raises(ConfigError, match=r'found "0.5" \(500 bytes\); this model needs at least \d+ bytes'):
        make_plan(config, checkpoints["z-image"], "cpu", device_bytes=1000)


@pytest.mark.parametrize("name", ["vae", "audio_vae"])
def test_what_a_class_keeps_in_fp32_counts_as_that(name: str, checkpoint_of: Callable[[str], Path]) -> None:
    """Modules, single parameters, and tables that no file has."""
    directory = checkpoint_of("minimax-h3")
    index = read_model_index(directory)
    (need,) = component_needs(directory, index, (), (name,), torch.bfloat16, 1)
    loaded = getattr(diffusers, index[name][1]).from_pretrained(directory / name, dtype=torch.bfloat16)
    assert need.loaded_bytes == sum(tensor.nbytes for tensor in (*loaded.parameters(), *loaded.buffers()))


def test_a_rank_without_a_component_evicts_for_it() -> None:
    """The first rank of a replica runs text encoder and VAE; all lose the same blocks, or some wait in a gather."""
    case = build([Home.HOST] * 4, 1, resident=range(4))
    size = case.stream.blocks[0].layout.slot_bytes
    pipeline = object.__new__(RankPipeline)
    pipeline._arena, pipeline._active = case.stream.arena, ActiveComponent({}, torch.device("cpu"))
    pipeline._turn_bytes = {"vae": size + 1}
    assert case.misses(range(4)) == 1
    assert case.misses(range(4)) == 0
    before = case.stream.counters.h2d_bytes
    with pipeline.turn(("vae",)):
        pass
    case.check(range(4))
    lost = case.stream.counters.h2d_bytes - before
    assert lost == size + case.stream.blocks[1].layout.slot_bytes, "blocks 0 and 1 begin before the end of its part"
    case.finish()


# -- rescheduling ---------------------------------------------------------------------------------------------------


def _observation(plan: RunPlan, order: tuple[int, ...] | None = None, slow: int = 0, spare: int = 0) -> RankObservation:
    """Equal blocks, copies twice as long as computing, but for block `slow`, which computes for long."""
    order = order or plan.memory.order
    compute = [1.0 if index != slow else 20.0 for index in order]
    return RankObservation(order, Costs(tuple(compute), (2.0,) * len(order)), spare)


def test_the_schedule_follows_the_slowest_rank(flux2_dir: Path) -> None:
    """Every rank takes the same decision, from the costs of all: whose compute is slow, whose copies are."""
    plan = _plan(flux2_dir, device_budget=f"{_minimum(flux2_dir) + 2**20}B")
    both = [_observation(plan, slow=0), _observation(plan, slow=5)]
    found, swapped = (reschedule(plan.memory, plan.config.offload, seen, 2) for seen in (both, both[::-1]))
    assert found == swapped
    assert found.memory is not None
    assert found.memory.resident != plan.memory.resident
    costs = slowest([seen.costs for seen in both])
    assert found.memory.residency.step_s < steady_step_s(costs, plan.memory.residency.resident, plan.memory.schedule)
    assert found.memory.residency.optimal


def test_an_order_that_was_not_foreseen_gets_its_own_slots(flux2_dir: Path) -> None:
    """Interleaved stacks: blocks that follow each other must not share a slot."""
    plan = _plan(flux2_dir, prefetch=2)
    order = (*plan.memory.order[::2], *plan.memory.order[1::2])
    found = reschedule(plan.memory, plan.config.offload, [_observation(plan, order)], 2)
    assert found.memory is not None
    assert [block.name for block in found.memory.streamed] == [plan.memory.blocks[index].name for index in order]
    slots = [block.slot for block in found.memory.streamed]
    assert all(len(set(slots[i : i + 3])) == 3 for i in range(len(slots) - 2))


def test_a_schedule_is_changed_only_where_it_pays(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every change loads all resident blocks again: a gain within what a measurement errs by is left."""
    plan = _plan(flux2_dir, device_budget=f"{_minimum(flux2_dir) + 2**20}B")
    seen = [_observation(plan, slow=0), _observation(plan, slow=5)]
    taken = reschedule(plan.memory, plan.config.offload, seen, 2).memory
    assert taken is not None
    costs = slowest([one.costs for one in seen if one is not None])
    gain = 1 - taken.residency.step_s / steady_step_s(costs, plan.memory.residency.resident, plan.memory.schedule)
    for wanted, pays in [(gain * 0.99, True), (gain * 1.01, False)]:
        monkeypatch.setattr(rescheduling, "WORTHWHILE", wanted)
        found = reschedule(plan.memory, plan.config.offload, seen, 2)
        assert (found.memory is not None) == pays
        assert found.schedule_note.startswith("improved after step 2" if pays else "kept after step 2")


def test_improving_changes_no_bit(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a request other blocks become resident; the coordinator judges the new state as the first."""
    import crossdock.runtime.rank.worker as worker_module

    budget = _minimum(flux2_dir) + 2**20
    plan = _plan(flux2_dir, device_budget=f"{budget}B")
    with admitted(plan) as worker:
        monkeypatch.setattr(worker_module, "MEASURED_STEPS", 10**6)
        kept = worker.generate(REQUEST)
    monkeypatch.setattr(worker_module, "MEASURED_STEPS", 2)
    seen = _observation(plan, tuple(reversed(plan.memory.order)), 3)
    monkeypatch.setattr(worker_module, "observe", lambda *_: seen)
    coordinator = Coordinator(plan)
    with admitted(plan) as worker:
        results = [worker.generate(REQUEST) for _ in range(3)]
        for result in results:
            coordinator.review([result])
    assert [result.memory is None for result in results] == [False, True, True]
    assert coordinator.plan.memory.order == tuple(reversed(plan.memory.order))
    for result in results:
        assert result.measurements.peak_weight_bytes <= budget
        assert torch.equal(_latents(result), _latents(kept))


# -- re-entry -------------------------------------------------------------------------------------------------------


def _latents(result: Any) -> Tensor:
    assert result.latents is not None
    return result.latents  # type: ignore[no-any-return]


PLACES = ("in a block", "vae", "between steps", "encoder", "first block")
ERRORS = (RuntimeError, torch.OutOfMemoryError, KeyboardInterrupt, asyncio.CancelledError)


@pytest.mark.parametrize(("where", "error"), some(pairs(PLACES, ERRORS), 3))
def test_the_next_request_is_right(where: str, error: type[BaseException], checkpoints: Checkpoints) -> None:
    """Pitfalls 19 and 21: an exception, a cancelled request, memory that runs out, at any point of a request."""
    directory = checkpoints["flux2-klein"]
    budget = f"{_minimum(directory) + 2**19}B"
    with admitted(_plan(directory, device_budget=budget)) as worker:
        expected = _latents(worker.generate(REQUEST))
        pipe = worker.loaded.pipeline.pipe
        victim = {
            "encoder": pipe.text_encoder.model.layers[2].mlp,
            "first block": worker.loaded.model.transformer_blocks[0],
            "in a block": worker.loaded.model.single_transformer_blocks[2].attn,
            "vae": pipe.vae.decoder.mid_block,
        }.get(where)

        def fail(*_: Any) -> None:
            raise error

        if victim is None:
            worker.on_progress = fail
        handle = victim.register_forward_hook(fail) if victim is not None else None
        with pytest.raises(error):
            worker.generate(REQUEST)
        worker.on_progress = None
        if handle is not None:
            handle.remove()
        again = worker.generate(REQUEST)
        assert torch.equal(_latents(again), expected)
        assert again.media


# -- host memory ----------------------------------------------------------------------------------------------------


def test_too_little_host_memory_is_refused_before_loading(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 30: the cgroup's limit, not the machine's memory; with the figures, and before a byte is read."""
    from crossdock.offload.memory.host_memory import HostMemory
    from crossdock.runtime.rank.weights import load as weights

    monkeypatch.setattr(weights, "host_memory", lambda: HostMemory(2**20, 2**33, "/sys/fs/cgroup/job"))
    plan = _plan(flux2_dir)
    read: list[str] = []
    monkeypatch.setattr(weights.WeightLoader, "_fill", lambda *_: read.append("read"))
    with pytest.raises(
        LaunchError, match=r"needs 0\.\d+ GiB .* of 8\.00 GiB .*/sys/fs/cgroup/job.*host: mmap"
    ) as caught:
        RankWorker(0, 1, torch.device("cpu")).setup(plan)
    assert caught.value.key == "offload.host"
    assert read == []


def test_host_memory_that_has_become_too_little(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another process took it while the blocks were read: a traceback instead of a message."""
    from crossdock.offload.live import offloader
    from crossdock.offload.memory.host_memory import HostMemory

    monkeypatch.setattr(offloader, "host_memory", lambda: HostMemory(2**10, 2**33, "/sys/fs/cgroup/job"))
    worker = RankWorker(0, 1, torch.device("cpu"))
    with pytest.raises(LaunchError, match=r"text_encoder: .* needs 0\.\d+ GiB") as caught:
        worker.setup(_plan(flux2_dir))
    assert caught.value.key == "offload.host"


@pytest.mark.parametrize("host", ["shared", "mmap"])
def test_components_count_as_host_memory(host: str, flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Pitfall 30: text encoder and VAE come after the blocks; what is too little for them must show before, too."""
    from crossdock.offload.memory.host_memory import HostMemory
    from crossdock.runtime.rank.weights import load as weights

    plan = _plan(flux2_dir, host=host)
    with admitted(_plan(flux2_dir)) as worker:
        components = [offloader._stores for offloader in cast(Any, worker.loaded.pipeline._components).values()]
        stores = sum(store.nbytes for of_one in components for store in of_one)
    encoder, vae = (flux2_dir / name for name in ("text_encoder", "vae"))
    files = [sum(file.stat().st_size for file in folder.glob("*.safetensors")) for folder in (encoder, vae)]
    host_bytes = plan.memory.component_host_bytes
    assert stores < host_bytes
    assert 0.9 < host_bytes / (sum(files) + max(files)) < 1.1, "all loaded, and one of them copied"
    blocks = sum(block.held_bytes for block in plan.memory.blocks) if host == "shared" else 0

    def go_on(*_: Any, **__: Any) -> None:
        raise InterruptedError

    for module, name in ((weights.HostStore, "create"), (weights.WeightLoader, "load_outside")):
        monkeypatch.setattr(module, name, go_on)
    for missing in (1, 0):
        left = HostMemory(blocks + host_bytes - missing, 2**33, "/sys/fs/cgroup/job")
        monkeypatch.setattr(weights, "host_memory", lambda left=left: left)
        refused = pytest.raises(LaunchError, match=r"text encoders and VAE \(0\.\d+ GiB\): needs 0\.\d+ GiB")
        with refused if missing else pytest.raises(InterruptedError):
            RankWorker(0, 1, torch.device("cpu")).setup(plan)


def test_bytes_of_another_kind_have_another_key(flux2_dir: Path, tmp_path: Path) -> None:
    """A kept host store is only found again for the same files, the same layout, and the same part of them."""
    directory = shutil.copytree(flux2_dir, tmp_path / "model")

    def key(plan: RunPlan, tp: int = 0, shard: int = 0, held_bytes: int = 100) -> str:
        return HostPart("here", tp, shard).key(plan, held_bytes)

    def of(config: dict[str, Any]) -> RunPlan:
        return make_plan(RunConfig.parse({"offload": {"layerwise": True}} | config), directory, "cpu")

    plan = of({})
    same = [key(plan), key(of({}))]
    shards = of({"parallel": {"dp_degree": 2, "hsdp": {"shard": 2}}})
    other = [
        key(plan, tp=1),
        key(plan, shard=1),
        key(plan, held_bytes=101),
        key(of({"dtype": "bfloat16"})),
        key(shards),
    ]
    other.append(key(of({"parallel": {"tp_degree": 2}})))
    blocks = tuple(replace(block, codec=Identity("another")) for block in plan.memory.blocks)
    other.append(key(replace(plan, memory=replace(plan.memory, blocks=blocks))))
    file = next(iter(plan.layout.stored.values())).file
    facts = file.stat()
    os.utime(file, ns=(facts.st_atime_ns, facts.st_mtime_ns + 1))
    other.append(key(plan))
    assert len({*same, *other}) == 1 + len(other)
    assert same[0] == same[1]


def test_a_crashed_gang_starts_again_without_reading(flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whoever starts the ranks keeps what they had in host memory."""
    from crossdock.runtime.rank.weights import load as weights

    plan, kept = _plan(flux2_dir), KeptStores()
    first, second, third = (RankWorker(0, 1, torch.device("cpu"), StoreHolder(kept.answer)) for _ in range(3))
    first.setup(plan)
    expected = _latents(first.generate(REQUEST))
    read: list[str] = []
    fill = weights.WeightLoader._fill

    def counted(self: Any, *args: Any) -> None:
        read.append(args[0].name)
        fill(self, *args)

    monkeypatch.setattr(weights.WeightLoader, "_fill", counted)
    second.setup(plan)  # the first one was never torn down: as if it had been killed
    assert torch.equal(_latents(second.generate(REQUEST)), expected)
    assert read == []
    second.teardown()
    third.setup(plan)
    assert torch.equal(_latents(third.generate(REQUEST)), expected)
    assert len(read) == len(plan.memory.blocks), "an orderly end gives the memory up"
    first.teardown()
    third.teardown()
