"""What can be wrong with a checkpoint and a config that are well-formed each, but do not fit each other."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from crossdock.parallel.tensor import tensor_slices
from crossdock.parallel.xfuser_attention import xfuser_installed, xfuser_limits
from crossdock.runtime.adapters.lora import Lora
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import ConfigError, LaunchError
from crossdock.runtime.models.checkpoint import StoredTensor
from crossdock.runtime.models.spec import ModelSpec
from crossdock.runtime.plan.memory_plan import PlannedBlock


def check_degree(model: nn.Module, spec: ModelSpec, config: RunConfig) -> None:
    """The TP degree divides the heads and every part of every planned linear."""
    degree, heads = config.parallel.tp_degree, _heads(model, spec)
    reasons = {d: _why_not(model, spec, d) for d in {degree, *(d for d in range(1, heads + 1) if heads % d == 0)}}
    if reasons[degree] is not None:
        allowed = ", ".join(str(d) for d in sorted(reasons) if reasons[d] is None)
        raise ConfigError(f"found {degree}: {reasons[degree]}; allowed: {allowed}", "parallel.tp_degree")


def check_guidance(spec: ModelSpec, config: RunConfig) -> None:
    """There are branches of guidance to split."""
    if config.parallel.cfg_degree > 1 and spec.branches is None:
        raise ConfigError(
            f"found {config.parallel.cfg_degree}: {spec.pipeline} has one branch of guidance; allowed: 1",
            "parallel.cfg_degree",
        )


def _why_not(model: nn.Module, spec: ModelSpec, degree: int) -> str | None:
    if _heads(model, spec) % degree:
        return f"it does not divide the {_heads(model, spec)} attention heads of {spec.transformer}"
    try:
        tensor_slices(model, spec.tensor_plan, 0, degree)
    except ValueError as error:
        return str(error)
    return None


def check_attention(model: nn.Module, spec: ModelSpec, config: RunConfig, device: str) -> None:
    parallel = config.parallel
    if parallel.attention != "xfuser":
        return
    reason = xfuser_limits(device, parallel.tp_degree, _heads(model, spec), parallel.ulysses_degree)
    if reason is not None:
        raise ConfigError(f"xfuser cannot work here: {reason}; use attention: native", "parallel.attention")
    if not xfuser_installed():
        raise LaunchError("xfuser is not installed; run: pip install 'crossdock[xdit]'", "parallel.attention")


def _heads(model: nn.Module, spec: ModelSpec) -> int:
    config: Any = model.config
    return int(config[spec.tensor_plan.head_count])


def transformer_files(config: RunConfig, transformers: Sequence[str]) -> dict[str, Path]:
    """Component -> the file that stands for it."""
    if strange := config.single_files.keys() - transformers:
        name, there = min(strange), ", ".join(transformers)
        raise ConfigError(f"found {config.single_files[name]}; the checkpoint has only {there}", name)
    return {name: Path(file) for name, file in config.single_files.items()}


def check_codec(config: RunConfig, blocks: Sequence[PlannedBlock]) -> None:
    """Where a codec is asked for, there is something that it makes smaller."""
    if config.offload.codec != "lossless" or not all(block.codec.in_place for block in blocks):
        return
    if not any(block.home.streamed for block in blocks):
        reason = "nothing rests elsewhere or travels; set offload.layerwise: true or parallel.hsdp"
    else:
        dtypes = {str(entry.dtype).removeprefix("torch.") for block in blocks for entry in block.layout.entries}
        reason = f"in {', '.join(sorted(dtypes))} it makes nothing much smaller; set dtype: bfloat16"
    raise ConfigError(f"found lossless, but {reason}, or codec: none", "offload.codec")


def check_pages(blocks: Sequence[PlannedBlock], stored: Mapping[str, StoredTensor], loras: Sequence[Lora] = ()) -> None:
    """Bytes as they are stored can be streamed only where they are the bytes to be held."""
    for block in blocks:
        for entry in block.layout.entries:
            full = [f"{block.name}.{each}" for each in entry.names]
            if changed := next((each for each in full for lora in loras if each in lora.targets), None):
                raise ConfigError(
                    f"found mmap, but {changed} is changed by an adapter; use host: shared",
                    "offload.host",
                )
            there = next((stored[each] for each in full if each in stored), None)
            if there is not None and len(there.rows) > 1:
                raise ConfigError(
                    f"found mmap, but {full[0]} is put together of {len(there.rows)} parts of {there.file}, which do "
                    "not lie together there; use host: shared",
                    "offload.host",
                )
            if there is not None and there.packed:
                raise ConfigError(
                    f"found mmap, but {there.file} is packed, and what computes does not lie in it; use host: shared",
                    "offload.host",
                )
            if there is not None and there.dtype != entry.dtype:
                raise ConfigError(
                    f"found mmap, but {full[0]} is stored as {there.dtype} and held as {entry.dtype}: bytes "
                    "from the page cache cannot be converted; use host: shared, or the dtype that is stored",
                    "offload.host",
                )
