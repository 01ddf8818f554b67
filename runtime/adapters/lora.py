"""LoRA: low-rank changes of a transformer's linear layers, merged into their weights as these are read.

"LoRA" (Hu et al., 2021, arXiv:2106.09685): in place of W computes W + s * alpha / r * B A, where A is `[r, in]` and B
`[out, r]`. The spellings of kohya's trainer, ComfyUI and others are read by diffusers' converters. Nothing is held
beside the merged weight: what a run needs of memory and time is what it needs without.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from crossdock.runtime.config.bounded_files import parse_json, printable, read_bounded
from crossdock.runtime.errors import ConfigError
from crossdock.runtime.models.checkpoint import MAX_TENSORS, open_weights
from crossdock.runtime.models.diffusers_api import lora_converter

_ROWS = 512
"""Of a change, that are computed at once: always the same, so that a row is the same whoever computes it, and when."""
_CONFIG = "adapter_config.json"
"""What PEFT writes beside the weights."""
_CONFIG_BYTES = 2**20
_METADATA = "lora_adapter_metadata"
"""Where diffusers keeps the same, in the file's metadata."""
_A, _B, _ALPHA = ".lora_A.weight", ".lora_B.weight", ".alpha"
_OTHER_KINDS = {
    "dora_scale": "DoRA",
    "lora_magnitude_vector": "DoRA",
    "lokr_": "LoKr",
    "hada_": "LoHa",
    ".lora_A.bias": "biases",
    ".lora_B.bias": "biases",
}


@dataclass(frozen=True)
class LowRank:
    """The change of one weight: `scale` * `b` `a`; `[out, r]` and `[r, in]`."""

    a: Tensor
    b: Tensor
    scale: float

    def rows(self, first: int, last: int) -> Tensor:
        """Rows [first, last) of the change; float32."""
        offset, a = first // _ROWS * _ROWS, self.a.float()
        found = [self.b[start : start + _ROWS].float() @ a for start in range(offset, max(last, first + 1), _ROWS)]
        return torch.cat(found)[first - offset : last - offset] * self.scale


@dataclass(frozen=True)
class Lora:
    """An adapter of a run; every rank reads the file for itself.

    Attributes:
        prefix: what the names of its transformer's tensors begin with in the model.
        component: what the transformer is called in the pipeline.
        pipeline: class of diffusers, whose converter reads the file.
        targets: the weights that it changes.
        stamp: size and time of the file when it was planned.
    """

    file: Path
    scale: float
    prefix: str
    component: str
    pipeline: str
    targets: frozenset[str]
    stamp: tuple[int, int]


def planned_lora(
    path: str, scale: float, key: str, component: str, prefix: str, pipeline: str, transformer: nn.Module
) -> Lora:
    """An adapter that fits.

    Args:
        path: the file, or a directory that has one.
        key: of the config, for messages.
        transformer: on meta, whole.

    Raises:
        ConfigError: it cannot be read, or does not fit; the first tensor that does not is named.
    """
    file = _the_file(Path(path), key)
    changes = _read(file, key, pipeline, component)
    for module, change in changes.items():
        _check_fits(file, key, module, change, transformer)
    stat = file.stat()
    targets = frozenset(f"{prefix}{module}.weight" for module in changes)
    return Lora(file.resolve(), scale, prefix, component, pipeline, targets, (stat.st_size, stat.st_mtime_ns))


def _the_file(path: Path, key: str) -> Path:
    if path.is_dir():
        there = sorted(path.glob("*.safetensors"))
        if len(there) != 1:
            found = ", ".join(printable(file.name[:100]) for file in there[:3]) or "none"
            raise ConfigError(f"{path}: found {found}; give the one .safetensors file of the adapter", key)
        return there[0]
    if not path.is_file():
        raise ConfigError(f"{path}: no such file; give a LoRA's .safetensors file, or the directory that has it", key)
    if path.suffix != ".safetensors":
        raise ConfigError(f"{path}: is no .safetensors file; others are never read (pickles run code)", key)
    return path


def _read(file: Path, key: str, pipeline: str, component: str) -> dict[str, LowRank]:
    """Path of a module in the transformer -> its change.

    Raises:
        ConfigError: it is no LoRA, or of a kind or a spelling that is not read.
    """
    try:
        with open_weights(file) as opened:
            names = list(opened.keys())
            if len(names) > MAX_TENSORS:
                raise ConfigError(f"{file}: holds {len(names)} tensors; no adapter has more than {MAX_TENSORS}", key)
            for name in names:
                if kind := next((kind for part, kind in _OTHER_KINDS.items() if part in name), None):
                    raise ConfigError(f"{file}: {printable(name[:200])}: {kind} is not read; only LoRA is", key)
            state = {name: opened.get_tensor(name) for name in names}
            metadata = opened.metadata() or {}
    except (SafetensorError, OSError) as error:
        raise ConfigError(f"{file}: not a whole safetensors file: {str(error)[:300]}; download it again", key) from None
    told = _told(file, key, metadata, component)
    state, alphas = _converted(file, key, state, pipeline, component)
    return _pairs(file, key, state, alphas, told)


def _converted(
    file: Path, key: str, state: dict[str, Tensor], pipeline: str, component: str
) -> tuple[dict[str, Tensor], dict[str, float]]:
    """In PEFT's names, without the component's; and the alphas that were beside them."""
    if all(name.startswith("base_model.model.") for name in state):  # PEFT's own file of the transformer
        state = {f"{component}.{name.removeprefix('base_model.model.')}": tensor for name, tensor in state.items()}
    alphas: dict[str, float] = {}
    if not all(name.startswith(f"{component}.") and name.endswith((_A, _B)) for name in state):
        convert = lora_converter(pipeline)
        if convert is None:
            first = printable(next(iter(state), "nothing")[:200])
            raise ConfigError(
                f"{file}: {first}: diffusers reads no LoRA for {pipeline} in other names than its own", key
            )
        try:
            state, alphas = convert(state)
        except Exception as error:  # whatever a converter may raise where names are others
            what = f"{type(error).__name__}: {printable(str(error)[:200])}"
            raise ConfigError(f"{file}: is no LoRA that diffusers reads for {pipeline} ({what})", key) from None
    for name in [name for name in state if name.endswith(_ALPHA)]:
        tensor = state.pop(name)
        alphas[name] = float(tensor) if tensor.numel() == 1 else math.nan
    other = "transformer_2" if component == "transformer" else "transformer"
    begin = f"{component}." if any(name.startswith(f"{component}.") for name in state) else f"{other}."
    found = {}
    for name, tensor in state.items():
        if name.startswith(("text_encoder", "llm_adapter")):
            raise ConfigError(f"{file}: {printable(name[:200])}: changes a text encoder, which is not done yet", key)
        found[name.removeprefix(begin)] = tensor
    return found, {name.removeprefix(begin): alpha for name, alpha in alphas.items()}


def _told(file: Path, key: str, metadata: Mapping[str, str], component: str) -> Mapping[str, Any]:
    """What the file, or PEFT's config beside it, says of ranks and alphas."""
    try:
        if _METADATA in metadata:
            told = parse_json(metadata[_METADATA])
            begin = f"{component}."
            return {name.removeprefix(begin): value for name, value in told.items() if name.startswith(begin)}
        config = file.parent / _CONFIG
        told = parse_json(read_bounded(config, _CONFIG_BYTES).decode()) if config.is_file() else {}
        return told if isinstance(told, dict) else {}
    except (ValueError, OSError, AttributeError) as error:
        raise ConfigError(f"{file}: what says its alphas cannot be read: {printable(str(error)[:200])}", key) from None


def _pairs(
    file: Path, key: str, state: Mapping[str, Tensor], alphas: Mapping[str, float], told: Mapping[str, Any]
) -> dict[str, LowRank]:
    modules = dict.fromkeys(name.removesuffix(_A).removesuffix(_B) for name in state)
    if not modules:
        raise ConfigError(f"{file}: holds no LoRA", key)
    if told.get("use_dora") or told.get("lora_bias"):
        raise ConfigError(f"{file}: is told to be DoRA, or to have biases; only LoRA is read", key)
    found = {}
    for module in modules:
        a, b = state.get(module + _A), state.get(module + _B)
        if a is None or b is None:
            missing = f"{module}{_A if a is None else _B}"
            raise ConfigError(
                f"{file}: {printable(missing[:200])}: is not there, or the name is not one of a LoRA", key
            )
        if a.dim() != 2 or b.dim() != 2 or a.shape[0] != b.shape[1] or not a.is_floating_point():
            shapes = f"{list(a.shape)} and {list(b.shape)} of {a.dtype}"
            raise ConfigError(f"{file}: {printable(module[:200])}: found {shapes}; expected [r, in] and [out, r]", key)
        found[module] = LowRank(a.clone(), b.clone(), _scale(file, key, module, len(a), alphas, told))
    return found


def _scale(file: Path, key: str, module: str, rank: int, alphas: Mapping[str, float], told: Mapping[str, Any]) -> float:
    """alpha / r, where an alpha is told."""
    alpha = alphas.get(module + _ALPHA, told.get("lora_alpha"))
    patterns = told.get("alpha_pattern")
    if isinstance(patterns, dict):
        alpha = next((value for name, value in patterns.items() if f".{module}".endswith(f".{name}")), alpha)
    if alpha is None:
        return 1.0
    if not isinstance(alpha, int | float) or not math.isfinite(alpha):
        raise ConfigError(f"{file}: {printable(module[:200])}: its alpha is {str(alpha)[:50]}", key)
    return float(alpha) / (math.sqrt(rank) if told.get("use_rslora") else rank)


def _check_fits(file: Path, key: str, module: str, change: LowRank, transformer: nn.Module) -> None:
    kind = type(transformer).__name__
    try:
        linear = transformer.get_submodule(module)
    except AttributeError:
        raise ConfigError(f"{file}: {printable(module[:200])}: {kind} has no such module", key) from None
    if not isinstance(linear, nn.Linear):
        raise ConfigError(
            f"{file}: {module}: is a {type(linear).__name__} of {kind}; only linear layers are changed", key
        )
    change_shape = (len(change.b), change.a.shape[1])
    if tuple(linear.weight.shape) != change_shape:
        raise ConfigError(
            f"{file}: {module}: changes a weight of {list(change_shape)}, and that of {kind} is "
            f"{list(linear.weight.shape)}; is it for another model?",
            key,
        )


class Changes:
    """What a run's adapters change, read when it is first asked for."""

    def __init__(self, loras: Sequence[Lora] = ()) -> None:
        self._loras = loras
        self._targets = frozenset[str]().union(*(lora.targets for lora in loras))

    def __contains__(self, fqn: str) -> bool:
        return fqn in self._targets

    def rows(self, fqn: str, first: int, last: int) -> Tensor:
        """Rows [first, last) of the change of a weight; float32.

        Raises:
            ConfigError: a file is not the one that the run was planned with.
        """
        change: Tensor | None = None
        for scale, found in self._read:
            if (one := found.get(fqn)) is not None:
                rows = one.rows(first, last) * scale
                change = rows if change is None else change + rows
        assert change is not None
        return change

    @cached_property
    def _read(self) -> list[tuple[float, dict[str, LowRank]]]:
        found = []
        for lora in self._loras:
            stat = lora.file.stat() if lora.file.is_file() else None
            if stat is None or (stat.st_size, stat.st_mtime_ns) != lora.stamp:
                raise ConfigError(f"{lora.file}: is not there, or not what it was when the run was planned", "loras")
            changes = _read(lora.file, "loras", lora.pipeline, lora.component)
            found.append((lora.scale, {f"{lora.prefix}{module}.weight": one for module, one in changes.items()}))
        return found


def described(loras: Sequence[Lora]) -> list[dict[str, object]]:
    """For the report."""
    return [{"file": str(lora.file), "scale": lora.scale, "weights": len(lora.targets)} for lora in loras]
