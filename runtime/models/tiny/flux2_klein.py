"""The tiny recipe of FLUX.2 [klein]."""

from __future__ import annotations

from crossdock.runtime.models.tiny.flux_blocks import QUERY_KEY_NORMS, tiny_flux2_transformer, tiny_flux2_vae
from crossdock.runtime.models.tiny.parts import TinyRecipe, flow_scheduler, qwen3_config, qwen_tokenizer


def _components() -> dict[str, object]:
    from transformers import Qwen3ForCausalLM

    tokenizer = qwen_tokenizer()
    encoder = Qwen3ForCausalLM(qwen3_config(len(tokenizer), layers=28))  # hidden states 9, 18 and 27 are read
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "transformer": tiny_flux2_transformer(num_layers=3, num_single_layers=5, guidance_embeds=False),
        "vae": tiny_flux2_vae(),
        "text_encoder": encoder,
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    options={"is_distilled": False},  # guidance works in the undistilled one only
    sharp=QUERY_KEY_NORMS,  # 512 tokens, most padding
)
