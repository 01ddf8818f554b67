"""The `crossdock` command.

Imports of torch, diffusers and ray are inside the commands: `--help` and config errors come at once.
"""

from __future__ import annotations

import json
import sys
import threading
from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from crossdock.launch.commands.options import (
    CONFIG_HELP,
    MODEL_HELP,
    ConfigFile,
    LoraFiles,
    Outputs,
    SecondFile,
    TransformerFile,
    add_check,
    build_app,
    run_app,
)
from crossdock.launch.console import exit_now
from crossdock.launch.gangs.choose import begin_early
from crossdock.launch.gangs.ranks.reachable import GIVEN_UP
from crossdock.runtime.request import GenerateRequest


def _run(source: ConfigFile, model: str, request: GenerateRequest, outputs: Outputs, probe: bool) -> None:
    begin_early(source.config, model)
    from crossdock.launch.commands.generate import run_generate

    run_generate(source, model, request, outputs, "crossdock", probe=probe)


def _check(source: ConfigFile, model: str, probe: bool, as_json: bool) -> None:
    begin_early(source.config, model)
    from crossdock.launch.commands.check import run_check

    run_check(source, model, "crossdock", probe=probe, as_json=as_json)


app = add_check(build_app(_run), _check)


@app.command("make-checkpoint")
def make_checkpoint_command(
    family: Annotated[str, typer.Argument(metavar="FAMILY", help="Of a model; `models` lists them.")],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty directory to write.")],
    seed: Annotated[int, typer.Option(help="Seed of the random weights.", min=0)] = 0,
) -> None:
    """Write a tiny random pipeline in the diffusers format, for tests and demos."""
    from crossdock.runtime.models.tiny.make_checkpoint import make_checkpoint

    make_checkpoint(family, directory, seed)
    Console(highlight=False, soft_wrap=True).print(f"wrote a tiny {family} checkpoint to {directory}", markup=False)


@app.command("pack")
def pack_command(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help=MODEL_HELP)],
    directory: Annotated[Path, typer.Argument(metavar="DIR", help="New or empty directory to write.")],
) -> None:
    """Write a copy whose transformer takes three quarters of the bytes: `codec: lossless` starts from it at once."""
    from crossdock.launch.commands.pack import run_pack

    run_pack(model, directory)


@app.command("models")
def models_command(
    as_json: Annotated[bool, typer.Option("--json", help="Print a JSON list instead of a table.")] = False,
    as_markdown: Annotated[bool, typer.Option("--markdown", help="Print the README's table.")] = False,
) -> None:
    """List the model families, their checkpoints, and the layouts that tests hold them in."""
    from crossdock.launch.commands.models import INFERRED, model_rows, models_json, models_markdown, models_table

    rows = list(model_rows())
    if as_json:
        typer.echo(json.dumps(models_json(rows), indent=2))
    elif as_markdown:
        typer.echo(models_markdown(rows))
    else:
        Console(highlight=False).print(models_table(rows))
        typer.echo(INFERRED)


@app.command("timeline")
def timeline_command(
    trace: Annotated[Path, typer.Argument(metavar="TRACE.json", help="What generate --trace wrote.")],
    out: Annotated[Path, typer.Option(help="Picture: png, svg or pdf.")] = Path("timeline.png"),
    last_steps: Annotated[int | None, typer.Option(help="Only the last denoise steps.", min=1)] = None,
) -> None:
    """Draw a trace: one row per rank and stream."""
    from crossdock.launch.commands import timeline

    timeline.check_out(out)
    slices = timeline.read_slices(trace)
    timeline.draw(slices if last_steps is None else timeline.last_steps(slices, last_steps), out)
    Console(highlight=False, soft_wrap=True).print(f"wrote {out}", markup=False)


@app.command("serve")
def serve_command(
    model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help=MODEL_HELP)],
    config: Annotated[Path, typer.Option(help=CONFIG_HELP)],
    host: Annotated[str, typer.Option(help="Address to listen on; beyond this machine a key is needed.")] = "127.0.0.1",
    port: Annotated[int, typer.Option(help="0: a free one.", min=0, max=65535)] = 8000,
    api_key_file: Annotated[
        Path | None, typer.Option(help="File with the key that clients send; or set CROSSDOCK_API_KEY.")
    ] = None,
    insecure: Annotated[bool, typer.Option("--insecure", help="Let others in without a key.")] = False,
    name: Annotated[
        str | None, typer.Option(help="What clients call the model; by default its hub id, or the directory.")
    ] = None,
    queue: Annotated[int, typer.Option(help="Requests that may wait; more are told to come again.", min=1)] = 64,
    batch_wait_ms: Annotated[
        float, typer.Option(help="How long the first of a batch waits for others that fit.", min=0)
    ] = 0.0,
    max_batch: Annotated[int, typer.Option(help="Pictures that a replica computes at once.", min=1)] = 4,
    drain_s: Annotated[float, typer.Option(help="After SIGTERM, time to answer what waits.", min=0)] = 60.0,
    size: Annotated[str | None, typer.Option(help="WIDTHxHEIGHT by default; else the family's own.")] = None,
    steps: Annotated[int | None, typer.Option(help="Steps by default; else the family's own.", min=1)] = None,
    max_pixels: Annotated[int, typer.Option(help="Of a picture or a frame, at most.", min=1)] = 2048 * 2048,
    data: Annotated[
        Path | None, typer.Option(help="Folder for video jobs; by default one in the user's state folder.")
    ] = None,
    keep_h: Annotated[float, typer.Option(help="Hours for which a finished video is kept.", min=0)] = 24.0,
    log_prompts: Annotated[bool, typer.Option("--log-prompts", help="Log prompt and seed of each request.")] = False,
    replicas: Annotated[int, typer.Option(help="Of the whole layout, on Ray Serve.", min=1)] = 1,
    ray_address: Annotated[str | None, typer.Option(help="Cluster for the ranks; else launch.ray_address.")] = None,
    transformer: TransformerFile = None,
    transformer_2: SecondFile = None,
    lora: LoraFiles = None,
) -> None:
    """Answer HTTP requests like OpenAI's image API, until SIGTERM."""
    from crossdock.launch.commands.serve import run_serve

    run_serve(
        ConfigFile(config, transformer, transformer_2, lora or ()),
        model,
        host=host,
        port=port,
        api_key_file=api_key_file,
        insecure=insecure,
        name=name,
        queue=queue,
        batch_wait_ms=batch_wait_ms,
        max_batch=max_batch,
        drain_s=drain_s,
        size=size,
        steps=steps,
        max_pixels=max_pixels,
        data=data,
        keep_h=keep_h,
        replicas=replicas,
        log_prompts=log_prompts,
        ray_address=ray_address,
    )


@app.command("config-schema")
def config_schema_command() -> None:
    """Print the JSON schema of the YAML file, for editors."""
    from crossdock.runtime.config.yaml_file import config_schema

    Console(soft_wrap=True).print_json(json.dumps(config_schema()))


def main() -> None:
    """Entry point of the `crossdock` script."""
    code = run_app(app)
    if any(thread.name == GIVEN_UP for thread in threading.enumerate()):
        exit_now(code)
    sys.exit(code)


if __name__ == "__main__":
    main()
