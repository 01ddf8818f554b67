"""What a pipeline refuses by a ValueError is the request's fault, in whatever phase: ranks and engine go on."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from one_rank import admitted, rank_request

from crossdock.launch.engine.engine import Engine
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import RankError, RequestRefused
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.watch.gang import Gang
from tiers import thorough

GangOf = Callable[[int], Gang]
SMALL = {"steps": 2, "height": 64, "width": 64}
LAYERWISE: dict[str, Any] = {"layerwise": True}
TP2 = {"parallel": {"tp_degree": 2}, "offload": LAYERWISE}
HSDP2 = {"parallel": {"dp_degree": 2, "hsdp": {"shard": 2}}, "offload": LAYERWISE}
PHASES = ("call", "encode", "transformer", "block", "step", "decode")


def _plant() -> Callable[..., None]:
    """For ranks, which cannot import this module."""

    def plant(worker: RankWorker, phase: str, ranks: tuple[int, ...], package: str = "diffusers", now: int = 0) -> None:
        """Until it has raised once, call number `now` of something raises a ValueError on these ranks."""
        if worker.rank not in ranks:
            return
        scope: dict[str, Any] = {"__name__": f"{package}.planted"}
        exec("def refuse():\n raise ValueError('does not\\n do')", scope)
        pipe, model, left = worker.loaded.pipeline.pipe, worker.loaded.model, [now]

        def hook(*_: Any, **__: Any) -> None:
            left[0] -= 1
            if left[0] < 0:
                handle.remove()
                scope["refuse"]()

        class Patch:
            def __init__(self, owner: Any, name: str) -> None:
                self.owner, self.name, own = owner, name, getattr(owner, name)
                setattr(owner, name, lambda *args, **kwargs: (hook(), own(*args, **kwargs))[1])

            def remove(self) -> None:
                delattr(self.owner, self.name)

        hooked = {
            "encode": getattr(pipe, "text_encoder", None),
            "transformer": model,
            "block": worker.loaded.stream.blocks[1].module,
            "decode": pipe.vae.decoder,
        }
        patched = {"call": (pipe, "check_inputs"), "step": (pipe.scheduler, "step")}
        module = hooked.get(phase)
        if phase in patched:
            handle: Any = Patch(*patched[phase])
        elif module is not None:
            handle = module.register_forward_pre_hook(hook)

    return plant


@pytest.mark.parametrize("config", [HSDP2, pytest.param(TP2, marks=thorough)], ids=["hsdp2", "tp2"])
def test_the_request_is_at_fault(config: dict[str, Any], gang_of: GangOf, flux2_dir: Path) -> None:
    """Ranks replaced for it, until the engine is given up; a rank that hangs; a slot or a loop left half done."""
    with Engine.start(RunConfig.parse(config), flux2_dir, gang_of(2)) as engine:
        expected = engine.generate(["a fox", "a boat"], **SMALL).latents
        for phase in PHASES:
            engine.gang.collective_rpc(_plant(), phase, (0, 1), timeout_s=60)
            with pytest.raises(RequestRefused, match=r"Flux2KleinPipeline refuses .*this: does not do$") as caught:
                engine.generate(["a fox", "a boat"], **SMALL)
            assert caught.value.exit_code == 2
        for phase in ("encode", "decode") if config is HSDP2 else ():
            # one replica: the other would wait in its first step for a shard of a block; or has its picture
            engine.gang.collective_rpc(_plant(), phase, (1,), timeout_s=60)
            with pytest.raises(RequestRefused, match="does not do"):
                engine.generate(["a fox", "a boat"], **SMALL)
        again = engine.generate(["a fox", "a boat"], **SMALL)
        assert not again.report["faults"]
    assert all(map(torch.equal, expected, again.latents))


def test_one_rank_alone_is_at_fault(gang_of: GangOf, flux2_dir: Path) -> None:
    """A rank that went astray makes its scheduler refuse: the user would be told that the request is wrong."""

    def ask(worker: RankWorker, request: Any) -> tuple[str, str]:
        try:
            worker.generate(request)
        except Exception as error:
            return type(error).__name__, str(error)
        return "", ""

    with Engine.start(RunConfig.parse(TP2), flux2_dir, gang_of(2)) as engine:
        engine.gang.collective_rpc(_plant(), "step", (1,), "diffusers", 1, timeout_s=60)
        found = engine.gang.collective_rpc(ask, rank_request("a fox", **SMALL), timeout_s=60)
    assert found[0] == found[1]
    assert found[0][0] == RankError.__name__
    assert "rank 1: its pipeline alone refuses the request" in found[0][1]


def test_an_error_of_our_own_is_none_of_the_request(flux2_dir: Path) -> None:
    """Below a pipeline as well."""
    with admitted(make_plan(RunConfig.parse({"offload": LAYERWISE}), flux2_dir, "cpu")) as worker:
        _plant()(worker, "block", (0,), "crossdock")
        with pytest.raises(ValueError, match="does not"):
            worker.generate(rank_request("a fox", **SMALL))
