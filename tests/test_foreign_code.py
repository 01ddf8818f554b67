"""Every way in which a checkpoint could make a library run its code: refused by file, without a question.

`Canary` is code that writes a file when it is imported or called. No test may find that file.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers

from bomb import Bomb
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import CheckpointError
from crossdock.runtime.models.checkpoint import MODULAR_INDEX
from crossdock.runtime.models.foreign_code import component_to_blame, unasked
from crossdock.runtime.models.transformers import build_transformers, transformers_in
from crossdock.runtime.pipeline.pipeline import _load_pipeline
from crossdock.runtime.plan.make_plan import make_plan
from layouts import CONFIGS
from tiers import not_quick

CODE = """
import pathlib
pathlib.Path({marker!r}).touch()
from transformers import Qwen3Config as CanaryConfig, Qwen3ForCausalLM as Canary, Qwen2Tokenizer as CanaryTokenizer
"""


class Checkpoint:
    """A copy of a tiny checkpoint with foreign code lying about in all its folders, and nothing yet that names it."""

    def __init__(self, origin: Path, folder: Path) -> None:
        self.folder = Path(shutil.copytree(origin, folder / "model"))
        self.marker = folder / "ran"
        for place in (self.folder, *(each for each in self.folder.iterdir() if each.is_dir())):
            for name in ("canary.py", "pipeline.py", "modeling_canary.py"):
                (place / name).write_text(CODE.format(marker=str(self.marker)))

    def edit(self, file: str, change: Callable[[dict[str, Any]], Any]) -> None:
        path = self.folder / file
        content = json.loads(path.read_text())
        change(content)
        path.write_text(json.dumps(content))

    def load(self, layerwise: bool = True) -> None:
        """Plan, and load what a rank loads that runs no text encoder."""
        plan = make_plan(RunConfig.parse({"offload": {"layerwise": layerwise}}), self.folder, "cpu")
        model = build_transformers(plan.layout.spec.transformer, plan.layout.model_dir, plan.layout.transformers)
        given = dict(zip(plan.layout.transformers, transformers_in(model).values(), strict=True))
        _load_pipeline(plan.layout, torch.device("cpu"), given | dict.fromkeys(plan.layout.encoders))

    def refuses(self, *texts: str, layerwise: bool = True) -> None:
        with pytest.raises(CheckpointError) as caught:
            self.load(layerwise)
        for text in texts:
            assert text in str(caught.value)
        assert "\n" not in str(caught.value)
        assert not self.marker.exists(), "foreign code ran"


@pytest.fixture
def checkpoint(flux2_dir: Path, tmp_path: Path) -> Checkpoint:
    return Checkpoint(flux2_dir, tmp_path)


@pytest.fixture
def modular(checkpoint_of: Callable[[str], Path], tmp_path: Path) -> Checkpoint:
    folder = tmp_path / "modular"
    folder.mkdir()
    return Checkpoint(checkpoint_of("minimax-h3"), folder)


@pytest.fixture(autouse=True)
def nobody_to_ask(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """What is raised in a question is taken for a no, so that a question has to be counted."""
    questions: list[str] = []

    def ask(question: str = "") -> str:
        questions.append(question)
        return "y"

    monkeypatch.setattr("builtins.input", ask)
    yield
    assert questions == []


def test_code_that_nobody_names_is_no_harm(checkpoint: Checkpoint, modular: Checkpoint) -> None:
    """The other tests fail for what they change."""
    checkpoint.load()
    modular.load()
    assert not checkpoint.marker.exists()


AUTO_MAP = {
    "AutoConfig": "canary.CanaryConfig",
    "AutoModel": "canary.Canary",
    "AutoModelForCausalLM": "canary.Canary",
    "AutoTokenizer": ["canary.CanaryTokenizer", None],
    "AutoProcessor": "canary.Canary",
}
FILES = (
    "text_encoder/config.json",
    "text_encoder/generation_config.json",
    "tokenizer/tokenizer_config.json",
    "scheduler/scheduler_config.json",
    "vae/config.json",
    "transformer/config.json",
    "model_index.json",
)


@pytest.mark.parametrize("layerwise", [False, True])
@pytest.mark.parametrize("file", FILES)
def test_auto_map(file: str, layerwise: bool, checkpoint: Checkpoint) -> None:
    checkpoint.edit(file, lambda content: content.update(auto_map=AUTO_MAP))
    checkpoint.refuses(f"{file}: auto_map asks for code of the checkpoint's, which is never run", layerwise=layerwise)


def test_auto_map_of_a_model_that_transformers_lacks(checkpoint: Checkpoint) -> None:
    checkpoint.edit("text_encoder/config.json", lambda c: c.update(auto_map=AUTO_MAP, model_type="somebodys"))
    checkpoint.refuses("text_encoder/config.json: auto_map asks for code")


@pytest.mark.parametrize("where", ["text_config", "quantization_config"])
def test_auto_map_further_inside(where: str, checkpoint: Checkpoint) -> None:
    checkpoint.edit("text_encoder/config.json", lambda c: c.update({where: {"inner": [{"auto_map": AUTO_MAP}]}}))
    checkpoint.refuses(f"text_encoder/config.json: {where}.inner.0.auto_map asks for code")


@pytest.mark.parametrize("name", ["preprocessor_config.json", "processor_config.json", "sub/config.json"])
def test_auto_map_in_a_file_that_was_not_there(name: str, checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / "text_encoder" / name
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"auto_map": AUTO_MAP}))
    checkpoint.refuses(f"text_encoder/{name}: auto_map asks for code")


def test_auto_map_of_a_processor(modular: Checkpoint) -> None:
    modular.edit("processor/processor_config.json", lambda content: content.update(auto_map=AUTO_MAP))
    modular.refuses("processor/processor_config.json: auto_map asks for code")


def test_spelled_with_escapes(checkpoint: Checkpoint) -> None:
    path = checkpoint.folder / "tokenizer/tokenizer_config.json"
    path.write_text(path.read_text().replace("{", '{"auto\\u005fmap": {"AutoTokenizer": "canary.CanaryTokenizer"},', 1))
    checkpoint.refuses("tokenizer_config.json: auto_map asks for code")


def test_a_pipeline_that_nobody_asked_for(checkpoint: Checkpoint) -> None:
    """diffusers looks for the file of the pipeline that it was given, by name, also where it was given none."""
    shutil.copy(checkpoint.folder / "canary.py", checkpoint.folder / "None.py")
    checkpoint.refuses("None.py: diffusers takes it for a pipeline's code, which is never run; remove it")


@pytest.mark.parametrize("entry", ["None", "canary", "pipeline"])
def test_a_pipeline_of_its_own(entry: str, checkpoint: Checkpoint) -> None:
    """diffusers takes a list for a module of the checkpoint."""
    checkpoint.edit("model_index.json", lambda index: index.update(_class_name=[entry, "Canary"]))
    checkpoint.refuses("model_index.json: has no _class_name that is a string")


@pytest.mark.parametrize("key", ["custom_pipeline", "custom_pipelines", "custom_generate", "auto_map"])
def test_a_custom_pipeline(key: str, checkpoint: Checkpoint) -> None:
    checkpoint.edit("model_index.json", lambda index: index.update({key: "canary"}))
    checkpoint.refuses(f"model_index.json: {key} asks for code")


def test_a_config_that_another_file_takes_the_place_of(checkpoint: Checkpoint) -> None:
    """transformers chooses among them by the version in their names; one may look like an index of weights."""
    name = "config.4.0.0+x.index.json"
    path = checkpoint.folder / "text_encoder" / name
    config = json.loads((path.parent / "config.json").read_text())
    path.write_text(json.dumps({**config, "weight_map": {"a": "b"}, "auto_map": AUTO_MAP}))
    checkpoint.refuses(f"text_encoder/{name}: ")
    path.unlink()
    checkpoint.edit("text_encoder/config.json", lambda content: content.update(configuration_files=[name]))
    checkpoint.refuses("text_encoder/config.json: configuration_files names other files to read in its place")


def test_a_module_of_that_name_is_not_even_imported(checkpoint: Checkpoint, monkeypatch: pytest.MonkeyPatch) -> None:
    """Where the checkpoint is the working directory, its modules could be found."""
    monkeypatch.chdir(checkpoint.folder)
    monkeypatch.syspath_prepend(str(checkpoint.folder))
    checkpoint.edit("model_index.json", lambda index: index.update(scheduler=["canary", "Canary"]))
    checkpoint.refuses("model_index.json: scheduler: found canary, Canary: there is no such class")
    assert "canary" not in sys.modules


@pytest.mark.parametrize("component", ["scheduler", "tokenizer", "text_encoder", "vae"])
@pytest.mark.parametrize(
    "entry",
    [
        ["canary", "Canary"],
        ["subprocess", "Popen"],
        ["crossdock.runtime.worker", "RankWorker"],
        ["diffusers.utils", "logging"],
        ["diffusers", "DiffusionPipeline"],
        ["diffusers", "ModularPipeline"],
        ["diffusers", "AutoModel"],
        ["transformers", "AutoModel"],
        ["transformers", "AutoTokenizer"],
        ["transformers", "Pipeline"],
        ["transformers", "Trainer"],
        ["transformers", "no.such"],
        ["..", "x"],
    ],
    ids=".".join,
)
def test_a_component_that_is_none(component: str, entry: list[str], checkpoint: Checkpoint) -> None:
    """A module of the checkpoint's or of another package, a pipeline inside a pipeline, a class that looks for one."""
    checkpoint.edit("model_index.json", lambda index: index.update({component: entry}))
    checkpoint.refuses(f"{component}")


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("type_hint", "names another"),
        ("pretrained_model_name_or_path", "names another place"),
        ("subfolder", "names another place"),
    ],
)
def test_an_entry_of_blocks_that_points_elsewhere(name: str, text: str, modular: Checkpoint, tmp_path: Path) -> None:
    """A pipeline of blocks says of each component where it lies, and once more of which class it is."""
    foreign = shutil.copytree(modular.folder / "scheduler", tmp_path / "elsewhere")
    value = {"type_hint": ["diffusers", "DiffusionPipeline"], "subfolder": "../elsewhere"}.get(name, str(foreign))
    modular.edit(MODULAR_INDEX, lambda index: index["scheduler"][2].update({name: value}))
    if name == "pretrained_model_name_or_path":  # a copy of a repository: what lies here is what is loaded
        modular.load()
        return
    modular.refuses(MODULAR_INDEX, text)


def test_an_entry_of_blocks_with_another_class(modular: Checkpoint) -> None:
    """In its own place: the class is named once more, and that is the one that would be loaded."""
    own = {"type_hint": ["diffusers", "DiffusionPipeline"], "pretrained_model_name_or_path": str(modular.folder)}
    modular.edit(MODULAR_INDEX, lambda index: index["scheduler"][2].update(own, subfolder="scheduler"))
    modular.refuses(MODULAR_INDEX, "scheduler: ", "is no class of a component")


def test_what_a_terminal_would_obey(checkpoint: Checkpoint) -> None:
    checkpoint.edit("model_index.json", lambda index: index.update(scheduler=["diffusers", "X\x1b[2J\nforged"]))
    checkpoint.refuses("model_index.json: scheduler: found diffusers, X\\x1b[2J\\nforged: there is no such class")


@pytest.mark.parametrize("part", ["", ".text_config"])
@pytest.mark.parametrize(
    "key", ["attn_implementation", "_attn_implementation", "_attn_implementation_internal", "experts_implementation"]
)
def test_kernels_of_a_repository(key: str, part: str, checkpoint: Checkpoint) -> None:
    value: Any = {"text_config": "somebody/kernels"} if part else "somebody/kernels"
    checkpoint.edit("text_encoder/config.json", lambda config: config.update({key: value}))
    checkpoint.refuses(f"text_encoder/config.json: {key}{part} is 'somebody/kernels': code is not downloaded")


def test_an_adapter(checkpoint: Checkpoint) -> None:
    (checkpoint.folder / "text_encoder/adapter_config.json").write_text('{"base_model_name_or_path": "somebody/model"}')
    checkpoint.refuses("text_encoder/adapter_config.json: an adapter names another model to load")


@pytest.mark.parametrize("component", ["vae", "text_encoder", "transformer"])
@pytest.mark.parametrize("name", ["diffusion_pytorch_model.bin", "pytorch_model.bin"])
def test_pickled_weights(name: str, component: str, checkpoint: Checkpoint) -> None:
    folder = checkpoint.folder / component
    for file in (*folder.glob("*.safetensors"), *folder.glob("*.index.json")):
        file.unlink()
    torch.save({"weight": Bomb(checkpoint.marker)}, folder / name)
    checkpoint.refuses(
        f"{component}: holds no safetensors files, and others are never read ({name}); where you trust its publisher"
    )


def test_pickled_weights_beside_the_others(checkpoint: Checkpoint) -> None:
    for component in ("vae", "text_encoder", "transformer"):
        for name in ("diffusion_pytorch_model.bin", "pytorch_model.bin"):
            torch.save({"weight": Bomb(checkpoint.marker)}, checkpoint.folder / component / name)
    checkpoint.load()
    assert not checkpoint.marker.exists()


ESCAPES = {
    "a class": "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    "a module": "{{ self.__init__.__globals__ }}",
    "what it was given": "{{ messages.append('x') }}",
}


@pytest.mark.parametrize("template", ESCAPES.values(), ids=ESCAPES)
def test_a_template_of_chats_stays_in_its_sandbox(template: str, checkpoint: Checkpoint) -> None:
    """Rendered by transformers on a rank, where a text is encoded."""
    (checkpoint.folder / "tokenizer/chat_template.jinja").write_text(template)
    checkpoint.load()
    tokenizer = transformers.Qwen2Tokenizer.from_pretrained(checkpoint.folder / "tokenizer", local_files_only=True)
    with pytest.raises(Exception, match=r"unsafe|undefined|has no attribute"):
        tokenizer.apply_chat_template([{"role": "user", "content": "a fox"}], tokenize=False)


def test_what_would_be_asked_is_refused(checkpoint: Checkpoint) -> None:
    """Were a file overlooked: transformers raises where it would ask."""
    checkpoint.edit("text_encoder/config.json", lambda c: c.update(auto_map=AUTO_MAP, model_type="somebodys"))
    with unasked(), pytest.raises(ValueError, match="trust_remote_code"):
        transformers.AutoConfig.from_pretrained(checkpoint.folder / "text_encoder", local_files_only=True)
    assert not checkpoint.marker.exists()


def test_the_component_to_blame(checkpoint: Checkpoint) -> None:
    assert component_to_blame(checkpoint.folder, without=()) is None
    (checkpoint.folder / "tokenizer/tokenizer.json").write_text("{")
    assert component_to_blame(checkpoint.folder, without=()) == checkpoint.folder / "tokenizer"
    assert component_to_blame(checkpoint.folder, without=("tokenizer",)) is None
    checkpoint.refuses(f"{checkpoint.folder / 'tokenizer'}: Flux2KleinPipeline cannot be loaded: ")


@not_quick
def test_a_y_on_standard_input(checkpoint: Checkpoint, tmp_path: Path) -> None:
    """The attack as it was seen: `yes | crossdock generate ...`."""
    checkpoint.edit("text_encoder/config.json", lambda c: c.update(auto_map=AUTO_MAP, model_type="somebodys"))
    command = [sys.executable, "-m", "crossdock.launch.cli", "generate", str(checkpoint.folder), "--prompt", "a fox"]
    command += ["--config", str(CONFIGS / "layerwise.yaml"), "--out", str(tmp_path / "out.png")]
    run = subprocess.run(command, input="y\n" * 1000, capture_output=True, text=True, timeout=120)
    assert run.returncode == 2, run.stderr
    assert "text_encoder/config.json: auto_map asks for code of the checkpoint's" in run.stderr
    assert "Do you wish" not in run.stdout + run.stderr
    assert "Traceback" not in run.stderr
    assert not checkpoint.marker.exists()
