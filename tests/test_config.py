"""The run configuration: every mistake is one line with file, line and key path."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from pydantic import ValidationError

from crossdock.runtime.config.schema import HsdpConfig, OffloadConfig, ParallelConfig, RunConfig
from crossdock.runtime.config.yaml_file import config_schema, load_config
from crossdock.runtime.errors import ConfigError

BUILTIN = Path(__file__).parent.parent / "launch" / "configs"
KEYS = "parallel, offload, launch, verify, dtype, transformer, transformer_2, loras"
WORLD_SIZES = {
    "single": 1,
    "layerwise": 1,
    "tp2": 2,
    "layerwise_tp2": 2,
    "hsdp": 4,
    "layerwise_hsdp": 4,
    "ulysses4": 4,
    "ring4": 4,
    "ulysses2_ring2": 4,
    "layerwise_ulysses2_ring2": 4,
    "layerwise_cfg2": 2,
    "layerwise_tp2_ulysses2": 4,
    "layerwise_hsdp_ulysses2": 4,
}

# text of the file -> what follows the file's path in the message
BUDGETS = (
    'a size above zero in B, KiB, MiB, GiB, TiB, such as "18GiB", a fraction of the device above 0 and up to 1, or auto'
)
MISTAKES = {
    "unknown key": (
        "# a comment\n\nparallel:\n  ulyses_degree: 2\n",
        ":4: parallel.ulyses_degree: unknown key; did you mean ulysses_degree? allowed: ulysses_degree, "
        "ring_degree, tp_degree, cfg_degree, dp_degree, hsdp, attention",
    ),
    "unknown key like no other": (
        "zzz: 1\n",
        f":1: zzz: unknown key; allowed: {KEYS}",
    ),
    "unknown key two sections down": (
        "launch:\n  timeouts:\n    lod_s: 3\n",
        ":3: launch.timeouts.lod_s: unknown key; did you mean load_s? allowed: launch_s, load_s, "
        "collective_s, request_s",
    ),
    "key that is no string": (
        "2: 3\n",
        f":1: 2: unknown key; allowed: {KEYS}",
    ),
    "unknown key in an optional section": (
        "parallel:\n  hsdp: {shards: 1}\n",
        ":2: parallel.hsdp.shards: unknown key; did you mean shard? allowed: replicate, shard",
    ),
    "string for an integer": (
        'parallel:\n  tp_degree: "2"\n',
        ':2: parallel.tp_degree: found "2" (a string); allowed: an integer >= 1',
    ),
    "boolean for an integer": (
        "parallel:\n  tp_degree: true\n",
        ":2: parallel.tp_degree: found true (a boolean); allowed: an integer >= 1",
    ),
    "number for an integer": (
        "parallel:\n  tp_degree: 2.0\n",
        ":2: parallel.tp_degree: found 2.0 (a number); allowed: an integer >= 1",
    ),
    "integer for a boolean": (
        "offload:\n  layerwise: 1\n",
        ":2: offload.layerwise: found 1 (an integer); allowed: true or false",
    ),
    "boolean for a number": (
        "launch:\n  timeouts: {load_s: true}\n",
        ":2: launch.timeouts.load_s: found true (a boolean); allowed: a number > 0",
    ),
    "list for a section": (
        "offload:\n- layerwise\n",
        ":1: offload: found a list; allowed: a section with the keys layerwise, prefetch, device_budget, host, codec",
    ),
    "a section for a list": (
        "loras: {path: a.safetensors}\n",
        ":1: loras: found a section; allowed: a list, of which each is a section with the keys path, scale, component",
    ),
    "text in a list of sections": (
        "loras:\n- path: a.safetensors\n- b.safetensors\n",
        ':3: loras.1: found "b.safetensors" (a string); allowed: a section with the keys path, scale, component',
    ),
    "a wrong key in a list": (
        "loras:\n- path: a.safetensors\n  scale: 1\n- path: b.safetensors\n  scail: 2.0\n",
        ":5: loras.1.scail: unknown key; did you mean scale? allowed: path, scale, component",
    ),
    "a wrong value in a list": (
        "loras:\n- {path: a.safetensors, scale: much}\n",
        ':2: loras.0.scale: found "much" (a string); allowed: a number',
    ),
    "nothing for a section": (
        "offload:\n",
        ":1: offload: found nothing; allowed: a section with the keys layerwise, prefetch, device_budget, host, codec",
    ),
    "integer for an optional string": (
        "offload: {layerwise: true, device_budget: 18}\n",
        f":1: offload.device_budget: found 18; allowed: {BUDGETS}",
    ),
    "below the range": (
        "parallel:\n  dp_degree: 0\n",
        ":2: parallel.dp_degree: found 0 (an integer); allowed: an integer >= 1",
    ),
    "a budget of no type": (
        "offload:\n  device_budget: [1]\n",
        ':2: offload.device_budget: found a list; allowed: a string or a number or null, such as "18GiB", such as '
        '"0.8", such as "auto"',
    ),
    "above the range": (
        "offload:\n  prefetch: 9\n",
        ":2: offload.prefetch: found 9 (an integer); allowed: an integer >= 1 and <= 8 or auto",
    ),
    "endless time limit": (
        "launch:\n  timeouts:\n    load_s: .inf\n",
        ":3: launch.timeouts.load_s: found inf (a number); allowed: a number > 0",
    ),
    "word that is not in the list": (
        "parallel:\n  attention: xfusr\n",
        ':2: parallel.attention: found "xfusr" (a string); did you mean xfuser? allowed: one of native, xfuser',
    ),
    "size without a unit": (
        "offload:\n  layerwise: true\n  device_budget: '18'\n",
        f':3: offload.device_budget: found "18"; allowed: {BUDGETS}',
    ),
    "size that is zero": (
        "offload:\n  layerwise: true\n  device_budget: 0GiB\n",
        f':3: offload.device_budget: found "0GiB"; allowed: {BUDGETS}',
    ),
    "budget without layerwise": (
        "offload:\n  device_budget: 18GiB\n",
        ':2: offload.device_budget: found "18GiB", but nothing is offloaded; set offload.layerwise: true or remove it',
    ),
    "cfg degree": (
        "parallel:\n  cfg_degree: 3\n",
        ":2: parallel.cfg_degree: found 3; allowed: 1, 2 (guidance has two branches)",
    ),
    "degrees that do not multiply": (
        "parallel:\n  ulysses_degree: 2\n  ring_degree: 2\nlaunch:\n  world_size: 8\n",
        ":5: launch.world_size: dp(1) * cfg(1) * ring(2) * ulysses(2) * tp(1) = 4, but world_size is 8; "
        "change the degrees, or leave launch.world_size out",
    ),
    "hsdp that does not cover the ranks": (
        "parallel:\n  dp_degree: 4\n  tp_degree: 2\n  hsdp:\n    shard: 2\n",
        ":4: parallel.hsdp: replicate(1) * shard(2) = 2, but world_size(8) / tp_degree(2) = 4 ranks hold the "
        "same TP slice",
    ),
    "xfuser with tensor parallelism": (
        "parallel:\n  attention: xfuser\n  tp_degree: 2\n",
        ":2: parallel.attention: xfuser works with tp_degree 1 only, but tp_degree is 2; use attention: "
        "native or tp_degree: 1",
    ),
    "xfuser on cpu": (
        "parallel:\n  attention: xfuser\nlaunch:\n  device: cpu\n",
        ":2: parallel.attention: xfuser runs on CUDA only, but launch.device is cpu; use attention: native",
    ),
    "key given twice": (
        "parallel:\n  tp_degree: 2\n  tp_degree: 2\n",
        ":2: parallel.tp_degree: given twice, on lines 2 and 3",
    ),
    "section given twice": (
        "launch: {}\ndtype: auto\nlaunch: {}\n",
        ":1: launch: given twice, on lines 1 and 3",
    ),
    "value that is no date": ("dtype: 2026-13-45\n", ":1: dtype: not a value: month must be in 1..12"),
    "list at the top": (
        "# nothing\n- parallel\n",
        f":2: found a list at the top; allowed: the keys {KEYS}",
    ),
    "text at the top": (
        "parallel",
        f":1: found a single value at the top; allowed: the keys {KEYS}",
    ),
    "broken YAML": (
        "parallel:\n  tp_degree: 2\n ring_degree: 2\n",
        ":3: not valid YAML: while parsing a block mapping, expected <block end>, but found '<block mapping start>'",
    ),
    "tag for a Python object": (
        "dtype: !!python/name:os.system ''\n",
        ":1: not valid YAML: could not determine a constructor for the tag 'tag:yaml.org,2002:python/name:os.system'",
    ),
    "section that holds itself": (
        "parallel: &a\n  hsdp: *a\n",
        ": its aliases (*name) stand for more than the file has; write it out",
    ),
}


def message_for(path: Path) -> str:
    with pytest.raises(ConfigError) as caught:
        load_config(path)
    assert caught.value.exit_code == 2
    return str(caught.value)


@pytest.mark.parametrize(("text", "expected"), MISTAKES.values(), ids=MISTAKES.keys())
def test_a_mistake_is_one_line(tmp_path: Path, text: str, expected: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    assert message_for(path) == f"{path}{expected}"


def test_all_mistakes_are_reported_by_line(tmp_path: Path) -> None:
    path = tmp_path / "run.yaml"
    path.write_text("offload:\n  prefetch: 0\nparallel:\n  tp_degree: x\n  rin_degree: 2\ndtype: int8\n")
    starts = [line.split(": ")[0:2] for line in message_for(path).splitlines()]
    assert starts == [
        [f"{path}:2", "offload.prefetch"],
        [f"{path}:4", "parallel.tp_degree"],
        [f"{path}:5", "parallel.rin_degree"],
        [f"{path}:6", "dtype"],
    ]


def test_files_that_cannot_be_read(tmp_path: Path) -> None:
    missing = tmp_path / "missing.yaml"
    assert message_for(missing) == f"{missing}: no such file"
    assert message_for(tmp_path) == f"{tmp_path}: is a directory; give a YAML file"
    latin = tmp_path / "latin.yaml"
    latin.write_bytes(b"dtype: auto\n# caf\xe9\n")
    assert message_for(latin) == f"{latin}:2: not UTF-8: invalid continuation byte"
    inside_a_file = latin / "run.yaml"
    assert message_for(inside_a_file) == f"{inside_a_file}: cannot be read: Not a directory"


@pytest.mark.parametrize("text", ["", "# only a comment\n", "---\n", "{}"])
def test_an_empty_file_is_one_rank_with_the_defaults(tmp_path: Path, text: str) -> None:
    path = tmp_path / "run.yaml"
    path.write_text(text)
    config = load_config(path)
    assert config == RunConfig()
    assert config.world_size == 1


def test_builtin_configs_load() -> None:
    assert {path.stem: load_config(path).world_size for path in BUILTIN.glob("*.yaml")} == WORLD_SIZES
    for name in WORLD_SIZES:
        assert load_config(BUILTIN / f"{name}.yaml").offload.layerwise == name.startswith("layerwise")
    assert load_config(BUILTIN / "layerwise_hsdp.yaml").parallel.hsdp == HsdpConfig(replicate=2, shard=2)


def test_degrees_are_in_mesh_order() -> None:
    parallel = ParallelConfig(ulysses_degree=2, ring_degree=3, tp_degree=5, dp_degree=7)
    assert list(parallel.degrees.items()) == [("dp", 7), ("cfg", 1), ("ring", 3), ("ulysses", 2), ("tp", 5)]
    assert parallel.world_size == 210
    config = RunConfig.parse({"parallel": {"tp_degree": 2}, "launch": {"world_size": 2}})
    assert config.world_size == 2


@pytest.mark.parametrize(
    ("size", "size_bytes"),
    [("18GiB", 18 * 2**30), ("500MiB", 500 * 2**20), ("1.5GiB", 3 * 2**29), ("7 B", 7)],
)
def test_device_budget_in_bytes(size: str, size_bytes: int) -> None:
    assert OffloadConfig(layerwise=True, device_budget=size).budget_bytes(None) == size_bytes
    assert OffloadConfig().budget_bytes(10**9) is None


def test_relative_budgets_need_the_device() -> None:
    """A fraction is of the smallest device; auto starts with as little as possible."""
    half, auto = OffloadConfig(layerwise=True, device_budget=0.5), OffloadConfig(layerwise=True, device_budget="auto")
    assert (half.budget_bytes(None), half.budget_bytes(1000), half.is_relative) == (None, 500, True)
    assert (auto.budget_bytes(1000), auto.is_relative) == (None, False)


def test_parse_names_its_source_and_takes_no_file() -> None:
    with pytest.raises(ConfigError, match=r"^server: parallel\.tp_degree: found 0 "):
        RunConfig.parse({"parallel": {"tp_degree": 0}}, "server")
    with pytest.raises(ConfigError, match=r"^2: unknown key; allowed: parallel"):
        RunConfig.parse({2: 3})  # type: ignore[dict-item]


def test_a_config_is_frozen() -> None:
    config = RunConfig()
    with pytest.raises(ValidationError, match="frozen"):
        config.dtype = "float16"


def test_schema_describes_every_key() -> None:
    schema = json.loads(json.dumps(config_schema()))
    assert schema["$schema"].startswith("https://json-schema.org/")
    assert schema["title"] == "crossdock run configuration"
    assert set(schema["properties"]) == {
        "parallel",
        "offload",
        "launch",
        "verify",
        "dtype",
        "transformer",
        "transformer_2",
        "loras",
    }
    for section in (schema, *schema["$defs"].values()):
        assert section["additionalProperties"] is False
        assert all(field["description"] for field in section["properties"].values())
