"""Trains the demo model from nothing: `python -m emoji_model.train OUT` in `tests/`, about an hour on two cores.

First the VAE, alone; then the transformer and the text encoder together, by flow matching (Lipman et al. 2022,
arXiv:2210.02747) on the VAE's latents. Every step draws its data from its own number, so that a run that is started
again goes on as if it had never stopped.

The pipeline pads prompts to 512 tokens and nothing masks the padding. Training on all of it would cost seven times as
much: instead a few of the padding's positions are drawn, and each weighs in the attention as all those it stands for.
"""

from __future__ import annotations

import argparse
import copy
import math
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as functional

from emoji_model import emoji, networks

PADDED = 512
"""Tokens to which the pipeline pads a prompt."""
WORDS = 14
"""Tokens that hold a prompt, its own padding included."""
SAMPLED = 3
"""Positions of the padding that one training step sees."""
SHARED = 4
"""Noises on which a step trains each of its prompts: a text encoder of 28 layers costs as much as the transformer."""
SAVED_EVERY = 100
Step = Callable[[int, torch.Generator], torch.Tensor]


def train(
    name: str, modules: dict[str, torch.nn.Module], loss_of: Step, steps: int, rate: float, state: Path, decay: float
) -> dict[str, torch.nn.Module]:
    """Trains the modules in place, restarting from `state` if it is there; returns their moving averages."""
    averages = {key: copy.deepcopy(module).requires_grad_(False) for key, module in modules.items()}
    parameters = [p for module in modules.values() for p in module.parameters() if p.requires_grad]
    optimizer = torch.optim.AdamW(parameters, lr=rate, betas=(0.9, 0.98), weight_decay=0.01)
    begin = 0
    if state.exists():
        saved = torch.load(state, weights_only=True, map_location=parameters[0].device)
        for key, module in modules.items():
            module.load_state_dict(saved["modules"][key])
            averages[key].load_state_dict(saved["averages"][key])
        optimizer.load_state_dict(saved["optimizer"])
        begin = saved["step"]
    started, losses = time.monotonic(), []
    for step in range(begin, steps):
        warm, left = min(1.0, (step + 1) / 200), 0.5 * (1 + math.cos(math.pi * step / steps))
        optimizer.param_groups[0]["lr"] = rate * warm * (0.02 + 0.98 * left)
        loss = loss_of(step, torch.Generator().manual_seed(step))
        optimizer.zero_grad(set_to_none=True)
        loss.backward()
        torch.nn.utils.clip_grad_norm_(parameters, 1.0)
        optimizer.step()
        keep = min(decay, (step + 1) / (step + 10))
        with torch.no_grad():
            for key, module in modules.items():
                for average, value in zip(averages[key].parameters(), module.parameters(), strict=True):
                    average.lerp_(value, 1 - keep)
        losses.append(loss.item())
        if (step + 1) % SAVED_EVERY == 0 or step + 1 == steps:
            per_step = (time.monotonic() - started) / (step + 1 - begin)
            print(f"{name} step {step + 1} of {steps}: loss {np.mean(losses):.4f}, {per_step:.2f} s each", flush=True)
            losses.clear()
            whole: dict[str, Any] = {"step": step + 1, "optimizer": optimizer.state_dict()}
            whole["modules"] = {key: module.state_dict() for key, module in modules.items()}
            whole["averages"] = {key: module.state_dict() for key, module in averages.items()}
            torch.save(whole, state.with_suffix(".part"))
            state.with_suffix(".part").replace(state)
    return averages


def pictures(scenes: list[emoji.Scene]) -> torch.Tensor:
    """[scenes, 3, SIZE, SIZE], -1 to 1."""
    rows = np.stack([scene.picture() for scene in scenes])
    return torch.from_numpy(rows).permute(0, 3, 1, 2).float() / 127.5 - 1


def trained_vae(images: torch.Tensor, steps: int, batch: int, state: Path, device: str) -> Any:
    """On every picture: of what is held out, only the pairing with its prompt is. Latents get no variance."""
    vae = networks.vae().to(device, memory_format=torch.channels_last)
    for name, parameter in vae.named_parameters():  # a residual begins as nothing
        if name.endswith("conv2.weight"):
            torch.nn.init.zeros_(parameter)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        wanted = images[torch.randint(len(images), (batch,), generator=generator)].to(device)
        mean = vae.encode(wanted).latent_dist.mean
        noise = torch.randn(mean.shape, generator=generator).to(device)
        made = vae.decode(mean + 0.05 * mean.detach().std() * noise).sample
        return functional.mse_loss(made, wanted) + 0.2 * functional.l1_loss(made, wanted)

    vae.train()
    averaged = train("vae", {"vae": vae}, loss_of, steps, 2e-3, state, decay=0.995)["vae"].eval()
    with torch.no_grad():  # the latents' statistics are the VAE's batch norm, which the pipeline undoes
        patches = _patches(averaged, images, device)
        averaged.bn.running_mean.copy_(patches.mean((0, 2, 3)))
        averaged.bn.running_var.copy_(patches.var((0, 2, 3)))
    return averaged


def _patches(vae: Any, images: torch.Tensor, device: str) -> torch.Tensor:
    """The means of their latents, as the pipeline cuts them: [images, 4 channels, height / 2, width / 2]."""
    means = torch.cat([vae.encode(part.to(device)).latent_dist.mean for part in images.split(64)])
    return functional.pixel_unshuffle(means, 2)


def encoded(vae: Any, images: torch.Tensor, device: str) -> torch.Tensor:
    """[scenes, tokens, 4 channels], with the statistics of noise."""
    with torch.no_grad():
        scale = (vae.bn.running_var + vae.config.batch_norm_eps).sqrt()
        return (
            ((_patches(vae, images, device) - vae.bn.running_mean[:, None, None]) / scale[:, None, None]).flatten(2).mT
        )


def token_ids(tokenizer: Any, prompts: list[str]) -> torch.Tensor:
    """[prompts, WORDS], padded."""
    texts = [tokenizer.apply_chat_template([{"role": "user", "content": p}], tokenize=False) for p in prompts]
    longest = max(len(tokenizer(text)["input_ids"]) for text in texts)
    if longest > WORDS:
        raise ValueError(f"a prompt has {longest} tokens, at most {WORDS} are trained")
    return tokenizer(texts, return_tensors="pt", padding="max_length", max_length=WORDS)["input_ids"]


def trained_denoiser(
    scenes: list[emoji.Scene], latents: torch.Tensor, tokenizer: Any, steps: int, batch: int, state: Path, device: str
) -> tuple[Any, Any]:
    """The transformer and the text encoder."""
    transformer, encoder = networks.transformer().to(device), networks.text_encoder(len(tokenizer)).to(device)
    for name, parameter in transformer.named_parameters():  # a block begins as one that adds nothing
        if name.endswith(("modulation.linear.weight", "modulation_img.linear.weight", "modulation_txt.linear.weight")):
            torch.nn.init.zeros_(parameter)
    torch.nn.init.zeros_(transformer.proj_out.weight)
    for name, parameter in encoder.named_parameters():  # what the transformer reads are at first the words themselves
        if name.endswith(("o_proj.weight", "down_proj.weight")):
            torch.nn.init.zeros_(parameter)
    torch.nn.init.normal_(encoder.model.embed_tokens.weight)
    ids = token_ids(tokenizer, ["", *(scene.prompt for scene in scenes)])
    side = math.isqrt(latents.shape[1])
    grid = torch.cartesian_prod(torch.tensor([0]), torch.arange(side), torch.arange(side), torch.tensor([0]))
    image_ids = grid.to(device)
    bias = torch.zeros(WORDS + SAMPLED + side * side, device=device)
    bias[WORDS : WORDS + SAMPLED] = math.log((PADDED - WORDS) / SAMPLED)

    def loss_of(step: int, generator: torch.Generator) -> torch.Tensor:
        chosen = torch.randint(len(scenes), (batch // SHARED,), generator=generator)
        told = torch.rand(len(chosen), generator=generator) >= 0.1  # else no prompt: what guidance leads away from
        padding = torch.full((len(chosen), SAMPLED), tokenizer.pad_token_id)
        inputs = torch.cat([ids[torch.where(told, chosen + 1, 0)], padding], 1).to(device)
        sampled = WORDS + torch.randperm(PADDED - WORDS, generator=generator)[:SAMPLED].sort().values
        positions = torch.cat([torch.arange(WORDS), sampled]).to(device)
        hidden = encoder.model(
            input_ids=inputs,
            attention_mask=(inputs != tokenizer.pad_token_id).long(),
            position_ids=positions[None].expand(len(chosen), -1),
            output_hidden_states=True,
            use_cache=False,
        ).hidden_states
        text = torch.cat([hidden[layer] for layer in networks.TEXT_LAYERS], -1).repeat_interleave(SHARED, 0)
        clean = latents[chosen.to(device).repeat_interleave(SHARED)]
        noise = torch.randn(clean.shape, generator=generator).to(device)
        sigmas = torch.sigmoid(torch.randn(batch, generator=generator) + 0.3).to(device)
        noisy = torch.lerp(clean, noise, sigmas[:, None, None])
        made = transformer(
            hidden_states=noisy,
            encoder_hidden_states=text,
            timestep=sigmas,
            img_ids=image_ids,
            txt_ids=functional.pad(positions[:, None], (3, 0)),
            joint_attention_kwargs={"attention_mask": bias.expand(batch, 1, 1, -1)},
            return_dict=False,
        )[0]
        return functional.mse_loss(made, noise - clean)

    modules = {"transformer": transformer, "text_encoder": encoder}
    averaged = train("denoiser", modules, loss_of, steps, 1.5e-3, state, decay=0.999)
    return averaged["transformer"], averaged["text_encoder"]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("out", type=Path, help="for the pipeline in bf16, and beside it what a restart needs")
    parser.add_argument("--vae-steps", type=int, default=1200)
    parser.add_argument("--steps", type=int, default=2500)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--threads", type=int, default=2)
    chosen = parser.parse_args(arguments)
    torch.set_num_threads(chosen.threads)
    torch.manual_seed(0)
    states = chosen.out.with_name(chosen.out.name + ".training")
    states.mkdir(parents=True, exist_ok=True)
    scenes = emoji.scenes(held_out=False)
    every = pictures(scenes + emoji.scenes(held_out=True))
    vae = trained_vae(every, chosen.vae_steps, chosen.batch // 4, states / "vae.pt", chosen.device)
    latents = encoded(vae, every[: len(scenes)], chosen.device)
    tokenizer = networks.tokenizer([scene.prompt for scene in scenes])
    transformer, encoder = trained_denoiser(
        scenes, latents, tokenizer, chosen.steps, chosen.batch, states / "denoiser.pt", chosen.device
    )
    save(chosen.out, {"vae": vae, "transformer": transformer, "text_encoder": encoder, "tokenizer": tokenizer})


def save(out: Path, components: dict[str, Any]) -> None:
    from diffusers import Flux2KleinPipeline

    pipeline = Flux2KleinPipeline(scheduler=networks.scheduler(), **components, is_distilled=False)
    pipeline.to(torch.bfloat16).save_pretrained(out, safe_serialization=True)
    size = sum(path.stat().st_size for path in out.rglob("*.safetensors"))
    print(f"{out}: {size / 1e6:.1f} MB of weights")


if __name__ == "__main__":
    main(sys.argv[1:])
