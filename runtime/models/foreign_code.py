"""A checkpoint brings weights and settings, never code: whatever could make a library run some is refused, by file.

Ways that a checkpoint has: `auto_map` in any config makes transformers ask on standard input whether to import the
checkpoint's modules, and take a `y` that happens to be there; a component may name a module of the checkpoint or of
another package, or a pipeline with components of its own; an attention implementation may name a repository of
kernels; an adapter names another model. Templates of chats are rendered in transformers' sandbox.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Iterator, Mapping
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any

import diffusers
import transformers
from torch import nn

from crossdock.runtime.config.bounded_files import check_regular, printable, walk
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.build_limits import TooLargeError, check_counts
from crossdock.runtime.models.checkpoint import (
    component_class,
    component_names,
    index_file,
    read_json,
    read_model_index,
    variant_of,
)

CODE_KEYS = ("auto_map", "custom_pipeline", "custom_pipelines", "custom_generate")
OTHER_FILES = "configuration_files"
"""transformers reads one of these in place of config.json."""
_MAX_FILES = 1000
KERNEL_WORDS = ("attn_implementation", "experts_implementation", "kernel_config")
_STRAY = "None.py"
"""The code of the custom pipeline that is called what diffusers was given: None."""
_ADAPTER = "adapter_config.json"
_DATA = ("tokenizer.json", "vocab.json", "added_tokens.json", "special_tokens_map.json")
"""Words, read by the tokenizers library; no class is chosen by them."""
_INDICES = re.compile(r".*\.(safetensors|bin)\.index(\.\w+)?\.json")
_KINDS: tuple[Callable[[], type], ...] = (
    lambda: diffusers.SchedulerMixin,
    lambda: diffusers.ModelMixin,
    lambda: transformers.PreTrainedTokenizerBase,
    lambda: transformers.PreTrainedModel,
    lambda: transformers.ProcessorMixin,
    lambda: transformers.FeatureExtractionMixin,
    lambda: transformers.image_processing_base.ImageProcessingMixin,
    lambda: diffusers.guiders.guider_utils.BaseGuidance,
)
"""What a component is; imported when it is asked for. None of them chooses another class to load by what a file says,
but for a processor's parts."""


def refuse_foreign_code(model_dir: Path, index: Mapping[str, Any]) -> None:
    """
    Raises:
        CheckpointError: something in the checkpoint would have a library run code that is not its own.
    """
    if (stray := model_dir / _STRAY).exists():
        raise CheckpointError(f"{stray}: diffusers takes it for a pipeline's code, which is never run; remove it")
    _check_keys(index_file(model_dir), index)
    for name in component_names(index):
        folder = model_dir / name
        library, class_name = index[name]
        _check_class(name, library, class_name, model_dir)
        files = list(islice(folder.rglob("*"), _MAX_FILES + 1)) if folder.is_dir() else []
        if len(files) > _MAX_FILES:
            raise CheckpointError(f"{folder}: holds more than {_MAX_FILES} files; is it a component's folder?")
        for file in sorted(files):
            _check_file(file)


@contextmanager
def unasked() -> Iterator[None]:
    """transformers has no time to ask meanwhile whether it may run code: it raises a ValueError instead."""
    asking: Any = transformers.dynamic_module_utils
    patience_s, asking.TIME_OUT_REMOTE_CODE = asking.TIME_OUT_REMOTE_CODE, 0
    try:
        yield
    finally:
        asking.TIME_OUT_REMOTE_CODE = patience_s


def is_component(kind: object) -> bool:
    """Whether it is a class of diffusers or transformers for a part of a pipeline."""
    return isinstance(kind, type) and any(issubclass(kind, base()) for base in _KINDS)


def _check_class(name: str, library: object, class_name: object, model_dir: Path) -> None:
    found = component_class(library, class_name)
    if not is_component(found):
        what = "there is no such class" if found is None else "it is no model, scheduler, tokenizer or processor"
        entry = printable(f"{str(library)[:100]}, {str(class_name)[:100]}")
        raise CheckpointError(
            f"{index_file(model_dir)}: {name}: found {entry}: {what}; only components of diffusers and transformers "
            "are loaded, and no code of the checkpoint's is run"
        )


def _check_file(file: Path) -> None:
    try:
        check_regular(file)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{file}: {error}; remove it") from None
    if file.name == _ADAPTER:
        raise CheckpointError(f"{file}: an adapter names another model to load; merge it, or remove the file")
    if file.suffix == ".json" and file.is_file() and file.name not in _DATA and not _INDICES.fullmatch(file.name):
        content = read_json(file)
        _check_keys(file, content)
        try:
            check_counts(content)
        except TooLargeError as error:
            raise CheckpointError(f"{file}: {error.key}: {error}; is the file damaged?") from None


def _check_keys(file: Path, content: Mapping[str, object]) -> None:
    for _, found, value in walk(dict(content)):
        path = printable(found[:200])
        key = path.rpartition(".")[2]
        if key == OTHER_FILES and value:
            raise CheckpointError(f"{file}: {path} names other files to read in its place; remove the key")
        if key in CODE_KEYS and value:
            raise CheckpointError(
                f"{file}: {path} asks for code of the checkpoint's, which is never run; give a checkpoint of a class "
                "that transformers has, without it"
            )
        if any(word in path for word in KERNEL_WORDS) and isinstance(value, str) and "/" in value:
            raise CheckpointError(f"{file}: {path} is {value!r}: code is not downloaded; remove the key")


def component_to_blame(model_dir: Path, without: Collection[str]) -> Path | None:
    """The folder of the first component that cannot be loaded alone; None: each can.

    Args:
        without: components that are not loaded.
    """
    index = read_model_index(model_dir)
    for name in component_names(index):
        kind: Any = component_class(*index[name])
        if name in without or not is_component(kind):
            continue
        folder = model_dir / name
        more = {"use_safetensors": True, "variant": variant_of([folder])} if issubclass(kind, nn.Module) else {}
        try:
            kind.from_pretrained(folder, local_files_only=True, **more)
        except Exception:
            return folder
    return None
