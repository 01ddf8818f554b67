"""Which files of a repository a run reads: of the components that are used, settings, words, and one set of weights."""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable, Mapping
from pathlib import PurePosixPath
from typing import Any, NamedTuple

from crossdock.runtime.config.bounded_files import printable
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import MODULAR_INDEX, PICKLED, WEIGHT_NAMES, out_of_gguf, out_of_pickle
from crossdock.runtime.models.spec import ModelSpec

INDICES = ("model_index.json", MODULAR_INDEX)
_DATA = (".json", ".jinja", ".model", ".txt")
"""Settings, templates and words: none of them is code."""
_OTHERS = (*PICKLED, ".gguf", ".h5", ".msgpack", ".onnx", ".pb")
_VARIANTS = ("", "bf16", "fp16", "fp32")
"""In the order in which they are taken, before all others."""
_SHARD = r"-\d{5}-of-\d{5}"
_WEIGHTS = re.compile(rf"(.+?)(?:\.(\w+))?({_SHARD})?(?:\.(\w+))?\.safetensors", re.ASCII)
_PATH = re.compile(r"(?:\w[\w.-]*/)*\w[\w.-]*", re.ASCII)


def index_of(repo: str, files: Collection[str]) -> str:
    """The file that lists the components.

    Raises:
        CheckpointError: there is none.
    """
    if found := next((name for name in INDICES if name in files), None):
        return found
    what = f"{repo}: has no {INDICES[0]}: it is no pipeline in the diffusers format"
    if gguf := next((name for name in files if name.endswith(".gguf")), None):
        raise CheckpointError(
            f"{what}, but GGUF ({printable(gguf)}), which is not read; {out_of_gguf(_address(repo, gguf))}"
        )
    raise CheckpointError(f"{what}; name a repository that has one")


def wanted_files(
    repo: str, files: Collection[str], index: Mapping[str, Any], spec: ModelSpec, without: Collection[str] = ()
) -> list[str]:
    """Of `files`, paths in the repository, those that a run reads beside the index.

    Args:
        without: components whose weights it does not read.

    Raises:
        CheckpointError: a component is not there, or its weights are in a format that is not read.
    """
    wanted = []
    for name, entry in index.items():
        if name.startswith("_") or name in spec.unused or not isinstance(entry, list) or not entry or not entry[0]:
            continue
        inside = [path for path in files if path.startswith(f"{name}/") and _PATH.fullmatch(path)]
        if not inside and len(entry) > 2:  # it lies in another repository
            continue
        if not inside:
            raise CheckpointError(f"{repo}: has no folder {printable(name[:100])}, but its index lists that component")
        weights: list[str] = []
        if name in {*spec.transformers, *spec.encoders, *spec.decoders} - {*without}:
            weights = _weights(repo, name, inside)
        wanted += weights + [path for path in inside if path.endswith(_DATA) and ".index." not in path]
    return sorted(wanted)


class _Weights(NamedTuple):
    path: str
    stem: str
    variant: str
    shard: bool


def _weights(repo: str, component: str, inside: Iterable[str]) -> list[str]:
    """One variant of a component's weights, whole or in shards, with the shards' index."""
    inside = [path for path in inside if path.count("/") == 1]
    found = [weights for path in inside if (weights := _parse(path)) is not None]
    if not found:
        other = next((path for path in inside if path.endswith(_OTHERS)), None)
        what = f"{repo}: {component}: holds no safetensors files"
        if other is None:
            raise CheckpointError(f"{what}, nor other weights; name another repository")
        how = out_of_gguf(_address(repo, other)) if other.endswith(".gguf") else out_of_pickle(repo)
        raise CheckpointError(f"{what}, but {printable(other)}, which is never read; {how}")
    if known := [weights for weights in found if weights.stem in WEIGHT_NAMES]:
        variants = {weights.variant for weights in known}
        variant = next((each for each in _VARIANTS if each in variants), min(variants))
        found = [weights for weights in known if weights.variant == variant]
        suffix = f".{variant}" if variant else ""
        index = [
            path for stem in WEIGHT_NAMES if (path := f"{component}/{stem}.safetensors.index{suffix}.json") in inside
        ]
        shards = [weights for weights in found if weights.shard]
        if index and shards:
            return index + [weights.path for weights in shards]
        found = [weights for weights in found if not weights.shard] or found
    return [weights.path for weights in found]


def _parse(path: str) -> _Weights | None:
    found = _WEIGHTS.fullmatch(PurePosixPath(path).name)
    return _Weights(path, found[1], found[2] or found[4] or "", found[3] is not None) if found else None


def _address(repo: str, path: str) -> str:
    return f"https://huggingface.co/{repo}/blob/main/{path}"
