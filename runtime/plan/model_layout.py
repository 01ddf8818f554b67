"""The model of a run, and how it is cut over the ranks."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch

from crossdock.parallel.mesh import MeshShape
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.adapters.lora import Lora
from crossdock.runtime.models.checkpoint import StoredTensor
from crossdock.runtime.models.spec import ModelSpec


@dataclass(frozen=True)
class ModelLayout:
    """What the model is, and which part of it a rank has; where that rests is not said here.

    Attributes:
        device: "cpu" or "cuda".
        transformers: the components that are sharded and streamed, in the order in which the loop uses them.
        encoders, decoders: the components that encode prompts and that make pictures of latents.
        stored: the transformers' tensors in the checkpoint.
        dtypes: fqn -> dtype in which a tensor is held.
        slices: per TP rank, fqn -> the part it holds; a tensor that is missing here is replicated.
        pipeline_dtype: dtype of the other components.
        pixel_multiple: picture sizes are multiples of this.
        frame_multiple: videos have a multiple of this, and one more, frames.
        decoder_features: features that the decoder has of each pixel, at least.
        guided: whether its guidance does something.
        loras: adapters that are merged into the transformers' weights.
        variant: of the weight files, where some component has no other: `fp16` of `model.fp16.safetensors`.
    """

    model_dir: Path
    spec: ModelSpec
    mesh: MeshShape
    device: str
    transformers: tuple[str, ...]
    encoders: tuple[str, ...]
    decoders: tuple[str, ...]
    stored: Mapping[str, StoredTensor]
    dtypes: Mapping[str, torch.dtype]
    slices: tuple[Mapping[str, TensorSlice], ...]
    pipeline_dtype: torch.dtype
    pixel_multiple: int
    frame_multiple: int
    decoder_features: int
    guided: bool = True
    variant: str | None = None
    loras: tuple[Lora, ...] = ()

    def slices_of(self, rank: int) -> Mapping[str, TensorSlice]:
        """`slices` of one rank."""
        return self.slices[self.mesh.coordinates(rank)["tp"]]
