"""Fixtures that are made once per session: checkpoints and gangs."""

from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # before torch is imported: ranks and the reference share two cores

import logging
import signal
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
import torch

from crossdock.runtime.config import RunConfig
from crossdock.runtime.gang import Gang

# What a run leaves behind is looked for on the whole machine: these, and all that share gangs, run one after the other.
WHOLE_MACHINE = {
    "test_check.py",
    "test_faults.py",
    "test_lost_node.py",
    "test_matrix_e2e.py",
    "test_nothing_left_behind.py",
    "test_offload_host_store.py",
    "test_store_keeper.py",
    "test_torchrun_faults.py",
    "test_video_file.py",
}

torch.set_num_threads(1)
signal.signal(signal.SIGINT, signal.default_int_handler)  # children of a shell's background job would ignore it


@pytest.hookimpl(tryfirst=True)  # xdist reads the marks in the same hook
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """Which tests stay together when `pytest -n 2 --dist loadgroup` deals them out."""
    for item in items:
        whole = item.path.name in WHOLE_MACHINE or "gang_of" in getattr(item, "fixturenames", ())
        item.add_marker(pytest.mark.xdist_group("whole machine" if whole else item.path.stem))


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


@pytest.fixture(scope="session")
def gang_of() -> Iterator[Callable[[int], Gang]]:
    """World size -> a running gang of Ray actors, started on first use and shared by all tests."""
    ray = pytest.importorskip("ray", reason="ray is not installed: the torchrun tests cover the same layouts")
    from crossdock.launch.ray_gang import RayGang

    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    gangs: dict[int, RayGang] = {}

    def gang_of(world_size: int) -> Gang:
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
            gangs[world_size].start()
        return gangs[world_size]

    yield gang_of
    for gang in gangs.values():
        gang.close()
    ray.shutdown()


def _checkpoint(factory: pytest.TempPathFactory, family: str) -> Path:
    folder = factory.mktemp("checkpoints") / family
    from crossdock.runtime.tiny.checkpoint import make_checkpoint  # a GPU machine may lack diffusers

    make_checkpoint(family, folder)
    return folder
