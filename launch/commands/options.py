"""The options of `generate` and `check`, shared by `crossdock` and `python -m crossdock.launch.torchrun`."""

from __future__ import annotations

import os
import traceback
from collections.abc import Callable, Sequence
from dataclasses import MISSING, dataclass, fields
from functools import cached_property
from inspect import Parameter, Signature, signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer
from rich.console import Console

from crossdock.launch.console import INTERRUPTED, complain_on_stderr
from crossdock.launch.hub.locate import model_directory
from crossdock.launch.hub.names import hub_name
from crossdock.launch.hub.progress import fetch_bar
from crossdock.runtime.config.schema import LoraConfig, RunConfig
from crossdock.runtime.config.yaml_file import load_config
from crossdock.runtime.errors import CheckpointError, CrossdockError, RequestError
from crossdock.runtime.request import GenerateRequest, RequestItem

IMAGE_SUFFIXES = (".png", ".jpg", ".jpeg", ".webp")
VIDEO_SUFFIXES = (".mp4",)


@dataclass(frozen=True)
class Outputs:
    """Where the results go. None: not written."""

    image: Path
    latents: Path | None = None
    report: Path | None = None
    trace: Path | None = None

    def check(self, images: int = 1) -> None:
        """Raise `RequestError` when one of the files for `images` pictures could not be written."""
        allowed = (*IMAGE_SUFFIXES, *VIDEO_SUFFIXES)
        if self.image.suffix.lower() not in allowed:
            raise RequestError(f"--out {self.image}: allowed: a file ending in {', '.join(allowed)}")
        named = [("--out", path) for path in self.image_paths(images)]
        named += [("--latents", self.latents)] if self.latents else []
        named += [("--report", self.report)] if self.report else []
        named += [("--trace", self.trace)] if self.trace else []
        taken: dict[Path, str] = {}
        for option, path in named:
            _check_writable(option, path)
            other = taken.setdefault(path.resolve(), option)
            if other != option:
                raise RequestError(f"{option} {path}: is the same file as {other}; give each output its own")

    def check_kind(self, family: str, videos: bool) -> None:
        """Raise `RequestError` when `--out` is for pictures and the model makes videos, or the other way round."""
        allowed, made = (VIDEO_SUFFIXES, "videos") if videos else (IMAGE_SUFFIXES, "pictures")
        if self.image.suffix.lower() not in allowed:
            raise RequestError(f"--out {self.image}: {family} makes {made}; allowed: {', '.join(allowed)}")

    def image_paths(self, images: int) -> list[Path]:
        """One path for each picture: `out.png`, or `out_0.png`, `out_1.png`, ... for several."""
        if images == 1:
            return [self.image]
        return [self.image.with_stem(f"{self.image.stem}_{index}") for index in range(images)]


@dataclass(frozen=True)
class ConfigFile:
    """A YAML file with the layout, and what the command line puts in the place of what it says."""

    path: Path
    transformer: Path | None = None
    transformer_2: Path | None = None
    loras: Sequence[str] = ()

    @cached_property
    def config(self) -> RunConfig:
        """Read when it is first asked for.

        Raises:
            ConfigError: see `load_config`.
        """
        given = {"transformer": self.transformer, "transformer_2": self.transformer_2}
        config, update = load_config(self.path), {key: str(file.absolute()) for key, file in given.items() if file}
        return config.model_copy(update=update | {"loras": (*config.loras, *map(_lora, self.loras))})


def _lora(given: str) -> LoraConfig:
    """`PATH[:SCALE]`."""
    path, _, scale = given.rpartition(":")
    try:
        return LoraConfig(path=path, scale=float(scale)) if path else LoraConfig(path=given)
    except ValueError:  # the colon belongs to the path, or the scale is no number
        if path and not Path(given).exists():
            raise RequestError(f"--lora {given}: found {scale!r} for a scale; allowed: PATH or PATH:NUMBER") from None
        return LoraConfig(path=given)


CONFIG_HELP = "YAML file with the layout; see `config-schema`."
TransformerFile = Annotated[
    Path | None,
    typer.Option(
        metavar="FILE",
        help="A single file (.safetensors, in diffusers', its publisher's or ComfyUI's names) in place of the "
        "checkpoint's transformer.",
    ),
]
SecondFile = Annotated[Path | None, typer.Option(metavar="FILE", help="The same for transformer_2.")]
LoraFiles = Annotated[
    list[str] | None,
    typer.Option(
        "--lora", metavar="PATH[:SCALE]", help="A LoRA adapter beside those of the config; may be given several times."
    ),
]
MODEL_HELP = "Checkpoint directory in the diffusers format, or org/name[@revision] of the Hugging Face hub."
RunGenerate = Callable[[ConfigFile, str, GenerateRequest, Outputs, bool], None]
"""Takes the config file, the model's directory or name, the request and the outputs, all checked; whether to probe."""


_PROBE = "run a small step with streaming, without it, and of the unsharded model on one rank; compare block by block."
RunCheck = Callable[[ConfigFile, str, bool, bool], None]
"""Takes the config file and the model's directory or name, both checked; whether to probe, and to print JSON."""


def build_app(run: RunGenerate) -> typer.Typer:
    """An app with the command `generate`, which checks its arguments and calls `run`."""
    app = typer.Typer(pretty_exceptions_enable=False, no_args_is_help=True, add_completion=False)

    @app.callback()
    def _group() -> None:
        """Distributed inference for diffusion transformers that are larger than one GPU."""

    def generate(
        model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help=MODEL_HELP)],
        config: Annotated[Path, typer.Option(help=CONFIG_HELP)],
        out: Annotated[
            Path, typer.Option(help="Picture, or video (.mp4); several get _0, _1, ... before the suffix.")
        ] = Path("out.png"),
        latents: Annotated[
            Path | None,
            typer.Option(
                help="Also write the final latents (safetensors): as diffusers returns them, `latents`, and as "
                "the denoise loop left them, `loop_latents`."
            ),
        ] = None,
        report: Annotated[Path | None, typer.Option(help="Also write the run's report (JSON).")] = None,
        trace: Annotated[
            Path | None, typer.Option(help="Also write what every rank did when (JSON, for Perfetto and `timeline`).")
        ] = None,
        probe: Annotated[bool, typer.Option("--probe", help=f"Before anything is drawn: {_PROBE}")] = False,
        transformer: TransformerFile = None,
        transformer_2: SecondFile = None,
        lora: LoraFiles = None,
        **options: Any,
    ) -> None:
        """Draw one picture, or make one video, for each prompt."""
        request = GenerateRequest.of(**options)
        outputs = Outputs(out, latents, report, trace)
        request.validate()
        outputs.check(len(request.pictures))
        source = ConfigFile(config, transformer, transformer_2, lora or ())
        check_inputs(source, model)
        run(source, model, request, outputs, probe)

    app.command()(_with_request_options(generate))
    return app


def _with_request_options(command: Callable[..., None]) -> Callable[..., None]:
    """`command`, whose `options` are those of a request."""
    hints = get_type_hints(RequestItem) | get_type_hints(GenerateRequest)
    asked = []
    for setting in (*fields(RequestItem), *fields(GenerateRequest)):
        if "help" not in setting.metadata:
            continue
        option = typer.Option(help=setting.metadata["help"], show_default=setting.default is not None)
        kind = list[str] if setting.name == "prompt" else hints[setting.name]
        default = Parameter.empty if setting.default is MISSING else setting.default
        asked.append(
            Parameter(setting.name, Parameter.KEYWORD_ONLY, default=default, annotation=Annotated[kind, option])
        )
    own = signature(command, eval_str=True).parameters.values()
    named = [each.replace(kind=Parameter.KEYWORD_ONLY) for each in own if each.kind is not Parameter.VAR_KEYWORD]
    command.__signature__ = Signature([*named[:2], *asked, *named[2:]])  # type: ignore[attr-defined]
    return command


def add_check(app: typer.Typer, run: RunCheck) -> typer.Typer:
    """Give `app` the command `check`, which checks its arguments and calls `run`."""

    @app.command()
    def check(
        model: Annotated[str, typer.Argument(metavar="MODEL_DIR", help=MODEL_HELP)],
        config: Annotated[Path, typer.Option(help=CONFIG_HELP)],
        probe: Annotated[bool, typer.Option("--probe", help=f"Also {_PROBE}")] = False,
        as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object instead of tables.")] = False,
        transformer: TransformerFile = None,
        transformer_2: SecondFile = None,
        lora: LoraFiles = None,
    ) -> None:
        """Load the model and verify that sharding and offloading compose; nothing is drawn."""
        source = ConfigFile(config, transformer, transformer_2, lora or ())
        check_inputs(source, model)
        run(source, model, probe, as_json)

    return app


def run_app(app: typer.Typer, arguments: list[str] | None = None, complain: Callable[[str], None] | None = None) -> int:
    """Run `app` on `arguments` (the process's own by default) and return the exit code.

    0: done; 2: the user's input is wrong; 130: interrupted; 1: anything else. Only an error that this project did
    not raise on purpose prints a traceback. `complain` says what went wrong; by default it is said on stderr.
    """
    say = complain or complain_on_stderr
    try:
        typer.main.get_command(app).main(args=arguments, prog_name="crossdock")
    except CrossdockError as error:
        say(f"error: {error}")
        return error.exit_code
    except SystemExit as end:
        code = end.code if isinstance(end.code, int) else int(end.code is not None)
        if code == INTERRUPTED:
            say("interrupted")
        return code
    except KeyboardInterrupt:
        say("interrupted")
        return INTERRUPTED
    except Exception:
        traceback.print_exc()
        return 1
    return 0


def check_inputs(source: ConfigFile, model: str) -> None:
    """
    Raises:
        ConfigError, CheckpointError: what they name cannot be read.
    """
    source.config  # noqa: B018 (a mistake in it shows before the heavy imports)
    if not Path(model).is_dir() and hub_name(model) is None:
        raise CheckpointError(
            f"{model}: no such directory; give a checkpoint in the diffusers format, or a hub id: org/name"
        )


def located(model: str, console: Console, config: RunConfig) -> Path:
    """The model's directory; what is fetched of the hub is shown meanwhile."""
    with fetch_bar(model, console) as tell:
        return model_directory(model, lambda line: console.print(line, markup=False), tell, config.single_files)


def _check_writable(option: str, path: Path) -> None:
    folder = path.parent
    if not folder.is_dir():
        raise RequestError(f"{option} {path}: the folder {folder} does not exist; create it first")
    if path.is_dir():
        raise RequestError(f"{option} {path}: is a directory; give a file")
    if not os.access(path if path.exists() else folder, os.W_OK):
        raise RequestError(f"{option} {path}: cannot be written: no permission")
