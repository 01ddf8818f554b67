"""LTX-2: video and audio. Text goes through a text encoder, all of whose hidden states are used, and connectors."""

from __future__ import annotations

from crossdock.parallel.regions import AttentionScope, SequenceRegion, ShardLike
from crossdock.parallel.tensor import COLUMN, ROW, LinearStyle, TensorPlan
from crossdock.runtime.models.spec import ModelSpec, Published, attention_plan

VIDEO, AUDIO = "hidden_states", "audio_hidden_states"
SELF, TEXT = ("attn1", "audio_attn1"), ("attn2", "audio_attn2")
EACH_OTHER = ("audio_to_video_attn", "video_to_audio_attn")
ATTENTION = tuple(f"transformer_blocks.*.{name}" for name in (*SELF, *TEXT, *EACH_OTHER))
ROTARY = dict.fromkeys(SELF, ("query",)) | dict.fromkeys(EACH_OTHER, ("query", "key"))
"""Attention module -> what it has a rotary table for, one per head: `[batch, heads, tokens, dim]`."""


def _attention(name: str) -> dict[str, LinearStyle]:
    return attention_plan(name, ("to_q", "to_k", "to_v"), ("to_out.0",)) | {f"{name}.to_gate_logits?": COLUMN}


def _feed_forward(name: str) -> dict[str, LinearStyle]:
    return {f"transformer_blocks.*.{name}.net.0.proj": COLUMN, f"transformer_blocks.*.{name}.net.2": ROW}


SPEC = ModelSpec(
    family="ltx2",
    pipeline="LTX2Pipeline",
    transformer="LTX2VideoTransformer3DModel",
    block_stacks=("transformer_blocks",),
    tensor_plan=TensorPlan(
        linears={linear: style for name in ATTENTION for linear, style in _attention(name).items()}
        | _feed_forward("ff")
        | _feed_forward("audio_ff"),
        head_count="num_attention_heads",
        heads=dict.fromkeys(ATTENTION, ("heads",)),
        norms=tuple(f"{name}.{norm}" for name in ATTENTION for norm in ("norm_q", "norm_k")),
        inputs={
            f"transformer_blocks.*.{name}": {f"{part}_rotary_emb": 1 for part in parts}
            for name, parts in ROTARY.items()
        },
    ),
    regions=(
        SequenceRegion(
            enter="transformer_blocks.0",
            segments=(VIDEO, AUDIO),
            within="transformer_blocks.*",
            shard_like=dict.fromkeys(("video_rotary_emb", "ca_video_rotary_emb"), VIDEO)
            | dict.fromkeys(("audio_rotary_emb", "ca_audio_rotary_emb"), AUDIO)
            | dict.fromkeys(("temb", "temb_ca_scale_shift", "temb_ca_gate"), ShardLike(VIDEO, 1))
            | dict.fromkeys(("temb_audio", "temb_ca_audio_scale_shift", "temb_ca_audio_gate"), ShardLike(AUDIO, 1)),
            leave="transformer_blocks.-1",
            gathers=(VIDEO, AUDIO),
            cross=("transformer_blocks.*.attn2", "transformer_blocks.*.audio_attn2"),
            scopes={
                "transformer_blocks.*.attn1": AttentionScope((VIDEO,)),
                "transformer_blocks.*.audio_attn1": AttentionScope((AUDIO,)),
                "transformer_blocks.*.audio_to_video_attn": AttentionScope((VIDEO,), (AUDIO,)),
                "transformer_blocks.*.video_to_audio_attn": AttentionScope((AUDIO,), (VIDEO,)),
            },
        ),
    ),
    branches="batch",
    encoders=("text_encoder", "connectors"),
    encode=("encode_prompt", "connectors"),
    latents="_denormalize_latents",
    decoders=("vae", "audio_vae", "vocoder"),
    patch=1,
    fps=24,
    sampling_rate="vocoder.config.output_sampling_rate",
    resumes=False,  # the audio's latents and scheduler are the loop's own
    size=(768, 512),
    steps=30,
    published=(Published("LTX-2", 18.876e9, {"rope_type": "split"}),),
)
