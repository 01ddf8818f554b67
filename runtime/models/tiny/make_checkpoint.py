"""Tiny random pipelines in the diffusers format, for tests and the demo.

The files are what `DiffusionPipeline.save_pretrained` writes for a real model: model_index.json, one folder
for each component, sharded safetensors. Only the sizes are small, and not all powers of two. The weights are
drawn so that every tensor matters to the picture (norm weights are not 1, biases and pad tokens are not 0),
while the fp32 result stays insensitive to rounding: wrong wiring shows, another order of summation does not.
"""

from __future__ import annotations

import difflib
import json
import math
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from crossdock.runtime.config.new_directory import new_directory
from crossdock.runtime.errors import RequestError
from crossdock.runtime.models.checkpoint import MODULAR_INDEX
from crossdock.runtime.models.tiny.parts import TinyRecipe
from crossdock.runtime.models.tiny.recipes import SPEC_OF_RECIPE, TINY

if TYPE_CHECKING:
    import torch
    from torch import nn

TRANSFORMER_SHARD_SIZE = "2MB"
"""Small enough that each transformer is written as several files."""

VELOCITY_SCALE = 0.35
"""Factor on the last projection; keeps rounding errors small, which guidance enlarges up to 10 times."""


def make_checkpoint(recipe: str, directory: Path, seed: int = 0) -> None:
    """Write a random pipeline to `directory`, which must be new or empty.

    The same seed writes the same bytes. Raises `RequestError` for an unknown recipe, `CheckpointError` where
    the directory cannot take the files; nothing is left behind then.

    Args:
        recipe: the name of a family that has one, or of one of its recipes.
    """
    _check_recipe(recipe)
    with new_directory(directory) as staging:
        pipeline = _build(recipe, seed)
        with _no_progress_bars():
            pipeline.save_pretrained(staging, max_shard_size=TRANSFORMER_SHARD_SIZE)


def _check_recipe(name: str) -> None:
    if name not in TINY:
        close = difflib.get_close_matches(name, TINY, n=1)
        hint = f" did you mean {close[0]}?" if close else ""
        raise RequestError(f"family: found {name!r};{hint} allowed: {', '.join(TINY)}")


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging

    enabled = logging.is_progress_bar_enabled()
    logging.disable_progress_bar()
    try:
        yield
    finally:
        if enabled:
            logging.enable_progress_bar()


class _Assembled:
    """A new pipeline of components, to be saved.

    Args:
        repository: what its index calls the place that the components are in.
    """

    def __init__(self, pipeline: Any, components: Mapping[str, Any], repository: str) -> None:
        self._pipe = pipeline()
        self._pipe.update_components(**components)
        self._repository = repository

    def save_pretrained(self, directory: Path, **options: object) -> None:
        self._pipe.save_pretrained(str(directory), overwrite_modular_index=True, **options)
        path = directory / MODULAR_INDEX
        index = json.loads(path.read_text(encoding="utf-8"))
        for value in index.values():
            if isinstance(value, list) and value[0] is not None:  # else it is not saved
                value[2]["pretrained_model_name_or_path"] = self._repository
        path.write_text(json.dumps(index, indent=2) + "\n", encoding="utf-8")


def _build(name: str, seed: int) -> Any:
    import diffusers
    import torch
    from torch import nn

    recipe = TINY[name]
    with torch.random.fork_rng(devices=[]):  # the constructors draw weights of their own, which are replaced
        components = recipe.components()
    generator = torch.Generator().manual_seed(seed)
    for module in components.values():
        if isinstance(module, nn.Module):
            randomise(module.eval(), recipe, generator)
    pipeline = getattr(diffusers, SPEC_OF_RECIPE[name].pipeline)
    if issubclass(pipeline, diffusers.ModularPipeline):
        return _Assembled(pipeline, components, f"crossdock/{name}")
    return pipeline(**components, **recipe.options)


def randomise(module: nn.Module, recipe: TinyRecipe, generator: torch.Generator) -> None:
    """Draw every parameter and running statistic of `module` anew, in the order of their names.

    Matrices get the variance 1 / fan_in, so that activations stay of order 1; norm weights lie around what their
    class begins with: 1, or 0 where it adds 1 to them.
    """
    import torch
    from torch import nn

    def normal(tensor: torch.Tensor, mean: float, deviation: float) -> None:
        tensor.copy_(torch.randn(tensor.shape, generator=generator) * deviation + mean)

    embeddings = {id(m.weight) for m in module.modules() if isinstance(m, nn.Embedding)}
    with torch.no_grad():
        for name, tensor in sorted(module.named_parameters()):
            scale = VELOCITY_SCALE if name in recipe.outputs else 1.0
            if id(tensor) in embeddings or name.endswith("pad_token"):
                normal(tensor, 0.0, 1.0)
            elif name.endswith("bias"):
                normal(tensor, 0.0, 0.2)
            elif name.endswith(recipe.sharp):
                normal(tensor, recipe.sharpness, 0.2 * recipe.sharpness)
            elif tensor.numel() == tensor.shape[0]:  # a VAE may hold a norm weight as [channels, 1, 1, 1]
                normal(tensor, scale * float(tensor.any()), scale * 0.2)
            else:
                normal(tensor, 0.0, scale / math.sqrt(tensor[0].numel()))
        for name, buffer in sorted(module.named_buffers()):
            if name.endswith("running_mean"):
                normal(buffer, 0.0, 0.2)
            elif name.endswith("running_var"):
                buffer.copy_(torch.rand(buffer.shape, generator=generator) + 0.5)
