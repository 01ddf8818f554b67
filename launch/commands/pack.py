"""What the `pack` command does."""

from __future__ import annotations

from pathlib import Path

from rich.console import Console
from rich.filesize import decimal

from crossdock.launch.commands.bars import waiting_line
from crossdock.launch.commands.options import located
from crossdock.runtime.config.new_directory import new_directory
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.models.families import spec_for
from crossdock.runtime.rank.weights.pack_checkpoint import pack_checkpoint


def run_pack(model: str, out: Path) -> None:
    """Write a packed copy of the model to a new directory.

    Raises:
        UserError: the model is none, or has nothing to encode; or `out` cannot take it. Nothing is left behind then.
    """
    console = Console(highlight=False, soft_wrap=True)
    model_dir = located(model, console, RunConfig())
    spec = spec_for(model_dir)
    with waiting_line(console) as tell, new_directory(out) as staging:
        before, after = pack_checkpoint(model_dir, staging, spec.transformers, tell)
    sizes = f"{decimal(after)} in place of {decimal(before)} ({after / before:.3f})"
    console.print(f"wrote {out}: its transformer takes {sizes}", markup=False)
