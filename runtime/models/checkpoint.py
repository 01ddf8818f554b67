"""Reading a diffusers model directory: what is in it, and whether it is whole.

Format: https://github.com/huggingface/safetensors#format; sharded files with an index as written by diffusers.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import torch
from safetensors import SafetensorError, safe_open
from torch import nn

from crossdock.offload.codecs.packed import PACKED, packed_in
from crossdock.runtime.config.bounded_files import parse_json, printable, read_bounded
from crossdock.runtime.errors import CheckpointError

_DTYPES: dict[str, torch.dtype] = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}

MAX_JSON_BYTES = 16 * 2**20
"""The largest JSON files of published checkpoints that are read here are indices of weights, with 9 MB."""
MAX_TENSORS = 50_000
"""Of one file."""
_MAX_NAME = 200
WEIGHT_NAMES = ("diffusion_pytorch_model", "model")
"""What diffusers and transformers call files with weights."""
_VARIANT = re.compile(rf"(?:{'|'.join(WEIGHT_NAMES)})\.(?:(\w+)\.safetensors|safetensors\.index\.(\w+)\.json)")
MODULAR_INDEX = "modular_model_index.json"
"""What a pipeline that is made of blocks has in place of model_index.json."""


class Rows(NamedTuple):
    """Rows [first, last) of what a file calls `name`, which has `of` rows."""

    name: str
    first: int
    last: int
    of: int


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor is stored, and as what; `name` is what its file calls it.

    Attributes:
        rows: what it is put together of, along dim 0, where it is not a tensor of the file as a whole.
        packed: where it is stored as `crossdock pack` encodes it, the digest of what it decodes to.
    """

    file: Path
    name: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    rows: tuple[Rows, ...] = ()
    packed: str = ""


def read_json(path: Path, limit_bytes: int = MAX_JSON_BYTES) -> dict[str, Any]:
    """A JSON object from `path`.

    Raises:
        CheckpointError: missing, unreadable, too large, not JSON, or not an object.
    """
    try:
        content = parse_json(read_bounded(path, limit_bytes).decode("utf-8"))
    except FileNotFoundError:
        raise CheckpointError(f"{path}: no such file; a diffusers model directory has one") from None
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: cannot be read as JSON: {error}") from None
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, expected a JSON object")
    return content


def read_model_index(model_dir: Path) -> dict[str, Any]:
    """`model_index.json` of a diffusers pipeline, or what stands for it where a pipeline is made of blocks.

    Raises:
        CheckpointError: no such directory, or not a diffusers pipeline.
    """
    if not model_dir.is_dir():
        raise CheckpointError(f"{model_dir}: no such directory; give a diffusers model directory")
    file = index_file(model_dir)
    index = read_json(file)
    if not isinstance(index.get("_class_name"), str):
        raise CheckpointError(f"{file}: has no _class_name that is a string; is this a diffusers pipeline?")
    if file.name == MODULAR_INDEX:
        index = _own_components(index, model_dir)
    for name, value in index.items():
        if not isinstance(value, list) and name.isidentifier() and (model_dir / name[:_MAX_NAME]).is_dir():
            raise CheckpointError(f"{file}: {name}: found {str(value)[:100]!r}; expected a library and a class")
    for name in component_names(index):
        if not name.isidentifier() or len(name) > _MAX_NAME:
            raise CheckpointError(f"{file}: {name[:100]!r} is no name of a component")
        if not all(isinstance(part, str) for part in index[name]):
            raise CheckpointError(f"{file}: {name}: found {str(index[name])[:100]}; expected a library and a class")
    return index


def index_file(model_dir: Path) -> Path:
    """The file that lists the components."""
    modular = model_dir / MODULAR_INDEX
    return modular if modular.exists() else model_dir / "model_index.json"


def _own_components(index: Mapping[str, Any], model_dir: Path) -> dict[str, Any]:
    """Without the components that lie in other repositories, which say where they are to be loaded from."""
    listed = {name: value for name, value in index.items() if not (isinstance(value, list) and len(value) == 3)}
    own = {name: index[name][:2] for name in index.keys() - listed.keys() if (model_dir / name).is_dir()}
    return {**listed, **own}


def component_names(index: Mapping[str, object]) -> list[str]:
    """The pipeline's components that have files of their own."""
    return [
        name
        for name, value in index.items()
        if not name.startswith("_") and isinstance(value, list) and len(value) == 2 and value[0] is not None
    ]


def check_components(
    model_dir: Path,
    index: Mapping[str, Any],
    placed: Sequence[str],
    variant: str | None = None,
    elsewhere: Collection[str] = (),
) -> None:
    """Every component has its folder, and none of its files with weights is truncated; headers only are read.

    Args:
        placed: the components with weights that crossdock puts on the devices.
        elsewhere: those of them whose weights are not in their folders.
        variant: of these files, where a component has such.

    Raises:
        CheckpointError: names the folder or the file, or a component that has weights and no place on the device.
    """
    listed = index_file(model_dir).name
    for name in component_names(index):
        folder = model_dir / name
        library, class_name = index[name]
        if name not in placed and _is_module(folder, library, class_name):
            raise CheckpointError(
                f"{folder}: the component {name!r} ({class_name}) has weights, and crossdock places only "
                f"{', '.join(placed)}: it would lie whole on the device, outside the budget; if the pipeline runs "
                f"without it, set it to [null, null] in {listed}"
            )
        if not folder.is_dir():
            raise CheckpointError(f"{folder}: no such folder, but {listed} lists the component {name!r}")
        for file in weight_files(folder, variant) if name in placed and name not in elsewhere else ():
            tensors_in(file)


def component_class(library: object, class_name: object) -> type | None:
    """The class that model_index.json names; None: there is no such class.

    Args:
        library: diffusers, transformers, or the part of diffusers' pipelines that has components of its own.
    """
    own = library in ("diffusers", "transformers")
    if not (own or str(library).isidentifier()) or not str(class_name).isidentifier():
        return None
    with suppress(ImportError):
        found = getattr(
            importlib.import_module(str(library) if own else f"diffusers.pipelines.{library}"), str(class_name), None
        )
        return found if isinstance(found, type) else None
    return None


def _is_module(folder: Path, library: object, class_name: object) -> bool:
    """Whether a component is an `nn.Module`; where its class is not to be found, whether it has weights."""
    found = component_class(library, class_name)
    if found is not None:
        return issubclass(found, nn.Module)
    return any(file.suffix in (".safetensors", ".bin", ".pt", ".pth") for file in folder.glob("*"))


def stored_tensors(component_dir: Path, variant: str | None = None) -> dict[str, StoredTensor]:
    """fqn -> where it is stored, for one component, but for what is of an unknown dtype; headers only are read.

    Raises:
        CheckpointError: see `weight_files`; a file is missing or truncated.
    """
    found: dict[str, StoredTensor] = {}
    for file in weight_files(component_dir, variant):
        found |= tensors_in(file)
    return found


def weight_files(component_dir: Path, variant: str | None = None) -> list[Path]:
    """The files that diffusers and transformers read of a component, whatever else lies beside them: those of `variant`
    if there are any, else those of none. By another name they would not be found: it may only be one that lies alone.

    Raises:
        CheckpointError: no safetensors files, or several of which none has the name; an index that is damaged.
    """
    for kind in dict.fromkeys((variant, None)):
        if (named := named_files(component_dir, kind)) is not None:
            return named
    if not (there := sorted(component_dir.glob("*.safetensors"))):
        raise CheckpointError(
            f"{component_dir}: holds no safetensors files, and others are never read{_way_out(component_dir)}"
        )
    if len(there) > 1:
        found = ", ".join(printable(file.name[:100]) for file in there[:3])
        names = " or ".join(f"{name}.safetensors" for name in WEIGHT_NAMES)
        raise CheckpointError(f"{component_dir}: found {found}, no index and no {names}; which is the model's?")
    return there


def _way_out(component_dir: Path) -> str:
    others = sorted(component_dir.iterdir())
    if gguf := next((file for file in others if file.suffix == ".gguf"), None):
        return f" ({printable(gguf.name[:100])}); {out_of_gguf(str(gguf))}"
    if pickled := next((file for file in others if file.suffix in PICKLED), None):
        return f" ({printable(pickled.name[:100])}); {out_of_pickle(str(component_dir.parent))}"
    return "; download them as well"


PICKLED = (".bin", ".ckpt", ".pt", ".pth")


def out_of_pickle(model: str) -> str:
    """How a pipeline, a directory or a hub id, becomes one that is read."""
    load = (
        f"from diffusers import DiffusionPipeline as P; P.from_pretrained('{printable(model)}').save_pretrained('DIR')"
    )
    return f'where you trust its publisher (pickles run code), convert it: python -c "{load}", and give DIR'


def out_of_gguf(file: str, transformer: str = "TRANSFORMER") -> str:
    """How a transformer, a file or an address of the hub, becomes one that is read."""
    load = (
        f"import torch; from diffusers import {transformer} as T, GGUFQuantizationConfig as Q; b = torch.bfloat16; "
        f"m = T.from_single_file('{printable(file)}', quantization_config=Q(compute_dtype=b), torch_dtype=b); "
        "m.dequantize(); m.save_pretrained('DIR/transformer')"
    )
    which = ", TRANSFORMER being its class" if transformer == "TRANSFORMER" else ""
    return f'convert it{which}: python -c "{load}", with the rest of the pipeline beside it in DIR'


def named_files(component_dir: Path, variant: str | None) -> list[Path] | None:
    """By their names, in the order in which the libraries look for them; None: there are none."""
    kind = "" if variant is None else f".{variant}"
    for name in WEIGHT_NAMES:
        one, index = (
            component_dir / f"{name}{kind}.safetensors",
            component_dir / f"{name}.safetensors.index{kind}.json",
        )
        if index.is_file() and not (name == "model" and one.is_file()):
            return _files_of_index(index)
        if one.is_file():
            return [one]
    return None


def variant_of(folders: Sequence[Path]) -> str | None:
    """Which files have to be asked for, as some component has no others: `fp16` of `model.fp16.safetensors`.

    Raises:
        CheckpointError: there are several of which it could be.
    """
    lacking = [folder for folder in folders if named_files(folder, None) is None]
    matches = [[found for file in folder.iterdir() if (found := _VARIANT.fullmatch(file.name))] for folder in lacking]
    offered = [{found[1] or found[2] for found in each} for each in matches if each]
    if not offered:
        return None
    common = sorted(set.intersection(*offered))
    if len(common) != 1:
        every = ", ".join(sorted(set.union(*offered)))
        raise CheckpointError(
            f"{lacking[0]}: has variants of its files ({every}); leave one, the same for all components"
        )
    return common[0]


def _files_of_index(file: Path) -> list[Path]:
    """The files that an index of weights names, which lie beside it.

    Raises:
        CheckpointError: it names none, or something else.
    """
    weight_map = read_json(file).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{file}: weight_map: found a {type(weight_map).__name__}; expected names of files")
    for fqn, name in weight_map.items():
        if not isinstance(name, str) or Path(name).name != name or "\0" in name or len(name) > _MAX_NAME:
            raise CheckpointError(
                f"{file}: weight_map: {printable(fqn[:200])}: found {str(name)[:100]!r}; expected a file beside it"
            )
    return [file.parent / name for name in sorted(set(weight_map.values()))]


def tensors_in(file: Path) -> dict[str, StoredTensor]:
    """What one file has, by its own names, but for what is of an unknown dtype; the header only is read.

    Raises:
        CheckpointError: it is missing or truncated.
    """
    if not file.is_file():
        raise CheckpointError(f"{file}: no such file; where an index lists it, download the checkpoint again")
    try:
        with open_weights(file) as opened:
            return stored_in(file, opened)
    except (SafetensorError, OSError) as error:
        size = file.stat().st_size
        raise CheckpointError(
            f"{file}: not a whole safetensors file ({size} bytes): {str(error)[:500]}; download the file again"
        ) from None


def open_weights(file: Path) -> Any:
    """A safetensors file, mapped; its header is checked: every tensor has its bytes.

    Raises:
        SafetensorError, OSError: it is none, or not whole.
    """
    return safe_open(file, framework="pt")


def stored_in(file: Path, opened: Any) -> dict[str, StoredTensor]:
    """What an opened file has, by the names that it uses; but for what is of an unknown dtype.

    Raises:
        CheckpointError: more than any model has.
    """
    if (count := len(opened.keys())) > MAX_TENSORS:
        raise CheckpointError(f"{file}: holds {count} tensors; no file of a model has more than {MAX_TENSORS}")
    slices = {name: opened.get_slice(name) for name in opened.keys()}  # noqa: SIM118 (not a mapping)
    found = {
        name: StoredTensor(file, name, dtype, tuple(part.get_shape()))
        for name, part in slices.items()
        if (dtype := _DTYPES.get(part.get_dtype())) is not None
    }
    packed = (opened.metadata() or {}).get(PACKED)
    return found if packed is None else found | _unpacked(file, packed, found)


def _unpacked(file: Path, metadata: str, found: Mapping[str, StoredTensor]) -> dict[str, StoredTensor]:
    """Of a packed file, what its packed tensors decode to.

    Raises:
        CheckpointError: it does not have the bytes that this takes.
    """
    try:
        packed = packed_in(parse_json(metadata), {name: each.shape for name, each in found.items()})
    except ValueError as error:
        raise CheckpointError(f"{file}: not what pack writes: {printable(str(error)[:200])}; pack it again") from None
    return {name: StoredTensor(file, name, each.dtype, each.shape, packed=each.digest) for name, each in packed.items()}


def check_tensors(model: nn.Module, stored: Mapping[str, StoredTensor], folder: Path) -> None:
    expected = {fqn: tuple(tensor.shape) for fqn, tensor in model.state_dict().items()}
    if missing := [fqn for fqn in expected if fqn not in stored]:
        more = f" (and {len(missing) - 1} more)" if len(missing) > 1 else ""
        raise CheckpointError(
            f"{folder}: the tensor {missing[0]} is missing, or of an unknown dtype{more}; is the download complete?"
        )
    for fqn, shape in expected.items():
        if stored[fqn].shape != shape:
            raise CheckpointError(
                f"{stored[fqn].file}: {fqn} has shape {list(stored[fqn].shape)}, but config.json asks for {list(shape)}"
            )
