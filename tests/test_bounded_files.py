"""Files of a user or a publisher that are too large, never end, or say more than they hold: one message, at once."""

from __future__ import annotations

import json
import os
import shutil
import socket
import time
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from crossdock.runtime.config.bounded_files import MAX_DEPTH, parse_json, printable, read_bounded
from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.config.yaml_file import MAX_YAML_BYTES, load_config
from crossdock.runtime.errors import CheckpointError, ConfigError
from crossdock.runtime.models.build_limits import (
    MAX_NUMBER,
    MAX_PARTS,
    MAX_TABLE,
    TooLargeError,
    blame,
    check_table,
    largest_number,
)
from crossdock.runtime.models.checkpoint import read_json
from crossdock.runtime.models.latents import vae_scale
from crossdock.runtime.models.meta import _BoundedTables, _EmptyOnMeta
from crossdock.runtime.plan.make_plan import make_plan

AT_ONCE_S = 5.0
"""Of this process's own time: the machine may be busy."""


@pytest.fixture(autouse=True)
def at_once() -> object:
    began = time.process_time()
    yield
    assert time.process_time() - began < AT_ONCE_S


def _fifo(path: Path) -> Path:
    os.mkfifo(path)
    return path


def _socket(path: Path) -> Path:
    with socket.socket(socket.AF_UNIX) as made:
        made.bind(os.path.relpath(path))  # the whole path may be longer than a socket's name can be
    return path


def _link(path: Path) -> Path:
    path.symlink_to("/dev/zero")
    return path


SPECIAL: dict[str, tuple[Callable[[Path], Path], str]] = {
    "device": (lambda path: Path("/dev/zero"), "is a device, expected a regular file"),
    "link to a device": (_link, "is a device, expected a regular file"),
    "FIFO": (_fifo, "is a FIFO, expected a regular file"),
    "socket": (_socket, "is a socket, expected a regular file"),
}


@pytest.mark.parametrize(("make", "text"), SPECIAL.values(), ids=SPECIAL)
def test_what_is_no_file(make: Callable[[Path], Path], text: str, tmp_path: Path) -> None:
    path = make(tmp_path / "it")
    with pytest.raises(ConfigError, match=f"{path}: {text}"):
        load_config(path)
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read as JSON: {text}"):
        read_json(path)


@pytest.mark.parametrize("name", ["model_index.json", "transformer/config.json", "vae/config.json", "tokenizer/x"])
def test_a_fifo_in_a_checkpoint(name: str, flux2_dir: Path, tmp_path: Path) -> None:
    """Whoever opened it would wait for ever."""
    model = Path(shutil.copytree(flux2_dir, tmp_path / "model"))
    (model / name).unlink(missing_ok=True)
    os.mkfifo(model / name)
    with pytest.raises(CheckpointError, match=f"{model / name}: .*is a FIFO"):
        make_plan(RunConfig(), model, "cpu")


def test_a_link_to_a_file_is_one(flux2_dir: Path, tmp_path: Path) -> None:
    """The hub's cache is made of links."""
    (tmp_path / "model_index.json").symlink_to(flux2_dir / "model_index.json")
    assert read_json(tmp_path / "model_index.json")["_class_name"] == "Flux2KleinPipeline"


def test_a_directory(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="is a directory; give a YAML file"):
        load_config(tmp_path)
    with pytest.raises(CheckpointError, match="cannot be read as JSON: "):
        read_json(tmp_path)


def test_the_limit_is_the_last_that_fits(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"x" * 100)
    assert read_bounded(path, 100) == b"x" * 100
    with pytest.raises(ValueError, match="has more than 99 bytes"):
        read_bounded(path, 99)
    path.write_text("#" * MAX_YAML_BYTES)
    assert load_config(path) == RunConfig()
    path.write_text("#" * (MAX_YAML_BYTES + 1))
    with pytest.raises(ConfigError, match=f"has more than {MAX_YAML_BYTES} bytes"):
        load_config(path)


DEEP = "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1)
JSON = {
    "key twice": ('{"a": 1, "b": {"a": 2, "a": 3}}', "has the key 'a' twice"),
    "many digits": ('{"a": ' + "9" * 101 + "}", "has a number with 101 digits"),
    "very many digits": ('{"a": ' + "9" * 100_000 + "}", "has a number with 100000 digits"),
    "deep": (
        '{"a": ' + "[" * (MAX_DEPTH + 1) + "]" * (MAX_DEPTH + 1) + "}",
        f"is nested more than {MAX_DEPTH} levels deep",
    ),
    "very deep": ("[" * 500_000, "is nested too deeply"),
    "very many values": ('{"a": [' + "0," * 300_001 + "0]}", "holds more than 300000 values"),
    "very deep objects": ('{"a":' * 500_000, "is nested too deeply"),
}


def test_an_index_is_not_read_past_its_limit(tmp_path: Path) -> None:
    path = tmp_path / "model.safetensors.index.json"
    path.touch()
    os.truncate(path, 20 * 2**30)  # takes no place on disk
    with pytest.raises(CheckpointError, match="has more than 16777216 bytes"):
        read_json(path)


def test_a_fifo_that_took_a_files_place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between the look at it and the opening."""
    monkeypatch.setattr("crossdock.runtime.config.bounded_files.check_regular", lambda path: None)
    with pytest.raises(ValueError, match="is no longer a regular file"):
        read_bounded(_fifo(tmp_path / "it"), 100)


def test_what_a_terminal_would_obey(tmp_path: Path) -> None:
    assert printable("a\x1b[31m\nb\u202ec é") == "a\\x1b[31m\\nb\\u202ec é"
    path = tmp_path / "run.yaml"
    path.write_text('"a\\e[2J\\nforged": 1\n')
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert "\x1b" not in str(caught.value)
    assert len(str(caught.value).splitlines()) == 1


@pytest.mark.parametrize("key", ["dtype", "parallel: {tp_degree", "launch: {port", "offload: {device_budget"])
def test_hexadecimal_digits_are_any_number(key: str, tmp_path: Path) -> None:
    """Python writes no more than 4,300 decimal digits, and raises."""
    path = tmp_path / "run.yaml"
    path.write_text(f"{key}: 0x{'f' * 5000}{'}' * key.count('{')}\n")
    with pytest.raises(ConfigError, match="not a value: a number of 20000 bits"):
        load_config(path)


def test_a_folder_that_is_no_component(flux2_dir: Path, tmp_path: Path) -> None:
    """A link to a whole disk would be walked."""
    model = Path(shutil.copytree(flux2_dir, tmp_path / "model"))
    shutil.rmtree(model / "tokenizer")
    (model / "tokenizer").symlink_to("/usr")
    with pytest.raises(CheckpointError, match=f"^{model / 'tokenizer'}: holds more than 1000 files"):
        make_plan(RunConfig(), model, "cpu")


@pytest.mark.parametrize("value", ['"xy"', '{"a": 1}', "3"])
def test_a_component_that_is_no_list(value: str, flux2_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(flux2_dir, tmp_path / "model"))
    index = model / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "scheduler": json.loads(value)}))
    with pytest.raises(CheckpointError, match=f"^{index}: scheduler: found .*; expected a library and a class"):
        make_plan(RunConfig(), model, "cpu")


def test_the_name_of_a_component_is_one(flux2_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(flux2_dir, tmp_path / "model"))
    index = model / "model_index.json"
    content = json.loads(index.read_text())
    index.write_text(json.dumps({**content, "../vae": ["diffusers", "AutoencoderKL"]}))
    with pytest.raises(CheckpointError, match=r"'\.\./vae' is no name of a component"):
        make_plan(RunConfig(), model, "cpu")


def test_a_table_that_no_model_has() -> None:
    check_table([torch.empty(MAX_TABLE, device="meta")])
    with pytest.raises(TooLargeError, match="asks for a table of 2147483649 numbers"):
        check_table([torch.empty(MAX_TABLE + 1, device="meta")])


@pytest.mark.parametrize("mode", [_BoundedTables, _EmptyOnMeta])
def test_a_constructor_that_computes_too_much(mode: type) -> None:
    """Before it does: the table would have 2^40 numbers. Weights may have any size."""
    device = "meta" if mode is _BoundedTables else "cpu"
    with torch.device(device), mode():
        torch.empty(2**20, 2**20)
        line = torch.zeros(2**20)
        with pytest.raises(TooLargeError, match="asks for a table of 1099511627776 numbers"):
            torch.outer(line, line)


@pytest.mark.parametrize("count", [1, 70, 10_000])
def test_a_scale_of_any_number_of_blocks(count: int, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(json.dumps({"block_out_channels": [8] * count}))
    if count == 1:
        assert vae_scale(path).pixels == 1
        return
    with pytest.raises(CheckpointError, match="does not say how large pictures are"):
        vae_scale(path)


@pytest.mark.parametrize(("text", "message"), JSON.values(), ids=JSON)
def test_json_with_tricks(text: str, message: str, tmp_path: Path) -> None:
    path = tmp_path / "config.json"
    path.write_text(text)
    with pytest.raises(CheckpointError, match=f"{path}: cannot be read as JSON: {message}"):
        read_json(path)


def test_json_that_just_fits() -> None:
    assert parse_json('{"a": ' + "9" * 100 + ', "b": ' + "[" * (MAX_DEPTH - 1) + "]" * (MAX_DEPTH - 1) + "}")["a"] > 0


BOMBS = {
    "lists": "a0: &a0 [x, x, x, x, x, x, x, x, x]\n"
    + "".join(f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]\n" for i in range(1, 12)),
    "sections": "m0: &m0 {a: 1}\n"
    + "".join(f"m{i}: &m{i} {{{', '.join(f'k{j}: *m{i - 1}' for j in range(9))}}}\n" for i in range(1, 12)),
    "merges": "m0: &m0 {a: 1}\n"
    + "".join(f"m{i}: &m{i} {{<<: [{', '.join([f'*m{i - 1}'] * 9)}]}}\n" for i in range(1, 12)),
    "itself": "parallel: &a {hsdp: *a}\n",
}


@pytest.mark.parametrize("text", BOMBS.values(), ids=BOMBS)
def test_aliases_that_stand_for_more_than_the_file(text: str, tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    with pytest.raises(ConfigError, match=r"its aliases \(\*name\) stand for more than the file has; write it out"):
        load_config(path)


def test_an_alias_that_saves_writing(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("parallel: {ulysses_degree: &n 2, ring_degree: *n}\n")
    assert load_config(path).world_size == 4


def test_many_problems_are_some_lines(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("".join(f"k{i}: {i}\n" for i in range(1000)))
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    lines = str(caught.value).splitlines()
    assert len(lines) == 13
    assert lines[-1] == f"{path}: and 988 more problems"


# -- what a config may ask for ------------------------------------------------------------------------------------

SIZES = {
    "vae/config.json": {
        "layers_per_block": (
            1_000_000_000_000,
            "layers_per_block: found 1000000000000; nothing has more than",
        ),
        "latent_channels": (2**38, "latent_channels: "),
        "block_out_channels": ([2**40, 24], "block_out_channels.0: found 1099511627776"),
        "norm_num_groups": (0, "norm_num_groups: "),
        "act_fn": ("x" * 5000, "act_fn: has 5000 characters"),
    },
    "transformer/config.json": {
        "num_layers": (9_999, f"num_layers: found 9999: .* asks for more than {MAX_PARTS} modules"),
        "num_single_layers": (10**7, "num_single_layers: found 10000000; nothing has more than 10000 of these"),
        "attention_head_dim": (2**36, "attention_head_dim: "),
        "in_channels": ([3], "in_channels: "),
        "mlp_ratio": ("x" * 1_000_000, "mlp_ratio: has 1000000 characters"),
    },
    "text_encoder/config.json": {
        "num_key_value_heads": (0, "num_key_value_heads: "),
        "vocab_size": (-1, "vocab_size: "),
        "hidden_size": ("many", "hidden_size: "),
        "rope_parameters": ({"rope_type": "somebodys"}, "rope_parameters"),
        "num_hidden_layers": (10**7, "num_hidden_layers: found 10000000; nothing has more than"),
        "architectures": (["x"] * 3000, "architectures: has 3000 items; no model has a list of more than"),
    },
    "scheduler/scheduler_config.json": {
        "num_train_timesteps": (10**8, "num_train_timesteps: found 100000000; nothing has more than"),
    },
    "tokenizer/tokenizer_config.json": {
        "extra_ids": (10**8, "extra_ids: found 100000000; nothing has more than"),
    },
}
CASES = [(file, key, *case) for file, cases in SIZES.items() for key, case in cases.items()]


@pytest.mark.parametrize(("file", "key", "value", "text"), CASES, ids=[f"{case[0]}-{case[1]}" for case in CASES])
def test_a_config_that_asks_for_too_much(
    file: str, key: str, value: object, text: str, flux2_dir: Path, tmp_path: Path
) -> None:
    """Told by file and key, before a layer is built."""
    model = Path(shutil.copytree(flux2_dir, tmp_path / "model"))
    path = model / file
    path.write_text(json.dumps({**json.loads(path.read_text()), key: value}))
    with pytest.raises(CheckpointError, match=f"^{path}: {text}") as caught:
        make_plan(RunConfig.parse({"offload": {"layerwise": True}}), model, "cpu")
    assert len(str(caught.value)) < 1000
    assert "\n" not in str(caught.value)


INDICES = {
    "no object": ('{"weight_map": ["a"]}', "weight_map: found a list; expected names of files"),
    "no weight_map": ("{}", "weight_map: found a NoneType"),
    "empty": ('{"weight_map": {}}', "weight_map: found a dict"),
    "a number": ('{"weight_map": {"x.weight": 3}}', "weight_map: x.weight: found '3'; expected a file beside it"),
    "a list": ('{"weight_map": {"x.weight": []}}', "weight_map: x.weight: found "),
    "outside": ('{"weight_map": {"x.weight": "../vae/x.safetensors"}}', "expected a file beside it"),
    "absolute": ('{"weight_map": {"x.weight": "/etc/passwd"}}', "expected a file beside it"),
    "NUL": ('{"weight_map": {"x.weight": "a\\u0000b"}}', "expected a file beside it"),
    "long": ('{"weight_map": {"x.weight": "' + "a" * 5000 + '"}}', "expected a file beside it"),
}


@pytest.mark.parametrize("component", ["transformer", "text_encoder"])
@pytest.mark.parametrize(("text", "message"), INDICES.values(), ids=INDICES)
def test_an_index_of_weights(text: str, message: str, component: str, flux2_dir: Path, tmp_path: Path) -> None:
    model = Path(shutil.copytree(flux2_dir, tmp_path / "model"))
    (index,) = (model / component).glob("*.index.json")
    index.write_text(text)
    with pytest.raises(CheckpointError, match=f"^{index}: weight_map: ") as caught:
        make_plan(RunConfig(), model, "cpu")
    assert message in str(caught.value)


def test_the_key_to_blame() -> None:
    config = {"a": 1, "b": {"c": 2, "d": {"e": -1}}, "f": 3}

    def builds(changed: object) -> bool:
        return "-1" not in str(changed)

    assert blame(config, builds) == "b.d.e"
    assert blame(config, lambda changed: False) is None
    assert largest_number({"a": [1, -MAX_NUMBER], "b": True}) == ("a.1", -MAX_NUMBER)
