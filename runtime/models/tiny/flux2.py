"""The tiny recipe of FLUX.2 [dev]."""

from __future__ import annotations

from crossdock.runtime.models.tiny.flux_blocks import QUERY_KEY_NORMS, tiny_flux2_transformer, tiny_flux2_vae
from crossdock.runtime.models.tiny.mistral import mistral3_config, mistral_tokenizer
from crossdock.runtime.models.tiny.parts import TinyRecipe, flow_scheduler


def _components() -> dict[str, object]:
    from transformers import Mistral3ForConditionalGeneration

    tokenizer = mistral_tokenizer()
    return {
        "scheduler": flow_scheduler(shift=3.0, dynamic_shifting=True),
        "tokenizer": tokenizer,
        "transformer": tiny_flux2_transformer(num_layers=2, num_single_layers=6, guidance_embeds=True),
        "vae": tiny_flux2_vae(),
        "text_encoder": Mistral3ForConditionalGeneration(mistral3_config(tokenizer, layers=31)),  # 10, 20, 30 are read
    }


TINY = TinyRecipe(
    _components,
    outputs=("proj_out.weight",),
    sharp=QUERY_KEY_NORMS,  # 512 tokens, most padding
)
