"""What crossdock has to know of a model family, as data. The families are in `models/families`."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from crossdock.parallel.guidance import Branches
from crossdock.parallel.regions import SequenceRegion
from crossdock.parallel.tensor import COLUMN, ROW, LinearStyle, TensorPlan


@dataclass(frozen=True)
class Published:
    """A checkpoint of a family that can be downloaded.

    Attributes:
        name: as its publisher calls it.
        parameters: of its transformers, as published; tensors in the checkpoint that are no parameters count as well.
        config: of each transformer: what differs from the class's defaults.
        transformers: how many it has.
    """

    name: str
    parameters: float
    config: Mapping[str, Any] = field(default_factory=dict)
    transformers: int = 1


@dataclass(frozen=True)
class ModelSpec:
    """What crossdock knows of a family.

    Attributes:
        family: the name on the command line.
        pipeline: diffusers pipeline class, as in model_index.json.
        transformer: diffusers class of the streamed transformer, or of all of them.
        block_stacks: paths of the module lists of transformer blocks, in execution order.
        tensor_plan: which linears tensor parallelism cuts.
        regions: where tokens are cut and put together under sequence parallelism.
        branches: how the pipeline runs the branches of guidance; None: it has one.
        guidance: the pipeline's argument for classifier-free guidance; with a dot, a component's setting; None: it has
            none.
        negative_prompt: whether that guidance takes a negative prompt.
        guides_with_negative: whether it does nothing without one.
        unguided: setting of the pipeline or the transformer -> value with which that guidance does nothing.
        transformers: the components that are sharded and streamed, where the checkpoint has them, in the order in which
            the loop uses them: one in each step.
        batches: whether the pipeline takes several prompts at once.
        encoders: the components that encode prompts, where the checkpoint has them.
        encode: the pipeline's methods that run them, and encoders that the pipeline calls itself. What these return
            depends on nothing else.
        outputs: names of what a pipeline of blocks returns: pictures or videos, then audio. There, `encode` has blocks.
        latents: the pipeline's method that makes the latents that it returns where they are not to be decoded; None:
            they are what its loop leaves, or what its blocks call `latents`.
        workflow: which one a pipeline of blocks that has several is to run.
        unused: components of the checkpoint that only its other workflows need. They are not loaded.
        decoders: the components that make pictures of latents. The first one that runs ends the denoise loop.
        patch: latents along each side of a token.
        fps: frames per second of the videos that it makes; None: it makes pictures.
        fps_with: the pipeline's option, where it is on -> frames per second.
        sampling_rate: the pipeline's attribute, dotted, with the samples per second of the audio that comes second in
            what it returns; None: it makes none.
        chunk_frames: frames that the pipeline makes in one go, where it makes a video chunk by chunk, with all steps
            for each, and decodes each before the next one begins.
        frame_counts: how many frames a video can have; None: that follows from chunks, or from the VAE.
        more_steps: how many more steps than are to be run the pipeline has to be asked for: 1 where it counts the end.
        size: width and height in pixels where nobody says otherwise: its pipeline's own, or its card's.
        steps: denoising steps where nobody says otherwise, likewise.
        resumes: whether a request that lost a rank goes on after the last step that was kept. Not where the loop
            carries more than latents and what its scheduler remembers; it begins anew then.
        published: its checkpoints.
        refused: built-in config -> why this family cannot run in it, where that does not follow from the rest.
    """

    family: str
    pipeline: str
    transformer: str
    block_stacks: tuple[str, ...]
    tensor_plan: TensorPlan
    regions: tuple[SequenceRegion, ...]
    branches: Branches | None
    guidance: str | None = "guidance_scale"
    negative_prompt: bool = True
    guides_with_negative: bool = False
    unguided: Mapping[str, object] = field(default_factory=dict)
    transformers: tuple[str, ...] = ("transformer",)
    batches: bool = True
    encoders: tuple[str, ...] = ("text_encoder",)
    encode: tuple[str, ...] = ("encode_prompt",)
    outputs: tuple[str, ...] = ("images",)
    latents: str | None = None
    workflow: str | None = None
    unused: tuple[str, ...] = ()
    decoders: tuple[str, ...] = ("vae",)
    patch: int = 2
    fps: int | None = None
    fps_with: Mapping[str, int] = field(default_factory=dict)
    sampling_rate: str | None = None
    chunk_frames: int | None = None
    frame_counts: range | None = None
    more_steps: int = 0
    size: tuple[int, int] = (1024, 1024)
    steps: int = 50
    resumes: bool = True
    published: tuple[Published, ...] = ()
    refused: Mapping[str, str] = field(default_factory=dict)

    def fps_of(self, options: Mapping[str, Any]) -> int | None:
        """Frames per second that a pipeline with these options makes."""
        return next((fps for option, fps in self.fps_with.items() if options.get(option)), self.fps)


def attention_plan(attention: str, inputs: tuple[str, ...], outputs: tuple[str, ...]) -> dict[str, LinearStyle]:
    """Of one attention module: `inputs` cut by column, `outputs` by row."""
    return {f"{attention}.{name}": COLUMN for name in inputs} | {f"{attention}.{name}": ROW for name in outputs}


SWIGLU = LinearStyle("column", parts=(1, 1))
"""The gate and the up half of one projection."""


def gated_block_plan(block: str, up: str, down: str) -> dict[str, LinearStyle]:
    """Of a block with an attention `attn`, and a feed-forward whose projection `up` has its gate in it."""
    attention = attention_plan(f"{block}.attn", ("to_q", "to_k", "to_v"), ("to_out.0",))
    return attention | {f"{block}.{up}": SWIGLU, f"{block}.{down}": ROW}
