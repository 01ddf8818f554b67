"""The process that runs the inputs of the fuzz test: each goes the way of the command line, up to where ranks begin.

    .venv/bin/python tests/fuzz_process.py json 17       one input alone, with what became of it

With `--serve FOLDER` it reads jobs from standard input, `KIND NUMBER LIMIT_S` each, and answers each with one line of
JSON. The parent waits for the answer no longer than it wants to: whatever hangs or dies was the input just given.
"""

from __future__ import annotations

import faulthandler
import fcntl
import gc
import json
import os
import pickle
import resource
import shutil
import sys
import tempfile
import termios
import time
import traceback
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any

from fuzzing import CANARY, CONFIG_FILE, RECIPES, FuzzInput, make_input

ADDRESS_SPACE = 16 * 2**30
"""Of this process: an input that asks for more gets a MemoryError, and the machine is spared."""
MEMORY_LIMIT = 2**30
"""Bytes above what the process held before."""
LONGEST_MESSAGE = 2000
LIMIT_S = 5.0
PRODUCT = tuple(
    f"{Path(__file__).resolve().parents[1] / room}/" for room in ("launch", "offload", "parallel", "runtime")
)
FORBIDDEN = ("os.system", "os.exec", "os.posix_spawn", "subprocess.Popen", "socket.connect", "socket.getaddrinfo")
"""Audit events that no input may cause: to start a program, or to ask the network."""

_CANARY_CODE = """\
from pathlib import Path
Path({marker!r}).write_text("executed")
class Canary:
    pass
"""


class ForbiddenError(BaseException):
    """Ends an input at what it must not do; no library takes it for a failed attempt."""


class Watch:
    """What an input must not do while it runs: execute code of its own, read standard input, start programs, connect.

    Args:
        marker: the file that the canary writes when it is executed.
    """

    def __init__(self, marker: Path) -> None:
        self.marker = marker
        self._seen: list[str] = []
        self._listens = False
        self._waiting = _offer_answers()
        sys.addaudithook(self._hear)

    def begin(self) -> None:
        self._seen.clear()
        self.marker.unlink(missing_ok=True)
        self._listens = True

    def problem(self) -> str | None:
        """The end of the input; what it did all the same, None: nothing."""
        self._listens = False
        if self.marker.exists():
            return "executed: code of the input was run"
        if _bytes_waiting() != self._waiting:
            self._waiting = _offer_answers()
            return "stdin: standard input was read"
        return f"forbidden: {self._seen[0]}" if self._seen else None

    def _hear(self, event: str, arguments: tuple[Any, ...]) -> None:
        if self._listens and event in FORBIDDEN:
            self._seen.append(f"{event} {arguments!r}"[:300])
            raise ForbiddenError(self._seen[-1])


def _offer_answers() -> int:
    """Standard input becomes a pipe with consent to every question in it; how many bytes wait there."""
    reading, writing = os.pipe()
    os.write(writing, b"y\n" * 100)
    os.dup2(reading, 0)
    os.close(reading)
    return _bytes_waiting()


def _bytes_waiting() -> int:
    return int.from_bytes(fcntl.ioctl(0, termios.FIONREAD, bytes(4)), sys.byteorder)


class CommandPath:
    """What the command line does before ranks exist, and what a rank without encoders loads."""

    def __init__(self, folder: Path, marker: Path) -> None:
        import torch

        from crossdock.runtime.models.tiny.make_checkpoint import make_checkpoint

        torch.set_num_threads(1)
        self.checkpoints = folder / "checkpoints"
        self.checkpoints.mkdir(exist_ok=True)
        for recipe in RECIPES:
            if not (self.checkpoints / recipe).exists():
                make_checkpoint(recipe, self.checkpoints / recipe)
        self._scratch = Path(tempfile.mkdtemp(prefix="scratch", dir=folder))
        for recipe in RECIPES:
            shutil.copytree(self.checkpoints / recipe, self._scratch / recipe, copy_function=os.link)
        os.chdir(self._scratch)
        self._marker = marker
        self._plans: dict[str, Any] = {}
        self._transformers: dict[tuple[str, ...], Any] = {}
        self._warm_up()

    def _warm_up(self) -> None:
        """Imports that the first of each kind would do, and the plans that requests are checked with."""
        for index, recipe in enumerate(RECIPES):
            self._write_config(layerwise=not index)
            self._plans[recipe] = self._plan_and_load(recipe, "")

    def attempt(self, given: FuzzInput) -> None:
        """Run an input; raises what the command line would."""
        if given.kind == "request":
            self._check_request(self._plans[given.recipe], dict(given.fields))
            return
        self._write_config(given.layerwise)
        place = self._scratch / (CONFIG_FILE if given.kind == "yaml" else f"{given.recipe}/{given.file}")
        place.unlink()  # it is a link to the undamaged one
        place.write_bytes(given.data)
        canaries = self._place_canaries(self._scratch / given.recipe) if CANARY.encode() in given.data else []
        try:
            self._plan_and_load(given.recipe, given.file)
        finally:
            for path in (place, *canaries):
                path.unlink(missing_ok=True)
            if given.kind != "yaml":
                os.link(self.checkpoints / given.recipe / given.file, place)

    def _write_config(self, layerwise: bool) -> None:
        path = self._scratch / CONFIG_FILE
        path.unlink(missing_ok=True)
        path.write_text("offload: {layerwise: true}\n" if layerwise else "{}\n", encoding="utf-8")

    def _plan_and_load(self, recipe: str, damaged: str) -> Any:
        from crossdock.launch.commands.generate import locating
        from crossdock.runtime.config.yaml_file import load_config
        from crossdock.runtime.plan.make_plan import make_plan

        config_path, model_dir = self._scratch / CONFIG_FILE, self._scratch / recipe
        config = load_config(config_path)
        with locating(config_path):
            plan = make_plan(config, model_dir, "cpu")
            self._check_request(plan, {"prompt": "a red fox in snow"})
            self._load(plan, recipe, damaged)
        return plan

    def _check_request(self, plan: Any, fields: dict[str, Any]) -> None:
        from crossdock.runtime.plan.request_checks import check_request
        from crossdock.runtime.request import GenerateRequest

        check_request(plan, GenerateRequest.of(**fields))

    def _load(self, plan: Any, recipe: str, damaged: str) -> None:
        """Load the pipeline, for schedulers, tokenizers and decoders; transformers are on meta, encoders left out.

        Transformers are built anew only where their own files are damaged.
        """
        import torch

        from crossdock.runtime.models.transformers import build_transformers, transformers_in
        from crossdock.runtime.pipeline.pipeline import _load_pipeline

        key = (recipe, plan.layout.spec.transformer, *plan.layout.transformers)
        model = self._transformers.get(key)
        if model is None or damaged.partition("/")[0] in plan.layout.transformers:
            model = build_transformers(plan.layout.spec.transformer, plan.layout.model_dir, plan.layout.transformers)
        if not damaged:
            self._transformers[key] = model
        streamed = dict(zip(plan.layout.transformers, transformers_in(model).values(), strict=True))
        _load_pipeline(plan.layout, torch.device("cpu"), streamed | dict.fromkeys(plan.layout.encoders))

    def _place_canaries(self, model_dir: Path) -> list[Path]:
        """Code and a pickle that tell when they are executed, wherever a checkpoint may have some."""
        folders = [model_dir, *(path for path in model_dir.iterdir() if path.is_dir())]
        for folder in folders:
            (folder / f"{CANARY}.py").write_text(_CANARY_CODE.format(marker=str(self._marker)), encoding="utf-8")
            (folder / f"{CANARY}.bin").write_bytes(pickle.dumps(_Executing(self._marker)))
        return [folder / f"{CANARY}{ending}" for folder in folders for ending in (".py", ".bin")]

    def problem_of(self, given: FuzzInput, error: BaseException) -> str | None:
        """What is wrong with how an input was refused; None: nothing, one message says what and where."""
        from crossdock.runtime.errors import UserError
        from crossdock.runtime.request import RequestOptions

        if not isinstance(error, UserError):
            return f"traceback: {type(error).__name__} {_where(error)}"
        message = str(error)
        if not message.strip() or "Traceback" in message:
            return "message: is empty, or a traceback"
        if len(message) > LONGEST_MESSAGE:
            return f"message: too long {_where(error)}"
        if given.kind == "request":
            names = ("prompts", *RequestOptions.__annotations__)
            return None if any(name in message for name in names) else "message: names no setting"
        folder, _, file = given.file.rpartition("/")
        here = str(self._scratch / given.recipe / folder) if folder else ""
        named = file in message or (here and here in message) or error.key is not None
        return None if named else f"message: does not name {file} {_where(error)}"


class _Executing:
    """A pickle that writes the marker when it is read."""

    def __init__(self, marker: Path) -> None:
        self._code = f"open({str(marker)!r}, 'w').write('executed')"

    def __reduce__(self) -> tuple[Callable[[str], Any], tuple[str]]:
        return exec, (self._code,)


def _where(error: BaseException) -> str:
    """The last line of the product that an exception passed, and the line that raised it."""
    frames = traceback.extract_tb(error.__traceback__)
    ours = [frame for frame in frames if frame.filename.startswith(PRODUCT)]
    named = [ours[-1], frames[-1]] if ours and ours[-1] is not frames[-1] else frames[-1:]
    return " <- ".join(f"{'/'.join(Path(f.filename).parts[-3:])}:{f.lineno} {f.name}" for f in named)


class Bench:
    """Runs inputs one after the other, and judges what became of each.

    Args:
        ends_hangs: the process ends where an input hangs; else that is left to the parent.
    """

    def __init__(self, folder: Path, ends_hangs: bool = False) -> None:
        self._folder = folder
        self._ends_hangs = ends_hangs
        self._watch = Watch(folder / "executed")
        self._path: CommandPath | None = None
        self._baseline = 0
        resource.setrlimit(resource.RLIMIT_AS, (ADDRESS_SPACE, ADDRESS_SPACE))

    def prepare(self) -> CommandPath:
        """Import everything and make the checkpoints, once; memory counts from then on."""
        if self._path is None:
            self._path = CommandPath(self._folder, self._watch.marker)
            gc.collect()
            gc.freeze()  # what is there stays, and need not be looked through for every input
            _forget_peak()
            self._baseline = _peak_bytes()
        return self._path

    def run(self, kind: str, number: str, limit_s: float) -> dict[str, Any]:
        """One input; what became of it: `accepted`, `refused`, or a problem in words, with details."""
        if kind == "planted":
            return self._judged(limit_s, PLANTED[number], lambda error: f"traceback: {type(error).__name__}")
        path = self.prepare()
        given = make_input(kind, int(number), path.checkpoints)
        return self._judged(limit_s, lambda: path.attempt(given), lambda error: path.problem_of(given, error))

    def _judged(
        self, limit_s: float, attempt: Callable[[], Any], problem_of: Callable[[BaseException], str | None]
    ) -> dict[str, Any]:
        outcome, problem, detail = "accepted", None, ""
        self._watch.begin()
        _forget_peak()
        with suppress(ValueError, OSError):  # standard error may be no file
            os.ftruncate(2, 0)
        faulthandler.dump_traceback_later(limit_s * 0.9, exit=self._ends_hangs)
        began = time.monotonic()
        try:
            attempt()
        except BaseException as error:  # SystemExit and a panic of a Rust library as well
            outcome, problem = "refused", self._watch.problem() or problem_of(error)
            detail = "".join(traceback.format_exception(error)) if problem else str(error)[:LONGEST_MESSAGE]
        seconds = time.monotonic() - began
        faulthandler.cancel_dump_traceback_later()
        memory = _peak_bytes() - self._baseline
        if memory > MEMORY_LIMIT:
            problem = f"memory: {memory / 2**30:.1f} GiB more than before"
        problem = self._watch.problem() or problem
        return {"outcome": outcome, "problem": problem, "detail": detail, "seconds": seconds, "memory": memory}


def _forget_peak() -> None:
    """Linux keeps the highest resident size since this was last written (proc(5), clear_refs)."""
    with suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")


def _peak_bytes() -> int:
    status = Path("/proc/self/status").read_text(encoding="ascii")
    return int(status.partition("VmHWM:")[2].split()[0]) * 1024


def _raise_error() -> None:
    raise ZeroDivisionError("planted")


def _read_pickle() -> None:
    pickle.loads(pickle.dumps(_Executing(Path(os.environ["CROSSDOCK_FUZZ_FOLDER"]) / "executed")))


PLANTED: dict[str, Callable[[], Any]] = {
    "raises": _raise_error,
    "exits": lambda: sys.exit(2),
    "hangs": lambda: time.sleep(600),
    "memory": lambda: bytearray(os.urandom(2**20)) * 1300,
    "executes": _read_pickle,
    "asks": lambda: os.read(0, 2),
    "starts": lambda: os.system("true"),
    "dies": lambda: os._exit(1),
}
"""Faults that the harness must find, by their number."""


def serve(folder: Path) -> None:
    """Answer jobs until there are no more."""
    jobs, answers = os.fdopen(os.dup(0)), os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what libraries print is no answer
    os.environ |= {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", "CROSSDOCK_FUZZ_FOLDER": str(folder)}
    faulthandler.enable()
    bench = Bench(folder)
    for job in jobs:
        kind, number, limit_s = job.split()
        if kind == "prepare":
            bench.prepare()
        answer = {} if kind in ("start", "prepare") else bench.run(kind, number, float(limit_s))
        print(json.dumps(answer), file=answers, flush=True)


def run_alone(kind: str, number: int) -> int:
    """One input, with everything that is known of it; the exit code. Where it hangs, with the lines that it is in."""
    folder = Path(tempfile.gettempdir()) / f"crossdock_fuzz_{os.getuid()}"
    shutil.rmtree(folder, ignore_errors=True)  # of one that hung
    folder.mkdir(mode=0o700)
    os.environ |= {"HF_HOME": str(folder / "hf"), "OMP_NUM_THREADS": "1", "CROSSDOCK_FUZZ_FOLDER": str(folder)}
    bench = Bench(folder, ends_hangs=True)
    print(make_input(kind, number, bench.prepare().checkpoints).describe(), flush=True)
    answer = bench.run(kind, str(number), LIMIT_S)
    os.chdir("/")
    shutil.rmtree(folder)
    print(answer.pop("detail"), json.dumps(answer, indent=2), sep="\n")
    return 1 if answer["problem"] else 0


if __name__ == "__main__":
    if sys.argv[1] == "--serve":
        serve(Path(sys.argv[2]))
    else:
        sys.exit(run_alone(sys.argv[1], int(sys.argv[2])))
