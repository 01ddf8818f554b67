"""Writing a checkpoint whose transformers are encoded, from which a run starts without encoding (`packed_parts`)."""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from crossdock.offload.codecs.packed import PACKED, PackedAs, metadata_of, pack, packed_bytes
from crossdock.offload.codecs.part_format import IncompressibleError
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import (
    PICKLED,
    StoredTensor,
    component_names,
    read_model_index,
    stored_tensors,
    variant_of,
)
from crossdock.runtime.models.transformers import transformer_names
from crossdock.runtime.rank.weights.packed_parts import packed_digest
from crossdock.runtime.rank.weights.source import WeightSource

_FILE_BYTES = 2 * 2**30
"""Of one file that is written: what is in memory at once."""
_NAME = "diffusion_pytorch_model"
_WEIGHTS = (".safetensors", ".gguf", ".onnx", *PICKLED)

Tell = Callable[[str, int, int], None]
"""Gets what is done, and of how many bytes it is done, and of how many in all."""


def pack_checkpoint(model_dir: Path, out: Path, transformers: Sequence[str], tell: Tell) -> tuple[int, int]:
    """Write a packed copy of a model; its transformers' bytes before and after.

    Args:
        out: an empty directory.
        transformers: what the family calls them.

    Raises:
        CheckpointError: the model is incomplete, or has nothing to encode; or the disk is full.
        OSError: a file cannot be written.
    """
    components = component_names(read_model_index(model_dir))
    names = transformer_names(transformers, components)
    variant = variant_of([model_dir / name for name in components if (model_dir / name).is_dir()])
    stored = {name: stored_tensors(model_dir / name, variant) for name in names}
    _check(model_dir, stored)
    _copy_the_rest(model_dir, out, components, names)
    packed = [_pack_component(out / name, stored[name], tell) for name in names]
    before, after = (sum(sizes) for sizes in zip(*packed, strict=True))
    return before, after


def _check(model_dir: Path, stored: Mapping[str, Mapping[str, StoredTensor]]) -> None:
    tensors = [tensor for each in stored.values() for tensor in each.values()]
    if any(tensor.packed for tensor in tensors):
        raise CheckpointError(f"{model_dir}: is packed already")
    if not any(packed_bytes(tensor.dtype, _values(tensor)) for tensor in tensors):
        dtypes = sorted({str(tensor.dtype).removeprefix("torch.") for tensor in tensors})
        raise CheckpointError(
            f"{model_dir}: its transformer is in {', '.join(dtypes)}, which does not get smaller; pack one in bfloat16"
        )


def _copy_the_rest(model_dir: Path, out: Path, components: Sequence[str], transformers: Sequence[str]) -> None:
    """All but the transformers' weights, and but weights that lie beside the components."""
    for name in set(components) - set(transformers):
        if (model_dir / name).is_dir():
            shutil.copytree(model_dir / name, out / name)
    for folder in ("", *transformers):
        (out / folder).mkdir(exist_ok=True)
        for path in (model_dir / folder).iterdir():
            if path.is_file() and path.suffix not in _WEIGHTS and ".safetensors." not in path.name:  # their index
                shutil.copyfile(path, out / folder / path.name)


@dataclass(frozen=True)
class _Packed:
    """One tensor as it is written. `told`: what it decodes to, where it is encoded."""

    name: str
    tensor: Tensor
    told: PackedAs | None


def _pack_component(folder: Path, stored: Mapping[str, StoredTensor], tell: Tell) -> tuple[int, int]:
    """Bytes before and after."""
    total, done, written = sum(map(_nbytes, stored.values())), 0, 0
    source, files = WeightSource(stored), _files(stored)
    where: dict[str, str] = {}
    with ThreadPoolExecutor(os.cpu_count()) as pool:
        for number, names in enumerate(files, 1):
            file = f"{_NAME}-{number:05}-of-{len(files):05}.safetensors"
            tensors, told = {}, {}
            for packed in _in_turn(pool, [(name, source.rows(name), stored[name]) for name in names]):
                tensors[packed.name], where[packed.name] = packed.tensor, file
                if packed.told is not None:
                    told[packed.name] = packed.told
                done += _nbytes(stored[packed.name])
                tell(f"packing {folder.name}", done, total)
            metadata = {"format": "pt"} | ({PACKED: json.dumps(metadata_of(told))} if told else {})
            try:
                save_file(tensors, folder / file, metadata)
            except SafetensorError as error:
                raise CheckpointError(f"{folder / file}: cannot be written: {error}; is the disk full?") from None
            written += (folder / file).stat().st_size
    index = {"metadata": {"total_size": written}, "weight_map": where}
    (folder / f"{_NAME}.safetensors.index.json").write_text(json.dumps(index, indent=2), encoding="utf-8")
    return total, written


def _in_turn(pool: ThreadPoolExecutor, given: Sequence[tuple[str, Tensor, StoredTensor]]) -> Iterator[_Packed]:
    """As many at once as there are cores: a tensor is in memory several times while it is encoded."""
    rest = iter(given)
    running = [pool.submit(_pack_one, *one) for one in islice(rest, os.cpu_count() or 1)]
    while running:
        yield running.pop(0).result()
        running += [pool.submit(_pack_one, *one) for one in islice(rest, 1)]


def _pack_one(name: str, tensor: Tensor, stored: StoredTensor) -> _Packed:
    tensor = tensor.contiguous()
    if packed_bytes(stored.dtype, _values(stored)) is not None:
        with suppress(IncompressibleError):
            digest = packed_digest(tensor.reshape(-1).view(torch.uint8))
            return _Packed(name, pack(tensor), PackedAs(stored.dtype, stored.shape, digest))
    return _Packed(name, tensor, None)


def _files(stored: Mapping[str, StoredTensor]) -> list[list[str]]:
    """What goes into each file."""
    files, size = [list[str]()], 0
    for name, tensor in stored.items():
        nbytes = packed_bytes(tensor.dtype, _values(tensor)) or _nbytes(tensor)
        if files[-1] and size + nbytes > _FILE_BYTES:
            files.append([])
            size = 0
        files[-1].append(name)
        size += nbytes
    return files


def _values(tensor: StoredTensor) -> int:
    return torch.Size(tensor.shape).numel()


def _nbytes(tensor: StoredTensor) -> int:
    return _values(tensor) * tensor.dtype.itemsize
