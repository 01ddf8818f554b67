"""A program that lets diffusers fuse adapters: `python tests/fuse_lora.py SCALE (DIR FILE TARGET)...`.

Each pipeline in DIR is saved to TARGET with FILE fused into it. It needs PEFT, which tests keep from other programs.
"""

from __future__ import annotations

import sys
from typing import Any

from diffusers import DiffusionPipeline
from safetensors.torch import load_file


def main(scale: str, *paths: str) -> None:
    for directory, file, target in zip(paths[::3], paths[1::3], paths[2::3], strict=True):
        pipe: Any = DiffusionPipeline.from_pretrained(directory)
        pipe.load_lora_weights(load_file(file))
        pipe.fuse_lora(lora_scale=float(scale))
        pipe.unload_lora_weights()
        pipe.save_pretrained(target)


if __name__ == "__main__":
    main(*sys.argv[1:])
