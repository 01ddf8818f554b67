"""The run configuration: how the work is split over ranks, what is streamed, how the ranks are started.

A `RunConfig` is plain frozen data. It holds no mesh, no rank and no module. `RunConfig.parse` turns a mapping
into one and raises `ConfigError`; `load_config` of `yaml_file` does the same for a file and adds the line numbers.
"""

from __future__ import annotations

import math
import os
import re
from collections.abc import Mapping
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, BaseModel, ConfigDict, Field, ValidationError, field_validator, model_validator

from crossdock.runtime.config.problems import problems_of, refusal
from crossdock.runtime.errors import ConfigError

Degree = Annotated[int, Field(ge=1)]
Seconds = Annotated[float, Field(gt=0, allow_inf_nan=False)]
FilePath = Annotated[str, AfterValidator(lambda path: path and os.path.abspath(os.path.expanduser(path)))]
"""Found from everywhere, also by ranks."""

AUTO_DEPTHS = (1, 2, 3, 4)
"""What `prefetch: auto` chooses from."""
_SIZE = re.compile(r"(\d+(?:\.\d+)?) ?(B|KiB|MiB|GiB|TiB)")
_UNIT_BYTES = {"B": 1, "KiB": 2**10, "MiB": 2**20, "GiB": 2**30, "TiB": 2**40}


class Section(BaseModel):
    """Base of all sections: frozen, no unknown keys, no conversion between types."""

    model_config = ConfigDict(frozen=True, extra="forbid", strict=True)


class HsdpConfig(Section):
    """Weights sharded over `shard` ranks, in `replicate` copies (hybrid sharded data parallelism)."""

    replicate: Degree = Field(default=1, description="How many copies of the sharded weights there are.")
    shard: Degree = Field(default=1, description="How many ranks one copy is spread over.")


class ParallelConfig(Section):
    """How the work is split. The product of the five degrees is the number of ranks."""

    ulysses_degree: Degree = Field(
        default=1,
        description="Ranks that split the sequence and exchange attention heads (Ulysses, all-to-all).",
    )
    ring_degree: Degree = Field(
        default=1, description="Ranks that split the sequence and rotate keys and values (ring attention)."
    )
    tp_degree: Degree = Field(
        default=1,
        description="Ranks that split every block's matrices (tensor parallelism); divides the heads.",
    )
    cfg_degree: Degree = Field(
        default=1,
        description="Ranks that split the branches of guidance: 1 or 2, where the pipeline has two.",
    )
    dp_degree: Degree = Field(default=1, description="Ranks that split the prompts (data parallelism).")
    hsdp: HsdpConfig | None = Field(
        default=None,
        description="Shard the block weights; replicate x shard is the number of ranks / tp_degree.",
    )
    attention: Literal["native", "xfuser"] = Field(
        default="native",
        description="native: this project's attention. xfuser: USP of the xfuser package (CUDA only).",
    )

    @property
    def degrees(self) -> dict[str, int]:
        """Degree by mesh axis, outermost first."""
        return {
            "dp": self.dp_degree,
            "cfg": self.cfg_degree,
            "ring": self.ring_degree,
            "ulysses": self.ulysses_degree,
            "tp": self.tp_degree,
        }

    @property
    def world_size(self) -> int:
        """The product of the degrees."""
        return math.prod(self.degrees.values())

    @field_validator("cfg_degree")
    @classmethod
    def _guidance_has_two_branches(cls, degree: int) -> int:
        if degree > 2:
            raise refusal(f"found {degree}; allowed: 1, 2 (guidance has two branches)")
        return degree

    @model_validator(mode="after")
    def _xfuser_needs_whole_heads(self) -> Self:
        if self.attention == "xfuser" and self.tp_degree > 1:
            raise refusal(
                f"xfuser works with tp_degree 1 only, but tp_degree is {self.tp_degree}; "
                "use attention: native or tp_degree: 1",
                at="attention",
            )
        return self


class OffloadConfig(Section):
    """What rests in host memory instead of on the device."""

    layerwise: bool = Field(
        default=False, description="Keep the transformer blocks in host memory and stream each just in time."
    )
    prefetch: Annotated[int, Field(ge=1, le=8)] | Literal["auto"] = Field(
        default="auto",
        description="How many blocks ahead of the computation are fetched, from 1 to 8. auto: what the budget is best "
        "spent on, without one 1.",
    )
    device_budget: str | float | None = Field(
        default=None,
        description="Device memory that all weights together may take: a size, a fraction of the device, or auto (what "
        "the first steps leave free); needs layerwise.",
        examples=["18GiB", 0.8, "auto"],
    )
    host: Literal["shared", "mmap"] = Field(
        default="shared",
        description="shared: one copy of the block bytes per node, shared by its ranks. mmap: none; blocks are read "
        "from the page cache of the checkpoint's files.",
    )
    codec: Literal["auto", "none", "lossless"] = Field(
        default="none",
        description="What rests and travels of the blocks. lossless: weights of 16 bits as three quarters of their "
        "bytes, decoded in the slot, bit for bit the same. auto: lossless where blocks come from a GPU's host.",
    )

    def budget_bytes(self, device_bytes: int | None) -> int | None:
        """`device_budget` in bytes; None: as little as possible, or not known before the device is."""
        if isinstance(self.device_budget, float):
            return None if device_bytes is None else int(self.device_budget * device_bytes)
        return None if self.device_budget in (None, "auto") else _size_bytes(str(self.device_budget))

    @property
    def depths(self) -> tuple[int, ...]:
        """The prefetch distances to choose from, the least first."""
        return AUTO_DEPTHS if self.prefetch == "auto" else (self.prefetch,)

    @property
    def is_relative(self) -> bool:
        """The budget is a fraction of the device."""
        return isinstance(self.device_budget, float)

    @field_validator("device_budget")
    @classmethod
    def _budget_is_a_size(cls, budget: str | float | None) -> str | float | None:
        if isinstance(budget, float):
            good = 0 < budget <= 1
        else:
            good = budget is None or budget == "auto" or _size_bytes(budget) > 0
        if not good:
            found = f'"{budget}"' if isinstance(budget, str) else f"{budget:g}"
            raise refusal(
                f'found {found}; allowed: a size above zero in {", ".join(_UNIT_BYTES)}, such as "18GiB", '
                "a fraction of the device above 0 and up to 1, or auto"
            )
        return budget

    @model_validator(mode="after")
    def _budget_needs_layerwise(self) -> Self:
        if self.device_budget is not None and not self.layerwise:
            raise refusal(
                f'found "{self.device_budget}", but nothing is offloaded; set offload.layerwise: true or remove it',
                at="device_budget",
            )
        return self

    @model_validator(mode="after")
    def _codec_needs_a_store(self) -> Self:
        if self.codec == "lossless" and self.host == "mmap":
            raise refusal(
                'found "lossless", but with offload.host: mmap the files\' own bytes travel; set offload.host: shared',
                at="codec",
            )
        return self

    @model_validator(mode="after")
    def _mmap_needs_layerwise(self) -> Self:
        if self.host == "mmap" and not self.layerwise:
            raise refusal('found "mmap", but nothing is offloaded; set offload.layerwise: true', at="host")
        return self


class TimeoutConfig(Section):
    """How long each phase may take; no wait is without a limit."""

    launch_s: Seconds = Field(default=180.0, description="Seconds until every rank must be up.")
    load_s: Seconds = Field(default=1800.0, description="Seconds until every rank must have read its weights.")
    collective_s: Seconds = Field(default=300.0, description="Seconds one collective may take.")
    request_s: Seconds = Field(default=3600.0, description="Seconds one generation may take; it then ends with a step.")


class RecoveryConfig(Section):
    """What becomes of a request when a rank fails. torchrun has restarts of its own (`--max-restarts`) instead."""

    retries: int = Field(
        default=2, ge=0, description="How many times the ranks are started again before a request is given up."
    )
    keep_every: int = Field(
        default=4, ge=0, description="Steps after which the latents are kept, to go on from there; 0: never."
    )


class LaunchConfig(Section):
    """How the ranks are started, and on what."""

    launcher: Literal["auto", "local", "ray", "torchrun"] = Field(
        default="auto",
        description="What starts the ranks. auto: torchrun, where that is the command in use; Ray for several ranks, "
        "where it is installed, and for a cluster; else local: processes of this machine.",
    )
    world_size: int | None = Field(
        default=None,
        ge=1,
        description="Number of ranks; by default the product of the degrees, which it must equal.",
    )
    device: Literal["auto", "cpu", "cuda"] = Field(
        default="auto", description="auto: CUDA where there is a GPU, else CPU."
    )
    ray_address: str | None = Field(
        default=None,
        description="Address of a running Ray cluster to join; by default a local one is started.",
    )
    port: int = Field(default=0, ge=0, le=65535, description="Rendezvous port; 0: chosen by rank 0.")
    cpus_per_rank: float = Field(
        default=0.25, ge=0, allow_inf_nan=False, description="CPUs that Ray reserves for each rank."
    )
    timeouts: TimeoutConfig = Field(default=TimeoutConfig(), description="Time limits of the phases.")
    recovery: RecoveryConfig = Field(default=RecoveryConfig(), description="What a fault costs.")

    @model_validator(mode="after")
    def _a_cluster_needs_ray(self) -> Self:
        if self.ray_address is not None and self.launcher == "local":
            raise refusal(
                "found local, but launch.ray_address names a cluster; use launcher: ray, or leave the address out",
                at="launcher",
            )
        return self


class VerifyConfig(Section):
    """What is looked at in every step, beside what is verified before the first one."""

    finite: bool = Field(
        default=True, description="Latents that are not finite end the request, with the block where that begins."
    )
    state: bool = Field(
        default=True,
        description="The ranks of a replica have the same inputs and latents, and compute the same blocks.",
    )
    arrivals: Literal["every", "rolling", "first"] = Field(
        default="rolling",
        description="How much of the weights is compared with what first arrived, when it has computed. every: all, in "
        "each step. rolling: a share of each block in each step, all in the last. first: first arrivals alone.",
    )


class LoraConfig(Section):
    """An adapter that is merged into a transformer's weights as they are read."""

    path: FilePath = Field(description="Its .safetensors file, or the directory that has it; under Ray on every node.")
    scale: float = Field(default=1.0, allow_inf_nan=False, description="How much of it.")
    component: Literal["transformer", "transformer_2"] = Field(
        default="transformer", description="Which transformer, where there are two."
    )


class RunConfig(Section):
    """Everything about a run except the model directory and the request."""

    parallel: ParallelConfig = Field(default=ParallelConfig(), description="How the work is split over the ranks.")
    offload: OffloadConfig = Field(default=OffloadConfig(), description="What is streamed from host memory.")
    launch: LaunchConfig = Field(default=LaunchConfig(), description="How the ranks are started.")
    verify: VerifyConfig = Field(default=VerifyConfig(), description="What is looked at in every step.")
    dtype: Literal["auto", "float32", "bfloat16", "float16"] = Field(
        default="auto", description="Type of weights and computation; auto: what most of the checkpoint is stored in."
    )
    transformer: FilePath | None = Field(
        default=None,
        description="A .safetensors file, in diffusers', its publisher's or ComfyUI's names, whose transformer takes "
        "the place of the checkpoint's.",
    )
    transformer_2: FilePath | None = Field(
        default=None, description="The same for the second one, where there are two."
    )
    loras: tuple[LoraConfig, ...] = Field(
        default=(), strict=False, description="LoRA adapters, in diffusers', PEFT's, kohya's or ComfyUI's names."
    )

    @property
    def single_files(self) -> dict[str, str]:
        """Component -> the file that stands for its folder."""
        return {name: file for name in ("transformer", "transformer_2") if (file := getattr(self, name)) is not None}

    @property
    def world_size(self) -> int:
        """Number of ranks."""
        return self.parallel.world_size

    @classmethod
    def parse(cls, data: Mapping[str, object], source: str | None = None) -> Self:
        """Build from a mapping as read from YAML or JSON.

        Raises `ConfigError` with one line for each problem, each starting with `source` where it is given.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            prefix = f"{source}: " if source else ""
            lines = [f"{prefix}{'.'.join(p.path)}: {p.text}" for p in problems_of(error, cls)]
            raise ConfigError("\n".join(lines)) from None

    @model_validator(mode="after")
    def _degrees_make_the_world(self) -> Self:
        wanted = self.launch.world_size
        if wanted is not None and wanted != self.parallel.world_size:
            product = " * ".join(f"{axis}({degree})" for axis, degree in self.parallel.degrees.items())
            raise refusal(
                f"{product} = {self.parallel.world_size}, but world_size is {wanted}; "
                "change the degrees, or leave launch.world_size out",
                at="launch.world_size",
            )
        return self

    @model_validator(mode="after")
    def _hsdp_covers_the_slice_holders(self) -> Self:
        hsdp = self.parallel.hsdp
        tp_degree = self.parallel.tp_degree
        holders = self.world_size // tp_degree
        if hsdp is not None and hsdp.replicate * hsdp.shard != holders:
            raise refusal(
                f"replicate({hsdp.replicate}) * shard({hsdp.shard}) = {hsdp.replicate * hsdp.shard}, but "
                f"world_size({self.world_size}) / tp_degree({tp_degree}) = {holders} ranks hold the same "
                "TP slice",
                at="parallel.hsdp",
            )
        return self

    @model_validator(mode="after")
    def _xfuser_needs_cuda(self) -> Self:
        if self.parallel.attention == "xfuser" and self.launch.device == "cpu":
            raise refusal(
                "xfuser runs on CUDA only, but launch.device is cpu; use attention: native",
                at="parallel.attention",
            )
        return self


def _size_bytes(text: str) -> int:
    """Bytes in a size such as `1.5GiB`; 0 when the text is not a size."""
    match = _SIZE.fullmatch(text)
    return int(float(match[1]) * _UNIT_BYTES[match[2]]) if match else 0
