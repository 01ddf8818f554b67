"""LoRA adapters, merged as weights are read: as diffusers fuses them, in every layout; what does not fit is refused."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from judged_run import HereGang, Run
from one_rank import admitted, rank_request
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from crossdock.launch import cli
from crossdock.launch.commands.options import ConfigFile, run_app
from crossdock.launch.engine.engine import Engine
from crossdock.parallel.tensor import TensorSlice
from crossdock.runtime.adapters.lora import Changes, Lora
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.errors import ConfigError, RequestError
from crossdock.runtime.models.checkpoint import stored_tensors, weight_files
from crossdock.runtime.models.families import spec_for
from crossdock.runtime.models.transformers import build_transformers, transformers_in
from crossdock.runtime.plan.make_plan import make_plan
from crossdock.runtime.rank.weights import load
from crossdock.runtime.rank.weights.source import WeightSource
from crossdock.runtime.rank.worker import RankWorker
from crossdock.runtime.watch.gang import Gang
from layouts import CONFIGS
from reference import EVEN_SIZE, PROMPT, TOLERANCE, max_error, reference_latents
from tiers import not_quick, some

State = dict[str, Tensor]
RANK, SCALE, STEPS = 3, 0.75, 2
FAMILIES = ("flux2-klein", "qwen-image", "z-image", "flux1")
DEMO = Path(__file__).parent / "emoji_model" / "model"


def _linears(directory: Path, component: str = "transformer") -> dict[str, nn.Linear]:
    """Of attention and feed-forward, in blocks; on meta."""
    spec = spec_for(directory)
    (transformer,) = transformers_in(build_transformers(spec.transformer, directory, (component,))).values()
    named = {name: module for name, module in transformer.named_modules() if isinstance(module, nn.Linear)}
    return {name: module for name, module in named.items() if any(part in name for part in ("attn", "attention", "ff"))}


def _adapter(directory: Path, seed: int = 0, strength: float = 0.05, every: int = 1) -> State:
    """In diffusers' names."""
    generator, state = torch.Generator().manual_seed(seed), State()
    for number, (name, linear) in enumerate(_linears(directory).items()):
        if number % every == 0:
            a = torch.randn(RANK, linear.in_features, generator=generator)
            b = torch.randn(linear.out_features, RANK, generator=generator) * strength / linear.in_features**0.5
            state |= {f"transformer.{name}.lora_A.weight": a, f"transformer.{name}.lora_B.weight": b}
    return state


def _saved(state: Mapping[str, Tensor], file: Path, metadata: Mapping[str, str] | None = None) -> Path:
    save_file(dict(state), file, dict(metadata or {}))
    return file


def _config(loras: Any, **parsed: Any) -> RunConfig:
    return RunConfig.parse({"loras": loras, **parsed})


def _read(directory: Path, file: Path, **lora: Any) -> dict[str, Tensor]:
    """The change of every weight, as planned."""
    (planned,) = make_plan(_config([{"path": str(file), **lora}]), directory, "cpu").layout.loras
    changes, stored = Changes([planned]), stored_tensors(directory / "transformer")
    return {fqn: changes.rows(fqn, 0, stored[fqn].shape[0]) for fqn in sorted(planned.targets)}


# -- as diffusers fuses it -------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def adapted(
    checkpoint_of: Callable[[str], Path], tmp_path_factory: pytest.TempPathFactory
) -> Mapping[str, tuple[Path, Path, Path]]:
    """Family -> its tiny checkpoint, an adapter, and a checkpoint into which diffusers has fused it."""
    peft = Path(sys.prefix) / "peft"
    if not peft.is_dir():
        pytest.skip("diffusers fuses with PEFT, which make .venv/.installed puts into .venv/peft")
    folder, made = tmp_path_factory.mktemp("lora"), {}
    for family in some(FAMILIES, 2):
        directory = checkpoint_of(family)
        file = _saved(_adapter(directory), folder / f"{family}.safetensors")
        made[family] = directory, file, folder / family
    program = Path(__file__).parent / "fuse_lora.py"
    paths = [str(path) for paths in made.values() for path in paths]
    environment = os.environ | {"PYTHONPATH": str(peft)}
    command = [sys.executable, str(program), str(SCALE), *paths]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-2000:]
    return made


@not_quick
@pytest.mark.parametrize("family", some(FAMILIES, 2))
def test_one_rank_is_diffusers(family: str, adapted: Mapping[str, tuple[Path, Path, Path]]) -> None:
    directory, file, fused = adapted[family]
    plan = make_plan(_config([{"path": str(file), "scale": SCALE}]), directory, "cpu")
    with admitted(plan) as worker:
        result = worker.generate(rank_request(PROMPT, steps=STEPS, height=EVEN_SIZE[0], width=EVEN_SIZE[1]))
    expected = reference_latents(fused, steps=STEPS)
    error, without = max_error(result.latents, expected), max_error(reference_latents(directory, steps=STEPS), expected)
    print(f"{family}: {error:.1e} from diffusers, which without the adapter is {without:.1e} away")
    assert error <= TOLERANCE < without / 10


LAYOUTS: dict[str, dict[str, Any]] = {
    "layerwise_tp2": {"parallel": {"tp_degree": 2}, "offload": {"layerwise": True}},
    "layerwise_hsdp": {
        "parallel": {"dp_degree": 2, "hsdp": {"replicate": 1, "shard": 2}},
        "offload": {"layerwise": True},
    },
    "ulysses2": {"parallel": {"ulysses_degree": 2}},
    "hsdp": {"parallel": {"dp_degree": 2, "hsdp": {"replicate": 1, "shard": 2}}},
}


@not_quick
@pytest.mark.parametrize("layout", some(list(LAYOUTS), 2))
@pytest.mark.parametrize("family", some(FAMILIES, 1))
def test_layouts_are_diffusers(
    layout: str, family: str, adapted: Mapping[str, tuple[Path, Path, Path]], gang_of: Callable[[int], Gang]
) -> None:
    """With the adapter, without it afterwards, in the same gang, whose host memory is kept; every bit is the base's."""
    directory, file, fused = adapted[family]
    asked = {"steps": STEPS, "height": EVEN_SIZE[0], "width": EVEN_SIZE[1]}
    made = []
    for loras in ((), [{"path": str(file), "scale": SCALE}], ()):
        with Engine.start(_config(loras, **LAYOUTS[layout]), directory, gang_of(2)) as engine:
            generation = engine.generate([PROMPT], **asked)
        made.append(generation.latents[0])
        assert [each["scale"] for each in generation.report["loras"]] == [SCALE] * len(loras)
    error = max_error(made[1], reference_latents(fused, steps=STEPS))
    print(f"{family}, {layout}: {error:.1e} from diffusers' fused")
    assert error <= TOLERANCE
    assert torch.equal(made[0], made[2])
    assert max_error(made[0], made[1]) > 10 * TOLERANCE


# -- exactly ---------------------------------------------------------------------------------------------------------


def _exact(directory: Path) -> State:
    """Of few powers of two, so that no sum is rounded: whoever merges it gets the same."""
    state = _adapter(directory, every=2)
    for name, tensor in state.items():
        place = torch.arange(tensor.numel()).reshape(tensor.shape)
        state[name] = torch.where(place % 5 == 0, 2.0 ** -(place % 3 + (2 if "lora_B" in name else 1)), 0.0)
    return state


@pytest.fixture(scope="module")
def merged(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """An adapter for the demo model, and that model with the adapter merged by hand, in bf16."""
    folder = tmp_path_factory.mktemp("merged")
    state = _exact(DEMO)
    file = _saved(state, folder / "adapter.safetensors")
    shutil.copytree(DEMO, folder / "model")
    for weights in weight_files(folder / "model" / "transformer"):
        tensors = load_file(weights)
        for name in tensors.keys() & {f"{one}.weight" for one in _linears(DEMO)}:
            key = f"transformer.{name.removesuffix('.weight')}"
            if f"{key}.lora_A.weight" in state:
                change = state[f"{key}.lora_B.weight"] @ state[f"{key}.lora_A.weight"]
                tensors[name] = (tensors[name].float() + change * 2.0).to(torch.bfloat16)
        save_file(tensors, weights, {"format": "pt"})
    return file, folder / "model"


BITS: dict[str, dict[str, Any]] = {
    "layerwise": {"offload": {"layerwise": True}},
    "layerwise, encoded": {"offload": {"layerwise": True, "codec": "lossless"}},
    "resident": {},
}


@pytest.mark.parametrize("layout", list(BITS))
def test_every_bit_is_that_of_the_merged_checkpoint(layout: str, merged: tuple[Path, Path]) -> None:
    """Also where all bytes that arrive are compared: the check reads base and adapter itself."""
    file, model = merged
    assert torch.equal(_latents(DEMO, file, **BITS[layout]), _latents(model, None, **BITS[layout]))


def _latents(directory: Path, file: Path | None, **parsed: Any) -> Tensor:
    loras = [] if file is None else [{"path": str(file), "scale": 2.0}]
    plan = make_plan(_config(loras, dtype="bfloat16", **parsed), directory, "cpu")
    request = rank_request(PROMPT, steps=1, height=48, width=48, guidance_scale=3.0)
    with Run(plan, HereGang(), all_rows=True) as run:
        (result,) = run.ask(RankWorker.generate, request)
        run.coordinator.review([result])
        latents: Tensor = result.latents
        return latents


def test_from_a_packed_checkpoint(merged: tuple[Path, Path], tmp_path: Path) -> None:
    """What the adapter changes is read, changed and encoded; all else is taken over."""
    file, model = merged
    assert run_app(cli.app, ["pack", str(DEMO), str(tmp_path / "packed")]) == 0
    config = _config([{"path": str(file), "scale": 2.0}], dtype="bfloat16")
    one = make_plan(config, tmp_path / "packed", "cpu").layout
    other = WeightSource(stored_tensors(model / "transformer"))
    source = WeightSource(one.stored, one.loras)
    for fqn in one.stored:
        assert torch.equal(source.rows(fqn).to(torch.bfloat16), other.rows(fqn)), fqn
    encoded = BITS["layerwise, encoded"]
    assert torch.equal(_latents(tmp_path / "packed", file, **encoded), _latents(model, None, **encoded))


def test_any_rows_of_any_part(flux2_dir: Path, tmp_path: Path) -> None:
    """However they are cut and in whatever order they are read, the same bits; several adapters add up."""
    files = [_saved(_adapter(flux2_dir, seed), tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    loras = [{"path": str(files[0]), "scale": 0.5}, {"path": str(files[1]), "scale": -2.0}]
    layout = make_plan(_config(loras), flux2_dir, "cpu").layout
    source, base = WeightSource(layout.stored, layout.loras), WeightSource(layout.stored)
    fqn = max(layout.loras[0].targets, key=lambda name: layout.stored[name].shape[0])
    rows, columns = layout.stored[fqn].shape
    whole = source.rows(fqn)
    states = [load_file(file) for file in files]
    key = f"transformer.{fqn.removesuffix('.weight')}.lora_"
    a, b = ([state[f"{key}{letter}.weight"] for state in states] for letter in "AB")
    right = base.rows(fqn) + 0.5 * (b[0] @ a[0]) - 2.0 * (b[1] @ a[1])
    torch.testing.assert_close(whole, right, rtol=1e-5, atol=1e-6)
    assert not torch.equal(whole, base.rows(fqn))
    for first, last in ((0, 1), (rows - 1, rows), (rows // 2, rows // 2 + 7), (3, 3)):
        assert torch.equal(source.rows(fqn, None, first, last), whole[first:last])
    assert torch.equal(source.picked(fqn, torch.tensor([0, 5, rows - 1])), whole[[0, 5, rows - 1]])
    cut = TensorSlice(0, ((1, 9), (rows - 4, rows)), rows)
    assert torch.equal(source.rows(fqn, cut), torch.cat([whole[1:9], whole[rows - 4 :]]))
    cut = TensorSlice(1, ((2, 4), (columns - 3, columns)), columns)
    assert torch.equal(source.rows(fqn, cut), torch.cat([whole[:, 2:4], whole[:, columns - 3 :]], 1))
    assert torch.equal(source.flat(fqn, cut, 7, 23), torch.cat([whole[:, 2:4], whole[:, -3:]], 1).reshape(-1)[7:23])


# -- spellings -------------------------------------------------------------------------------------------------------


def _kohya(state: State, alpha: float) -> State:
    found = {}
    for name, tensor in state.items():
        module, _, letter = name.removeprefix("transformer.").removesuffix(".weight").rpartition(".lora_")
        flat = "lora_unet_" + module.replace(".", "_")
        found[f"{flat}.lora_{'down' if letter == 'A' else 'up'}.weight"] = tensor
        found[f"{flat}.alpha"] = torch.tensor(alpha)
    return found


def _renamed(begin: str) -> Callable[[State], State]:
    return lambda state: {name.replace("transformer.", begin, 1): tensor for name, tensor in state.items()}


def _metadata(**told: object) -> dict[str, str]:
    return {"lora_adapter_metadata": json.dumps({f"transformer.{name}": value for name, value in told.items()})}


@pytest.mark.parametrize("family", ["qwen-image", "z-image"])
def test_kohyas_and_comfyuis_names(family: str, checkpoint_of: Callable[[str], Path], tmp_path: Path) -> None:
    """As diffusers' converters read them; alpha over rank scales the change."""
    directory = checkpoint_of(family)
    state = _adapter(directory)
    plain = _read(directory, _saved(state, tmp_path / "plain.safetensors"))
    comfy = _read(directory, _saved(_renamed("diffusion_model.")(state), tmp_path / "comfy.safetensors"))
    kohya = _read(directory, _saved(_kohya(state, RANK / 2), tmp_path / "kohya.safetensors"))
    assert plain.keys() == comfy.keys() == kohya.keys()
    assert len(plain) == len(state) // 2 > 10
    for fqn, change in plain.items():
        assert torch.equal(comfy[fqn], change)
        torch.testing.assert_close(kohya[fqn], change / 2, rtol=1e-5, atol=1e-8)


def test_fused_layers_of_another_spelling(flux2_dir: Path, tmp_path: Path) -> None:
    """One change of queries, keys and values together, in Black Forest Labs' names: as diffusers cuts it."""
    linears = _linears(flux2_dir)
    width = linears["transformer_blocks.0.attn.to_q"].in_features
    a, b = torch.randn(RANK, width), torch.randn(3 * width, RANK)
    begin = "diffusion_model.double_blocks.0.img_attn.qkv.lora_"
    file = _saved({f"{begin}A.weight": a, f"{begin}B.weight": b}, tmp_path / "bfl.safetensors")
    found = _read(flux2_dir, file)
    for place, name in enumerate("qkv"):
        change = found[f"transformer_blocks.0.attn.to_{name}.weight"]
        torch.testing.assert_close(change, b[place * width : (place + 1) * width] @ a)


def test_pefts_own_file(flux2_dir: Path, tmp_path: Path) -> None:
    """Its config beside it has the alphas; and so has the metadata of diffusers' files."""
    state = _adapter(flux2_dir)
    plain = _read(flux2_dir, _saved(state, tmp_path / "plain.safetensors"), scale=1.0)
    first, *others = (fqn.removesuffix(".weight") for fqn in plain)
    told: dict[str, Any] = {"r": RANK, "lora_alpha": 2 * RANK, "alpha_pattern": {first: 5 * RANK}, "use_rslora": False}
    folder = tmp_path / "peft"
    folder.mkdir()
    _saved(_renamed("base_model.model.")(state), folder / "adapter_model.safetensors")
    (folder / "adapter_config.json").write_text(json.dumps(told))
    other = _saved(state, tmp_path / "told.safetensors", _metadata(**told))
    for found in (_read(flux2_dir, folder), _read(flux2_dir, other)):
        torch.testing.assert_close(found[f"{first}.weight"], plain[f"{first}.weight"] * 5)
        for name in others:
            torch.testing.assert_close(found[f"{name}.weight"], plain[f"{name}.weight"] * 2)
    root = _saved(state, tmp_path / "root.safetensors", _metadata(**(told | {"use_rslora": True})))
    torch.testing.assert_close(
        _read(flux2_dir, root)[f"{others[0]}.weight"], plain[f"{others[0]}.weight"] * 2 * RANK**0.5
    )


def test_options_of_the_command_line(flux2_dir: Path, tmp_path: Path) -> None:
    file = _saved(_adapter(flux2_dir), tmp_path / "a:b.safetensors")
    config = tmp_path / "run.yaml"
    config.write_text(f"loras: [{{path: '{file}'}}]\n")
    given = [str(file), f"{file}:0.5", f"{file}:-1e-1", "other.safetensors"]
    found = [(lora.path, lora.scale) for lora in ConfigFile(config, loras=given).config.loras]
    own = str(file)
    assert found == [(own, 1.0), (own, 1.0), (own, 0.5), (own, -0.1), (str(Path("other.safetensors").absolute()), 1.0)]
    for wrong in ("x.safetensors:much", "x.safetensors:nan", "x.safetensors:"):
        with pytest.raises(RequestError, match=f"--lora {wrong}: found .* for a scale; allowed: PATH or PATH:NUMBER"):
            _ = ConfigFile(config, loras=[wrong]).config


# -- what is refused -------------------------------------------------------------------------------------------------

Q = "transformer.transformer_blocks.0.attn.to_q"


def _without(state: State, name: str) -> State:
    return {each: tensor for each, tensor in state.items() if each != name}


REFUSED: dict[str, tuple[Callable[[State], State], str]] = {
    "nothing": (lambda state: {}, "holds no LoRA|not a whole safetensors file"),
    "half of it": (lambda state: _without(state, f"{Q}.lora_B.weight"), "to_q.lora_B.weight: is not there"),
    "another width": (
        lambda state: state | {f"{Q}.lora_A.weight": torch.ones(RANK, 5)},
        r"0.attn.to_q: changes a weight of \[\d+, 5\], and that of .* is .*; is it for another model",
    ),
    "other ranks": (
        lambda state: state | {f"{Q}.lora_A.weight": torch.ones(RANK + 1, 5)},
        r"to_q: found \[4, 5\] and .*; expected \[r, in\] and \[out, r\]",
    ),
    "a module that is not there": (
        lambda state: (
            state
            | {
                "transformer.nobody.lora_A.weight": torch.ones(1, 5),
                "transformer.nobody.lora_B.weight": torch.ones(5, 1),
            }
        ),
        "nobody: Flux2Transformer2DModel has no such module",
    ),
    "a module that is no linear layer": (
        lambda state: (
            state
            | {
                "transformer.transformer_blocks.0.attn.norm_q.lora_A.weight": torch.ones(1, 5),
                "transformer.transformer_blocks.0.attn.norm_q.lora_B.weight": torch.ones(5, 1),
            }
        ),
        "norm_q: is a RMSNorm of Flux2Transformer2DModel; only linear layers are changed",
    ),
    "DoRA": (lambda state: state | {f"{Q}.lora_magnitude_vector": torch.ones(5)}, "lora_magnitude_vector: DoRA is not"),
    "LoKr": (lambda state: {"lycoris_x.lokr_w1": torch.ones(2, 2)}, "lycoris_x.lokr_w1: LoKr is not read"),
    "biases": (lambda state: state | {f"{Q}.lora_B.bias": torch.ones(5)}, "to_q.lora_B.bias: biases is not read"),
    "a text encoder's": (
        lambda state: (
            state
            | {
                "text_encoder.layers.0.lora_A.weight": torch.ones(1, 5),
                "text_encoder.layers.0.lora_B.weight": torch.ones(5, 1),
            }
        ),
        "text_encoder.layers.0.lora_A.weight: changes a text encoder",
    ),
    "integers": (
        lambda state: state | {f"{Q}.lora_A.weight": torch.ones(RANK, 5, dtype=torch.int8)},
        "of torch.int8; expected",
    ),
    "an alpha that is none": (
        lambda state: state | {f"{Q}.alpha": torch.tensor(float("nan"))},
        "to_q: its alpha is nan",
    ),
    "something else": (lambda state: {"conv.weight": torch.ones(3, 3)}, "conv.weight|is no LoRA"),
}


@pytest.mark.parametrize("what", list(REFUSED))
def test_what_does_not_fit_is_named(what: str, flux2_dir: Path, tmp_path: Path) -> None:
    change, told = REFUSED[what]
    file = _saved(change(_adapter(flux2_dir)), tmp_path / "adapter.safetensors")
    with pytest.raises(ConfigError, match=told) as caught:
        make_plan(_config([{"path": str(file)}]), flux2_dir, "cpu")
    assert caught.value.key == "loras.0.path"
    assert str(file) in str(caught.value)


def _files(folder: Path) -> Iterator[tuple[Path, str]]:
    yield folder / "none.safetensors", "no such file; give a LoRA's .safetensors file"
    yield folder, "found none; give the one .safetensors file of the adapter"
    (folder / "two").mkdir()
    for name in "ab":
        (folder / "two" / f"{name}.safetensors").touch()
    yield folder / "two", "found a.safetensors, b.safetensors; give the one"
    (folder / "pickle.bin").write_bytes(b"\x80\x04.")
    yield folder / "pickle.bin", r"is no .safetensors file; others are never read \(pickles run code\)"
    (folder / "cut").mkdir()
    (folder / "cut" / "x.safetensors").write_bytes(b"\x10\x00\x00\x00\x00\x00\x00\x00{}")
    yield folder / "cut", "x.safetensors: not a whole safetensors file"


def test_what_is_no_file_of_an_adapter(flux2_dir: Path, tmp_path: Path) -> None:
    for path, told in _files(tmp_path):
        with pytest.raises(ConfigError, match=told):
            make_plan(_config([{"path": str(path)}]), flux2_dir, "cpu")
    file = _saved(_adapter(flux2_dir), tmp_path / "adapter.safetensors", {"lora_adapter_metadata": "{"})
    with pytest.raises(ConfigError, match="what says its alphas cannot be read"):
        make_plan(_config([{"path": str(file)}]), flux2_dir, "cpu")


def test_one_message_on_the_command_line(flux2_dir: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    options = [
        f"--config={CONFIGS / 'layerwise.yaml'}",
        "--prompt=a fox",
        f"--lora={tmp_path / 'none.safetensors'}:0.5",
    ]
    assert run_app(cli.app, ["generate", str(flux2_dir), *options]) == 2
    said = capsys.readouterr().err
    assert "none.safetensors: no such file; give a LoRA's .safetensors file" in said
    assert "Traceback" not in said


def test_another_component_and_files_that_stay_in_use(flux2_dir: Path, tmp_path: Path) -> None:
    file = _saved(_adapter(flux2_dir), tmp_path / "adapter.safetensors")
    with pytest.raises(ConfigError, match=r"loras\.0\.component: found transformer_2; the checkpoint has transformer"):
        make_plan(_config([{"path": str(file), "component": "transformer_2"}]), flux2_dir, "cpu")
    mapped = _config([{"path": str(file)}], offload={"layerwise": True, "host": "mmap"})
    with pytest.raises(ConfigError, match=r"found mmap, but .* is changed by an adapter; use host: shared"):
        make_plan(mapped, flux2_dir, "cpu")


def test_host_memory_is_not_taken_for_another_adapters(flux2_dir: Path, tmp_path: Path) -> None:
    files = [_saved(_adapter(flux2_dir, seed), tmp_path / f"{seed}.safetensors") for seed in (0, 1)]
    asked: list[Any] = [[], *([{"path": str(file), "scale": scale}] for file in files for scale in (1.0, 0.5))]
    plans = [make_plan(_config(loras, offload={"layerwise": True}), flux2_dir, "cpu") for loras in asked]
    keys = [load.HostPart("node", 0, 0).key(plan, 1) for plan in plans]
    assert len(set(keys)) == len(keys)


# -- faults ----------------------------------------------------------------------------------------------------------


def test_a_rank_that_does_not_merge_it_is_caught(
    flux2_dir: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Not at all, with another scale, twice, or into another weight: the first arrival is not what it has to be."""
    file = _saved(_adapter(flux2_dir), tmp_path / "adapter.safetensors")
    plan = make_plan(_config([{"path": str(file)}], offload={"layerwise": True}), flux2_dir, "cpu")
    (lora,) = plan.layout.loras
    q, k = ("single_transformer_blocks.1.attn.to_out.weight", "single_transformer_blocks.0.attn.to_out.weight")

    class Crossed(Changes):
        def rows(self, fqn: str, first: int, last: int) -> Tensor:
            return super().rows({q: k, k: q}.get(fqn, fqn), first, last)

    wrong: dict[str, Callable[[Any], Changes]] = {
        "left out": lambda loras: Changes(()),
        "another scale": lambda loras: Changes([replace(lora, scale=1.01)]),
        "twice": lambda loras: Changes([lora, lora]),
        "crossed": Crossed,
    }
    for what, changes in wrong.items():

        class Wrong(WeightSource):
            def __init__(self, stored: Any, loras: Any = (), changes: Callable[[Any], Changes] = changes) -> None:
                super().__init__(stored, loras)
                self._changes = changes(loras)

        monkeypatch.setattr(load, "WeightSource", Wrong)
        with Run(plan, HereGang(), all_rows=True) as run:
            found, _ = run.judged()
        print(what, found[0], sep=": ")
        assert {violation.check for violation in found} == {"complete"}
        assert {violation.where for violation in found} == ({q, k} if what == "crossed" else lora.targets)


def test_a_file_that_was_changed_is_not_merged(flux2_dir: Path, tmp_path: Path) -> None:
    file = _saved(_adapter(flux2_dir), tmp_path / "adapter.safetensors")
    plan = make_plan(_config([{"path": str(file)}]), flux2_dir, "cpu")
    (lora,) = plan.layout.loras
    assert isinstance(lora, Lora)
    file.touch()
    with pytest.raises(ConfigError, match="is not there, or not what it was when the run was planned"):
        HereGang().worker.setup(plan)
    file.unlink()
    with pytest.raises(ConfigError, match="is not there"):
        HereGang().worker.setup(plan)
