"""Fixtures that are made once per session: checkpoints and gangs."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: ranks and the reference share two cores

import gc
import logging
import signal
from collections.abc import Callable, Iterator
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import torch

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.watch.gang import Gang
from tiers import ALL, QUICK

if TYPE_CHECKING:
    from hub_stand_in import Hub

STARTS_RANKS = {
    "test_check",
    "test_faults",
    "test_hub_ranks",
    "test_local_gang",
    "test_lost_node",
    "test_nothing_left_behind",
    "test_rank_messages",
    "test_ray_token",
    "test_serve_process",
    "test_serve_replicas",
    "test_serve_soak",
    "test_torchrun_faults",
    "test_video_file",
}
"""Test files with ranks of their own; several look for what is left of them on the whole machine."""
GANGS = {"gang_of", "ray_gang_of"}
"""Fixtures with ranks in processes of their own."""

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a shell's background job would ignore it


@pytest.hookimpl(optionalhook=True)  # a GPU machine's python may have no xdist
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """For `pytest -n 2`: one process takes all files that start ranks of their own, or of Ray."""
    from xdist.scheduler import LoadScopeScheduling

    class GangsTogether(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file, _, _ = nodeid.partition("::")
            return "ranks" if _starts_ranks(config.rootpath / file) else file

    return GangsTogether(config, log)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """What is not of this tier (`tiers`) is left out."""
    left_out = [item for item in items if not _is_wanted(item)]
    if left_out:
        config.hook.pytest_deselected(items=left_out)
        items[:] = [item for item in items if item not in set(left_out)]


def _is_wanted(item: pytest.Item) -> bool:
    if not ALL and item.get_closest_marker("thorough") is not None:
        return False
    if QUICK and item.get_closest_marker("quick") is None:
        has_ranks = item.path.stem in STARTS_RANKS or GANGS & set(getattr(item, "fixturenames", ()))
        return not has_ranks and item.get_closest_marker("not_quick") is None
    return True


@cache
def _starts_ranks(file: Path) -> bool:
    return file.stem in STARTS_RANKS or "ray_gang_of: " in file.read_text(encoding="utf-8")


@pytest.fixture(scope="module", autouse=True)
def _what_is_imported_is_not_garbage() -> None:
    """Ranks of this process collect when they end, and would look through all of torch and diffusers every time. What
    earlier tests left behind is looked at once more: a frozen store would never be closed.
    """
    gc.unfreeze()
    gc.collect()
    gc.freeze()


@pytest.fixture(scope="session")
def flux2_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny flux2-klein checkpoint; read it, do not change it."""
    return _checkpoint(tmp_path_factory, "flux2-klein")


@pytest.fixture(scope="session")
def z_image_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny z-image checkpoint; read it, do not change it."""
    return _checkpoint(tmp_path_factory, "z-image")


@pytest.fixture(scope="session")
def checkpoints(flux2_dir: Path, z_image_dir: Path) -> dict[str, Path]:
    """Family -> tiny checkpoint."""
    return {"flux2-klein": flux2_dir, "z-image": z_image_dir}


@pytest.fixture(scope="session")
def checkpoint_of(tmp_path_factory: pytest.TempPathFactory, checkpoints: dict[str, Path]) -> Callable[[str], Path]:
    """Recipe -> its tiny checkpoint, made when it is first asked for; read it, do not change it."""
    made = dict(checkpoints)

    def checkpoint_of(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = _checkpoint(tmp_path_factory, recipe)
        return made[recipe]

    return checkpoint_of


@pytest.fixture
def hub(flux2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """A stand-in for the hub that has a tiny checkpoint; the cache is empty."""
    from hub_stand_in import Hub, point_to, serving_hub

    with serving_hub(Hub.of(flux2_dir)) as hub:
        point_to(monkeypatch, hub.endpoint, tmp_path / "cache")
        yield hub


@pytest.fixture(scope="session")
def gang_of() -> Iterator[Callable[[int], Gang]]:
    """World size -> a running gang of this machine's processes, started on first use and shared by all tests."""
    from crossdock.launch.gangs.local.gang import LocalGang

    gangs: dict[int, LocalGang] = {}

    def gang_of(world_size: int) -> Gang:
        if world_size not in gangs:
            gangs[world_size] = LocalGang(RunConfig().launch, world_size, "cpu")
            gangs[world_size].start()
        return gangs[world_size]

    yield gang_of
    for gang in gangs.values():
        gang.close()


@pytest.fixture(scope="session")
def ray_gang_of() -> Iterator[Callable[[int], Gang]]:
    """World size -> a running gang of Ray actors, started on first use and shared by all tests."""
    ray = pytest.importorskip("ray", reason="ray is not installed: the torchrun tests cover the same layouts")
    from crossdock.launch.gangs.ray.gang import RayGang

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    gangs: dict[int, RayGang] = {}

    def ray_gang_of(world_size: int) -> Gang:
        if not ray.is_initialized():
            ray.init(
                address="local",
                num_cpus=4,
                include_dashboard=False,
                object_store_memory=256 * 2**20,
                log_to_driver=False,
                logging_level=logging.ERROR,
            )
        if world_size not in gangs:
            gangs[world_size] = RayGang(RunConfig().launch, world_size, "cpu")
            gangs[world_size].begin([("diffusers", "WanPipeline"), ("diffusers", "NoSuchPipeline")])
            gangs[world_size].start()
        return gangs[world_size]

    yield ray_gang_of
    for gang in gangs.values():
        gang.close()
    ray.shutdown()


def _checkpoint(factory: pytest.TempPathFactory, family: str) -> Path:
    folder = factory.mktemp("checkpoints") / family
    from crossdock.runtime.models.tiny.make_checkpoint import make_checkpoint  # a GPU machine may lack diffusers

    make_checkpoint(family, folder)
    return folder
