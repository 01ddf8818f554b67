"""MiniMax-H3, text to video with audio, all in one sequence. diffusers has its pipeline as blocks only.

Its other workflows take pictures, videos or sounds, which a request has none of; for one of them the checkpoint has a
transformer of its own.
"""

from __future__ import annotations

from crossdock.parallel.regions import SequenceRegion, ShardLike
from crossdock.parallel.tensor import TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, gated_block_plan

TOKENS = "hidden_states"
STACKS = ("token_refiner.refiner_blocks", "transformer_blocks")


SPEC = ModelSpec(
    family="minimax-h3",
    pipeline="MiniMaxH3ModularPipeline",
    transformer="MiniMaxH3Transformer3DModel",
    block_stacks=STACKS,
    tensor_plan=TensorPlan(
        linears={
            linear: style
            for stack in STACKS
            for linear, style in gated_block_plan(f"{stack}.*", "ff.net.0.proj", "ff.net.2").items()
        },
        head_count="num_attention_heads",
        heads={f"{stack}.*.attn": ("heads",) for stack in STACKS},
    ),
    regions=(
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=(TOKENS,),
            within="transformer_blocks.*",
            shard_like={"rotary_emb": ShardLike(TOKENS, 0), "adaln_indices": ShardLike(TOKENS, 0)},
            leave="transformer_blocks.-1",
            gathers=TOKENS,
        ),
    ),
    branches=None,
    guidance=None,
    negative_prompt=False,
    batches=False,
    encode=("text_encoder",),
    outputs=("videos", "audio"),
    workflow="t2va",
    unused=("transformer_ref",),
    decoders=("vae", "audio_vae"),
    fps=24,
    sampling_rate="audio_sampling_rate",
    frame_counts=range(124, 346, 17),  # 5 to 15 seconds, 17 n + 5
    more_steps=1,
    resumes=False,  # the audio's latents and scheduler are the loop's own
    size=(832, 480),
    published=(Published("MiniMax-H3", 33_122_992_896),),
)
