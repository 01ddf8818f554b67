"""The model that is sharded and streamed: a pipeline's transformer, or all of its transformers in one.

Where there are several, they are of one class, and each denoises some of the steps. They are children of one module
then, named as the pipeline's components are: every name of a block or a tensor begins with that of its transformer.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path

from torch import nn

from crossdock.runtime.models.meta import build_on_meta


class Transformers(nn.Module):
    """Several transformers, by the names of the pipeline's components."""

    def __init__(self, transformers: Mapping[str, nn.Module]) -> None:
        super().__init__()
        for name, transformer in transformers.items():
            self.add_module(name, transformer)


def transformer_names(wanted: Sequence[str], there: Collection[str]) -> tuple[str, ...]:
    """Of the components that a family streams, those that the checkpoint has; the first, where it has none."""
    return tuple(name for name in wanted if name in there) or (wanted[0],)


def prefixes(names: Sequence[str]) -> tuple[str, ...]:
    """What the names of each transformer's tensors and blocks begin with in the model."""
    return tuple(f"{name}." for name in names) if len(names) > 1 else ("",)


def build_transformers(class_name: str, model_dir: Path, names: Sequence[str]) -> nn.Module:
    """The model, with these components of a checkpoint: parameters on meta, buffers real.

    Raises:
        CheckpointError: see `build_on_meta`.
    """
    built = {name: build_on_meta(class_name, model_dir / name) for name in names}
    return Transformers(built) if len(built) > 1 else built[names[0]]


def transformers_in(model: nn.Module) -> dict[str, nn.Module]:
    """Prefix -> transformer, in the order in which the loop uses them."""
    if not isinstance(model, Transformers):
        return {"": model}
    return {f"{name}.": child for name, child in model.named_children()}
