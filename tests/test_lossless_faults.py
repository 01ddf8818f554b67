"""What goes wrong with encoded weights is caught in the step in which it happens, and the tensor is named."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import faults_in_codes as faults
import pytest
import torch
from faults_in_steps import BLOCK, block_of
from faults_in_weights import Plant
from judged_run import STEPS, HereGang, Run

from crossdock.offload.codecs import on_host
from crossdock.offload.codecs.part_format import part_formats
from crossdock.parallel.mesh import MeshShape
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.contract.coverage import same_bits
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.worker import RankWorker
from tiers import not_quick

pytestmark = not_quick

AT_REST = (
    faults.low_byte,
    faults.sign,
    faults.number,
    faults.window,
    faults.not_coded,
    faults.missing_escape,
    faults.escape_elsewhere,
    faults.another_escape,
)
ON_THE_WAY = (faults.left_out, faults.half_done, faults.too_early, faults.stale_staging)


def _plan(directory: Path, **offload: Any) -> Any:
    config = {
        "dtype": "bfloat16",
        "offload": {"layerwise": True, "codec": "lossless"} | offload,
        "verify": {"arrivals": "every"},
    }
    return make_plan(RunConfig.parse(config), directory, "cpu")


def test_every_fault_is_caught(flux2_dir: Path) -> None:
    """In a middle step, in the last one, and before the first: all in one load, each in a later request."""
    with Run(_plan(flux2_dir), HereGang()) as run:
        assert run.judged() == ([], STEPS)
        for plant in (*AT_REST, *ON_THE_WAY):
            for at in (2, STEPS) if plant in AT_REST[:2] else (3,):
                found, steps = run.judged(plant, 0, at)
                print(_name(plant), at, *found[:2], sep="\n   ")
                mine = [one for one in found if one.check == "arrives"]
                assert mine, (plant, found)
                assert all(one.where.startswith(f"step {at}: {BLOCK}") for one in mine), found
                assert steps == at, "the request went on"
                if plant in AT_REST:  # what rests is still wrong: it tells which tensor it is
                    assert all(one.where.startswith(f"step {at}: {BLOCK}.") for one in mine), found
        assert run.judged() == ([], STEPS)


def _name(plant: Plant) -> str:
    return next(name for name, value in vars(faults).items() if value is plant)


def test_tables_are_compared_and_what_they_do_not_decide_is_not(flux2_dir: Path) -> None:
    """Ranks that have encoded the same part with other tables do not start; all else is compared as it arrives."""
    plan = _plan(flux2_dir)
    with Run(plan, HereGang()) as run:
        block = block_of(run.gang.worker)
        (form,) = part_formats(block.layout, 1, block.codec.plain)
        (healthy,) = run.ask(RankWorker.report)
        two = replace(plan, layout=replace(plan.layout, mesh=MeshShape(dp=2)))
        assert list(same_bits(two, [healthy, replace(healthy, rank=1)])) == []
        for place, told in (
            (4, True),
            (form.values_at, True),
            (form.escapes_at, True),
            (form.coded[0].places[0], False),
        ):
            block.source[place] ^= 1
            (changed,) = run.ask(RankWorker.report)
            block.source[place] ^= 1
            found = list(same_bits(two, [healthy, replace(changed, rank=1)]))
            assert {one.where for one in found} == ({f"{BLOCK}: windows and escapes"} if told else set())
            assert {one.rank for one in found} == ({0, 1} if told else set())


@pytest.mark.parametrize("wrong", ["window", "escape", "number"])
def test_a_wrong_encoder_is_caught_at_load(wrong: str, flux2_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Also where the wrong byte is in none of the rows that are compared when a block arrives."""
    encode = on_host.encode

    def spoiled(form: Any, raw: Any, out: Any, threads: int = 1) -> None:
        encode(form, raw, out, threads)
        span = form.coded[-1]
        if wrong == "escape":
            out[:4].view("int32")[0] -= 1 if out[:4].view("int32")[0] else 0
            out[form.values_at] ^= 1
        else:
            out[4 + len(form.coded) - 1 if wrong == "window" else span.places[1] + 5] ^= 1

    monkeypatch.setattr(on_host, "encode", spoiled)
    worker = RankWorker(0, 1, torch.device("cpu"))
    with pytest.raises(RuntimeError, match=r"transformer_blocks\.\d\.[\w.]+: codec lossless 1 does not decode"):
        worker.setup(_plan(flux2_dir))
