"""The layouts that are held by tests: one table for the CPU tests, the GPU tests and the README."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from crossdock.runtime.config.yaml_file import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "configs"


@dataclass(frozen=True)
class Layout:
    """One built-in config. `through_torchrun`: also tested under torchrun."""

    name: str
    through_torchrun: bool = False

    @property
    def config(self) -> Path:
        return CONFIGS / f"{self.name}.yaml"

    @property
    def facts(self) -> frozenset[str]:
        """What mutations ask of it; blocks are `streamed` where they are `sharded`, `copied` from the host, or both.

        `one_store`: ranks divide the work of filling one copy in host memory.
        """
        config = load_config(self.config)
        parallel, sharded = config.parallel, config.parallel.hsdp is not None
        known = {
            "ranks": config.world_size > 1,
            "dp": parallel.dp_degree > 1,
            "cfg": parallel.cfg_degree > 1,
            "ulysses": parallel.ulysses_degree > 1,
            "ring": parallel.ring_degree > 1,
            "tp": parallel.tp_degree > 1,
            "sharded": sharded,
            "copied": config.offload.layerwise,
            "one_store": config.offload.layerwise and not sharded and config.world_size > parallel.tp_degree,
            "streamed": sharded or config.offload.layerwise,
        }
        return frozenset(fact for fact, holds in known.items() if holds)


LAYOUTS = (
    Layout("single"),
    Layout("layerwise"),
    Layout("tp2"),
    Layout("layerwise_tp2", through_torchrun=True),
    Layout("hsdp"),
    Layout("layerwise_hsdp", through_torchrun=True),
    Layout("ulysses4"),
    Layout("ring4"),
    Layout("ulysses2_ring2"),
    Layout("layerwise_ulysses2_ring2", through_torchrun=True),
    Layout("layerwise_cfg2"),
    Layout("layerwise_tp2_ulysses2"),
    Layout("layerwise_hsdp_ulysses2"),
)
COMBINED: dict[str, dict[str, Any]] = {
    "hsdp2_ulysses2_tp2": {"parallel": {"ulysses_degree": 2, "tp_degree": 2, "hsdp": {"shard": 2}}},
    "ring2_tp2": {"parallel": {"ring_degree": 2, "tp_degree": 2}},
    "hsdp4_ulysses2_ring2": {"parallel": {"ulysses_degree": 2, "ring_degree": 2, "hsdp": {"shard": 4}}},
    "dp2_ulysses2": {"parallel": {"dp_degree": 2, "ulysses_degree": 2}},
}
"""HSDP on the ranks of a sequence group, TP inside of both: every mechanism at once. For use with PARTLY_RESIDENT."""
PARTLY_RESIDENT: dict[str, Any] = {"layerwise": True, "prefetch": 2, "device_budget": "4MiB"}
FAMILIES = ("z-image", "flux2-klein")
"""On these, every mechanism is tested; `ROWS` has all of them. The first one's text is short, its requests quick."""


@dataclass(frozen=True)
class Row:
    """A family's row of the matrix.

    Attributes:
        recipe: of its tiny checkpoint.
        sizes: height and width in pixels; one has a token count that divides by the ranks, one that does not.
        frames: of a video.
        steps: in the second one, a stream and a model's caches use what the first one left.
        tested: the layouts that `make test` runs, so that each is run by some family; `make test-all` runs all.
        guided: guidance scale and negative prompt, where the pipeline does not guide unless it is asked to.
        also: what the prompt says besides what it says for every family.
    """

    recipe: str
    sizes: tuple[tuple[int, int], ...] = ((256, 256), (208, 176))
    frames: int | None = None
    steps: int = 2
    tested: tuple[str, ...] = ("layerwise_tp2",)
    guided: tuple[float, str] | None = None
    also: str = ""

    @property
    def wishes(self) -> dict[str, Any]:
        """What a request asks for besides."""
        scale, negative = self.guided or (None, None)
        return {"frames": self.frames, "guidance_scale": scale, "negative_prompt": negative}


ROWS = (
    Row("flux1", tested=("layerwise_tp2_ulysses2",)),
    Row("flux2", tested=("hsdp",)),
    Row("flux2-klein"),
    Row("flux3", tested=("layerwise_cfg2",)),
    Row("flux3-distilled", tested=("layerwise_hsdp_ulysses2",)),
    Row("longcat-image", tested=("ulysses4",)),
    Row("ovis-image", tested=("tp2",)),
    Row("z-image", tested=("layerwise_tp2", "layerwise_ulysses2_ring2")),
    Row("wan2.1", ((64, 128), (80, 112)), frames=9, tested=("layerwise",)),
    Row("wan2.2-ti2v-5b", ((128, 128), (160, 96)), frames=9),
    Row(
        "wan2.2-a14b",
        ((64, 128), (80, 112)),
        frames=9,
        steps=4,  # each transformer has some
        tested=("layerwise_cfg2",),
    ),
    Row(
        "hunyuan-video-1.5",
        ((64, 128), (80, 112)),
        frames=9,
        tested=("layerwise_cfg2",),
        guided=(4.0, "grey, blurred"),
        also=', a sign says "no entry"',  # a second text encoder reads what is in quotes
    ),
    Row("qwen-image", tested=("ulysses2_ring2",), guided=(4.0, "grey, blurred")),
    Row(
        "qwen-image-2.1",
        ((256, 256), (224, 160)),
        tested=("layerwise_hsdp",),
        guided=(3.0, "grey, blurred"),
    ),
    Row("sd3.5", tested=("single",)),
    Row("krea2", tested=("ring4",)),
    Row(
        "helios",
        sizes=((64, 64), (48, 80)),  # 144 and 135 tokens, and 40 and 44 of what came before
        frames=66,  # two chunks
        tested=("layerwise",),
    ),
    Row(
        "ltx2",
        sizes=((128, 128), (96, 160)),  # 32 and 30 tokens of video, 9 of audio
        frames=9,
    ),
    Row(
        "minimax-h3",
        sizes=((32, 160), (64, 64)),  # 185 and 148 tokens of video, 414 of audio, 73 of text
        frames=124,
        tested=("tp2",),
    ),
)
