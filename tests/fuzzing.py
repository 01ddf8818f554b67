"""What the fuzz test feeds in: each input follows from its kind and number alone, so that any can be made again.

Four kinds, each of which damages what a user may give: the run configuration (`yaml`), a JSON file of a checkpoint
(`json`), the header of a weight file (`safetensors`) and the settings of one generation (`request`). Trees are changed
by their structure (wrong types, extreme numbers, keys that mean something to a library), and texts byte by byte.
"""

from __future__ import annotations

import json
import random
import struct
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from decimal import Decimal
from pathlib import Path
from typing import Any

import yaml

CONFIGS = Path(__file__).resolve().parents[1] / "launch" / "configs"
SHARES = {"yaml": 0.2, "json": 0.5, "safetensors": 0.1, "request": 0.2}
"""Kind -> its share of all inputs."""
RECIPES = {"flux2-klein": 5, "z-image": 5, "wan2.1": 4, "sd3.5": 2, "minimax-h3": 1, "ltx2": 1}
"""Tiny checkpoints whose files differ -> how often each is damaged; the slow ones less often."""
CONFIG_FILE = "config.yaml"
CANARY = "fuzz_canary"
"""A module that no run may execute; inputs name it, and it lies where they say."""


@dataclass(frozen=True)
class FuzzInput:
    """One input.

    Attributes:
        recipe: the checkpoint that is used.
        file: what is damaged, relative to the checkpoint; `config.yaml` is not in it.
        data: the file's new content.
        layerwise: the text encoders and decoders are planned as well.
        changes: what was done, in words.
        fields: of a `request`, the settings.
    """

    kind: str
    number: int
    recipe: str
    file: str
    data: bytes
    layerwise: bool
    changes: tuple[str, ...]
    fields: Mapping[str, Any] = field(default_factory=dict)

    @property
    def command(self) -> str:
        """What repeats it alone."""
        return f".venv/bin/python tests/fuzz_process.py {self.kind} {self.number}"

    def describe(self, limit: int = 2000) -> str:
        """The input as a failure shows it; long texts are cut in the middle."""
        text = shorten(self.data.decode("utf-8", "backslashreplace"), limit)
        how = ", layerwise" if self.layerwise else ""
        done = shorten("; ".join(self.changes), 600)
        return f"{self.kind} {self.number} ({self.recipe}, {self.file}{how}): {done}\nagain: {self.command}\n{text}"


def shorten(text: str, limit: int) -> str:
    """`text` with its middle left out where it is longer than `limit` characters."""
    if len(text) <= limit:
        return text
    return f"{text[: limit // 2]} ... ({len(text)} characters in all) ... {text[-(limit // 2) :]}"


def make_input(kind: str, number: int, checkpoints: Path) -> FuzzInput:
    """Input `number` of a kind. `checkpoints` has the undamaged tiny checkpoints, each in a folder of its name."""
    rng = random.Random(f"{kind}/{number}")
    return _MAKERS[kind](rng, number, checkpoints)


class Obj(list[list[Any]]):
    """A JSON object or YAML mapping as `[key, value]` pairs, so that a key may be there twice."""


class Raw(str):
    """Text that is written as it is, also where it is no value."""

    __slots__ = ()


Place = tuple[list[Any], int]
"""A container and an index in it; in an `Obj` it stands for the value of a pair."""

_NUMBERS: tuple[Any, ...] = (
    *(0, -1, 1, 2, 3, 7, 17, 255, 1000, 65536, 100_000, 10**6, 2**31 - 1, 2**31, 2**32, 2**63 - 1, 2**63, -(2**63)),
    *(2**64, 10**12, 10**30, -(10**12), 0.0, -0.0, 0.5, -0.5, 1.0, 2.0, 1e-320, 1e308, -1e308, 1e19),
)
_DIGITS = ("1" * 5000, "-" + "9" * 5000, "1e400", "-1e400", "0." + "3" * 5000, "1" * 400, "1e-400")
_STRINGS = (
    *("", " ", "\0", "a\0b", "\n", "\ud800", "\udcff", "\ufeff", "\u202e", "é" * 50, "%s%n{0}", "None", "null", "true"),
    *("0", "-1", "3.5", "nan", "1e999", ".", "..", "../..", "../../etc/passwd", "/etc/passwd", "/etc", "/dev/zero"),
    *("/dev/stdin", "/proc/self/environ", "~", "http://127.0.0.1:9/x", "hf-internal/none", "x" * 300, "x" * 10_000),
    *("x" * 1_000_000, "cuda", "meta", "float64", "bfloat16", "auto", "silu", "Linear", "object", "int", "Module"),
    *(f"{CANARY}", f"{CANARY}.Canary", f"{CANARY}.py", f"{CANARY}.bin", f"hf-internal/none--{CANARY}.Canary"),
)
_CONTAINERS: tuple[Callable[[], Any], ...] = (
    list,
    Obj,
    lambda: [None],
    lambda: [[]],
    lambda: [0],
    lambda: [-1, 0],
    lambda: [1] * 1000,
    lambda: ["a", 1, None],
    lambda: [1, 2, 3, 4, 5, 6, 7],
    lambda: Obj([["a", 1]]),
    lambda: Obj([["", None]]),
    lambda: [CANARY, "Canary"],
    lambda: ["diffusers", "DiffusionPipeline"],
    lambda: ["transformers", "AutoModel"],
    lambda: ["torch.nn", "Linear"],
    lambda: ["builtins", "eval"],
    lambda: Obj([["__class__", "x"]]),
)
# fmt: off
_JSON_RAW = (
    *_DIGITS, "NaN", "Infinity", "-Infinity", "nan", "", "undefined", "'x'", "01", "+1", ".5", "1.", "0x10",
    '"\\ud800"', '"\t"',
    '"\\u0000"', "[" * 500 + "]" * 500, "[" * 100_000, '{"a":' * 2000 + "1" + "}" * 2000, "/*x*/1", "1,", '"open',
)
# fmt: on
_ODD_KEYS = ("", " ", "_", "__class__", "__init__", "self", "config", "a.b", "x" * 5000, "\0", "\ud800", "/", "..", "é")


def _tree(value: Any) -> Any:
    """Plain data with `Obj` for every mapping."""
    if isinstance(value, Obj):
        return value
    if isinstance(value, Mapping):
        return Obj([key, _tree(item)] for key, item in value.items())
    return [_tree(item) for item in value] if isinstance(value, list | tuple) else value


_CODE = f"{CANARY}.Canary"
_MEANINGFUL: tuple[tuple[str, Any], ...] = (
    ("auto_map", {"AutoConfig": _CODE, "AutoModel": _CODE, "AutoTokenizer": [_CODE, _CODE], "AutoProcessor": _CODE}),
    ("auto_map", {"AutoTokenizer": [_CODE, None], "AutoModelForCausalLM": _CODE, "ModularPipelineBlocks": _CODE}),
    ("auto_map", {"AutoConfig": f"hf-internal/none--{_CODE}"}),
    ("auto_map", _CODE),
    ("auto_map", [_CODE]),
    ("trust_remote_code", True),
    ("custom_pipeline", CANARY),
    ("custom_pipelines", {"AutoPipeline": {"pt": [_CODE]}}),
    ("_class_name", [CANARY, "Canary"]),
    ("_class_name", "Flux2KleinPipeline"),
    ("_class_name", "WanPipeline"),
    ("_class_name", "AutoModel"),
    ("_class_name", "UNet2DConditionModel"),
    ("_blocks_class_name", "Canary"),
    ("_diffusers_version", "99.0.0"),
    ("_diffusers_version", None),
    ("_name_or_path", "hf-internal/none"),
    ("_name_or_path", "../../.."),
    ("pretrained_model_name_or_path", "hf-internal/none"),
    ("quantization_config", {"quant_method": "bitsandbytes", "load_in_4bit": True}),
    ("quantization_config", {"quant_method": "gptq", "bits": 4}),
    ("quantization_config", {"quant_method": "fp8"}),
    ("quantization_config", {"quant_method": "quanto", "weights_dtype": "int8"}),
    ("quantization_config", {"quant_method": "torchao", "quant_type": "int4wo"}),
    ("quantization_config", {"quant_method": "none"}),
    ("quantization_config", {}),
    ("quantization_config", "int8"),
    ("_attn_implementation", "flash_attention_2"),
    ("_attn_implementation", "hf-internal/none:kernel"),
    ("attn_implementation", "nonsense"),
    ("use_kernels", True),
    ("model_type", "bert"),
    ("model_type", "nonsense"),
    ("model_type", "../x"),
    ("architectures", ["Canary"]),
    ("architectures", None),
    ("torch_dtype", "float64"),
    ("dtype", "nonsense"),
    ("dtype", {"": "float16"}),
    ("device_map", "auto"),
    ("tp_plan", "auto"),
    ("tokenizer_class", "Canary"),
    ("tokenizer_class", "LlamaTokenizer"),
    ("tokenizer_class", "BertTokenizer"),
    ("tokenizer_class", "PreTrainedTokenizerFast"),
    ("processor_class", "CLIPProcessor"),
    ("tokenizer_file", "/dev/zero"),
    ("vocab_file", "/etc/passwd"),
    ("tokenizer_object", {}),
    ("chat_template", "{{ ''.__class__.__mro__ }}{% for x in range(10**9) %}{% endfor %}"),
    ("added_tokens_decoder", {"0": {"content": "<x>", "special": "yes"}}),
    ("added_tokens_decoder", {"x": {"content": 3}}),
    ("extra_special_tokens", {"a": "b"}),
    ("additional_special_tokens", ["<a>", 3, None]),
    ("model_max_length", 10**30),
    ("num_layers", 10_000),
    ("num_layers", 2_000_000),
    ("num_hidden_layers", 1_000_000),
    ("num_attention_heads", 10**9),
    ("vocab_size", 10**12),
    ("in_channels", 10**9),
    ("num_train_timesteps", 10**9),
    ("beta_schedule", "nonsense"),
    ("trained_betas", [0.1] * 10_000),
    ("use_karras_sigmas", True),
    ("patch_size", 0),
    ("scale_factor_spatial", -8),
    ("spatial_downsample_factors", "ab"),
    ("temperal_downsample", 7),
    ("block_out_channels", 5),
    ("weight_map", []),
    ("weight_map", {"x": f"{CANARY}.bin"}),
    ("metadata", None),
    ("text_config", {"model_type": "nonsense"}),
    ("vision_config", None),
    ("rope_parameters", {"rope_type": "nonsense"}),
    ("rope_scaling", {"type": "yarn", "factor": "x"}),
    ("adapter", ["peft", "PeftModel"]),
    ("transformer", ["transformers", "BertModel"]),
    ("transformer_2", [None, None]),
    ("safety_checker", ["stable_diffusion", "StableDiffusionSafetyChecker"]),
    ("feature_extractor", ["transformers", "CLIPImageProcessor"]),
    ("scheduler", [CANARY, "Canary"]),
    ("scheduler", ["diffusers", "DDIMScheduler"]),
    ("scheduler", ["transformers", "BertModel"]),
    ("tokenizer", ["transformers", "AutoTokenizer"]),
    ("vae", ["diffusers.models", "AutoencoderKL"]),
    ("vae", None),
)


def mutate_tree(rng: random.Random, tree: Any, raws: Sequence[str], added: Callable[[], tuple[Any, Any]]) -> list[str]:
    """Change `tree` in one to three places; what was done.

    Args:
        raws: texts that may stand in a value's place.
        added: draws a key with a value that mean something to what reads the tree.
    """
    done = []
    for _ in range(rng.choice((1, 1, 1, 2, 2, 3))):
        if rng.random() < 0.25:
            done.append(_add(rng, tree, added))
        else:
            done.append(_change(rng, tree, raws))
    return done


def _add(rng: random.Random, tree: Any, added: Callable[[], tuple[Any, Any]]) -> str:
    objects = [node for node in _nodes(tree) if isinstance(node, Obj)]
    if not objects:
        return "nothing"
    node = objects[0] if rng.random() < 0.7 else rng.choice(objects)
    key, value = added()
    node[:] = [pair for pair in node if pair[0] != key or rng.random() < 0.1]
    node.insert(rng.randrange(len(node) + 1), [key, _tree(value)])
    return f"added {key!r}"


def _change(rng: random.Random, tree: Any, raws: Sequence[str]) -> str:
    places = list(_places(tree))
    if not places:
        return "nothing"
    place = rng.choice(places)
    return rng.choice(_CHANGES)(rng, place, places, raws)


def _nodes(tree: Any) -> Iterator[Any]:
    """All containers of a tree, the outermost first."""
    if isinstance(tree, list):
        yield tree
        for item in tree:
            yield from _nodes(item[1] if isinstance(tree, Obj) else item)


def _places(tree: Any) -> Iterator[Place]:
    for node in _nodes(tree):
        yield from ((node, index) for index in range(len(node)))


def _get(place: Place) -> Any:
    node, index = place
    return node[index][1] if isinstance(node, Obj) else node[index]


def _set(place: Place, value: Any) -> None:
    node, index = place
    if isinstance(node, Obj):
        node[index] = [node[index][0], value]
    else:
        node[index] = value


def _name(place: Place) -> str:
    node, index = place
    return shorten(repr(node[index][0]) if isinstance(node, Obj) else f"[{index}]", 80)


def _said(value: Any) -> str:
    return shorten(repr(value), 80)


def interesting(rng: random.Random, raws: Sequence[str]) -> Any:
    """A value that programs tend not to expect."""
    pick = rng.randrange(10)
    if pick < 3:
        return rng.choice(_NUMBERS)
    if pick < 6:
        return rng.choice(_STRINGS)
    if pick < 8:
        return rng.choice(_CONTAINERS)()
    return rng.choice((None, True, False)) if pick < 9 else Raw(rng.choice(raws))


def _replace(rng: random.Random, place: Place, _places: Sequence[Place], raws: Sequence[str]) -> str:
    value = interesting(rng, raws)
    _set(place, value)
    return f"{_name(place)} = {_said(value)}"


def _delete(_rng: random.Random, place: Place, _places: Sequence[Place], _raws: Sequence[str]) -> str:
    name = _name(place)
    del place[0][place[1]]
    return f"{name} deleted"


def _duplicate(rng: random.Random, place: Place, _places: Sequence[Place], raws: Sequence[str]) -> str:
    node, index = place
    value = rng.choice((_get(place), interesting(rng, raws)))
    node.append([node[index][0], value] if isinstance(node, Obj) else value)
    return f"{_name(place)} again, as {_said(value)}"


def _rename(rng: random.Random, place: Place, places: Sequence[Place], raws: Sequence[str]) -> str:
    node, index = place
    if not isinstance(node, Obj):
        return _replace(rng, place, places, raws)
    old = str(node[index][0])
    new = rng.choice((*_ODD_KEYS, old + "_", old[:-1], old.upper(), f"_{old}", str(rng.choice(node)[0])))
    node[index] = [new, node[index][1]]
    return f"{_said(old)} renamed to {_said(new)}"


def _swap(rng: random.Random, place: Place, places: Sequence[Place], _raws: Sequence[str]) -> str:
    other = rng.choice(places)
    mine, theirs = _get(place), _get(other)
    if isinstance(mine, list) or isinstance(theirs, list):  # one may be inside the other
        mine, theirs = json.loads(emit_json(_plain(mine))), json.loads(emit_json(_plain(theirs)))
        mine, theirs = _tree(mine), _tree(theirs)
    _set(place, theirs)
    _set(other, mine)
    return f"{_name(place)} and {_name(other)} swapped"


def _plain(value: Any) -> Any:
    """Without raw texts, which may be no JSON."""
    if isinstance(value, Obj):
        return Obj([str(key), _plain(item)] for key, item in value)
    if isinstance(value, list):
        return [_plain(item) for item in value]
    return str(value) if isinstance(value, Raw) else value


def _wrap(rng: random.Random, place: Place, _places: Sequence[Place], _raws: Sequence[str]) -> str:
    value = _get(place)
    _set(place, rng.choice(([value], [value, value], Obj([["value", value]]), str(_plain(value)))))
    return f"{_name(place)} wrapped as {_said(_get(place))}"


def _tweak(rng: random.Random, place: Place, places: Sequence[Place], raws: Sequence[str]) -> str:
    """Near the value that was there: a plausible one is read further than nonsense is."""
    value = _get(place)
    if isinstance(value, bool) or value is None:
        near: Any = not value
    elif isinstance(value, int | float):
        near = rng.choice((value + 1, value - 1, -value, value * 2, value * 1000, value / 2, float(value), str(value)))
    elif isinstance(value, str):
        near = rng.choice(
            (value[:-1], value + "x", value.upper(), value * 2, value + "\0", f"./{value}", f"../{value}")
        )
    elif value:
        near = rng.choice((value[:-1], value[1:], type(value)(value * 2), type(value)(value * 1000), value[::-1]))
        near = Obj(near) if isinstance(value, Obj) else near
    else:
        return _replace(rng, place, places, raws)
    _set(place, near)
    return f"{_name(place)}: {_said(value)} -> {_said(near)}"


def _borrow(rng: random.Random, place: Place, places: Sequence[Place], raws: Sequence[str]) -> str:
    """A scalar that stands elsewhere in the file, or a key of it."""
    others = [_get(other) for other in places if not isinstance(_get(other), list)]
    others += [node[index][0] for node, index in places if isinstance(node, Obj)]
    if not others:
        return _replace(rng, place, places, raws)
    value = rng.choice(others)
    _set(place, value)
    return f"{_name(place)} = {_said(value)}, as elsewhere"


_CHANGES = (_replace, _replace, _replace, _delete, _duplicate, _rename, _swap, _wrap, _tweak, _tweak, _borrow)


def emit_json(tree: Any) -> str:
    """JSON, but for what is `Raw` or there twice."""
    if isinstance(tree, Raw):
        return str(tree)
    if isinstance(tree, Obj):
        return "{" + ", ".join(f"{_json_key(key)}: {emit_json(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(emit_json, tree)) + "]"
    return json.dumps(tree)


def _json_key(key: Any) -> str:
    return str(key) if isinstance(key, Raw) else json.dumps(str(key))


_BYTES = (b"\0", b"\xff", b"\xef\xbb\xbf", b"\xff\xfe", b"\r", b"\t", b"\n", b'"', b"'", b"\\", b"{", b"}", b"[", b"]")
_BYTES += (
    b":",
    b",",
    b"-",
    b"#",
    b"&a",
    b"*a",
    b"!!",
    b"\xc2\x85",
    b"\xe2\x80\xa8",
    b"\xed\xa0\x80",
    b"\x1b[2J",
    b"9" * 99,
)


def mutate_bytes(rng: random.Random, data: bytes) -> tuple[bytes, list[str]]:
    """`data` after one to four edits that know nothing of its format."""
    done = []
    for _ in range(rng.choice((1, 1, 2, 3, 4))):
        data, change = _edit_bytes(rng, data)
        done.append(change)
    return data, done


def _edit_bytes(rng: random.Random, data: bytes) -> tuple[bytes, str]:
    begin = rng.randrange(len(data) + 1)
    end = min(len(data), begin + rng.choice((1, 2, 8, 64, 1000)))
    part = data[begin:end]
    match rng.randrange(6):
        case 0:
            flipped = bytes(byte ^ (1 << rng.randrange(8)) for byte in part[:4])
            return data[:begin] + flipped + data[begin + len(flipped) :], f"bits flipped at {begin}"
        case 1:
            return data[:begin], f"cut off at {begin}"
        case 2:
            return data[:begin] + data[end:], f"bytes {begin} to {end} deleted"
        case 3:
            more = rng.choice((*_BYTES, rng.randbytes(rng.choice((1, 4, 64)))))
            return data[:begin] + more + data[begin:], f"{more[:20]!r} inserted at {begin}"
        case 4:
            times = rng.choice((2, 10, 1000)) if len(part) < 1000 else 2
            return data[:begin] + part * times + data[end:], f"bytes {begin} to {end} repeated {times} times"
        case _:
            more = rng.choice(_BYTES)
            return data[:begin] + more + data[begin + len(more) :], f"{more[:20]!r} written over {begin}"


# fmt: off
_JSON_TEXTS: tuple[bytes, ...] = (
    b"", b" ", b"null", b"true", b"[]", b"{}", b'""', b"0", b"NaN", b"[1, 2]", b"{", b'{"a"', b"\xef\xbb\xbf{}",
    b"\xff",
    b"[" * 100_000, b"[" * 900 + b"]" * 900, b'{"a":' * 100_000, b"1" * 5000, b'"' + b"x" * 10_000_000 + b'"',
    b" " * 1_000_000, b"\0" * 1000, "{}".encode("utf-16"), b'{"_class_name": "\\ud800"}', b"{}{}", b"// x\n{}",
    b'{"a": 1' + b', "a": 1' * 200_000 + b"}", b"[" + b"1," * 500_000 + b"1]",
)
# fmt: on


def _mutate_json(rng: random.Random, text: bytes) -> tuple[bytes, list[str]]:
    """One JSON file, damaged."""
    way = rng.random()
    if way < 0.76:
        tree = json.loads(text, object_pairs_hook=lambda pairs: Obj(map(list, pairs)))
        done = mutate_tree(rng, tree, _JSON_RAW, lambda: rng.choice(_MEANINGFUL))
        return emit_json(tree).encode("utf-8", "surrogatepass"), done
    if way < 0.93:
        return mutate_bytes(rng, text)
    whole = rng.choice(_JSON_TEXTS)
    return whole, [f"replaced by {_said(whole[:60])}"]


def _recipe(rng: random.Random) -> str:
    return rng.choices(list(RECIPES), list(RECIPES.values()))[0]


def _a_file(rng: random.Random, folder: Path, ending: str) -> str:
    names = sorted(str(path.relative_to(folder)) for path in folder.rglob(f"*{ending}"))
    tops = [name for name in names if "/" not in name]
    return rng.choice(names + tops * 2)


def _json_input(rng: random.Random, number: int, checkpoints: Path) -> FuzzInput:
    recipe = _recipe(rng)
    file = _a_file(rng, checkpoints / recipe, ".json")
    data, done = _mutate_json(rng, (checkpoints / recipe / file).read_bytes())
    return FuzzInput("json", number, recipe, file, data, _layerwise(rng, file), tuple(done))


def _layerwise(rng: random.Random, file: str) -> bool:
    """Mostly where it matters: with layerwise, encoders and decoders are planned too, which takes longer."""
    elsewhere = file.startswith(("transformer/", "scheduler/", "audio_scheduler/", "tokenizer", "processor/"))
    return rng.random() < (0.15 if elsewhere else 0.75)


_DTYPES = ("F8_E8M0", "F8_E5M2", "F4", "F6_E2M3", "C64", "U64", "U16", "I128", "f32", "", "BOOL", "F64", "BF16", "I8")
_LENGTHS = (0, 1, 2, 7, 8, 100, 2**31, 2**32, 2**63 - 1, 2**63, 2**64 - 1, 100_000_000, 100_000_001)


def _safetensors_input(rng: random.Random, number: int, checkpoints: Path) -> FuzzInput:
    recipe = _recipe(rng)
    file = _a_file(rng, checkpoints / recipe, ".safetensors")
    whole = (checkpoints / recipe / file).read_bytes()
    length = struct.unpack("<Q", whole[:8])[0]
    header, data = whole[8 : 8 + length], whole[8 + length :]
    match rng.randrange(5):
        case 0 | 1:
            header, done = _mutate_entries(rng, header)
        case 2:
            header, done = _mutate_json(rng, header)
        case 3:
            header, done = mutate_bytes(rng, header)
        case _:
            data, done = _mutate_data(rng, data)
    length, more = _mutate_length(rng, len(header))
    content = struct.pack("<Q", length % 2**64) + header + data
    if rng.random() < 0.05:
        content = content[: rng.randrange(min(len(content), 20))]
        more = [*more, f"only {len(content)} bytes"]
    return FuzzInput("safetensors", number, recipe, file, content, _layerwise(rng, file), (*done, *more))


def _mutate_length(rng: random.Random, length: int) -> tuple[int, list[str]]:
    if rng.random() > 0.15:
        return length, []
    claimed = rng.choice((*_LENGTHS, length + 1, length - 1, length + 8, length * 2))
    return claimed, [f"header of {length} bytes said to be {claimed}"]


def _mutate_data(rng: random.Random, data: bytes) -> tuple[bytes, list[str]]:
    if rng.random() < 0.3:
        return data + bytes(rng.choice((1, 8, 4096))), ["data after the end"]
    kept = rng.choice((0, 1, len(data) // 2, len(data) - 1))
    return data[:kept], [f"{kept} of {len(data)} bytes of data kept"]


def _mutate_entries(rng: random.Random, header: bytes) -> tuple[bytes, list[str]]:
    """Names, types, shapes and places of one or two tensors."""
    tree = json.loads(header, object_pairs_hook=lambda pairs: Obj(map(list, pairs)))
    done = []
    for pair in rng.sample(tree, min(len(tree), rng.choice((1, 1, 2)))):
        place = rng.choice(("dtype", "shape", "data_offsets", "name"))
        value = _odd_entry(rng, place, dict(pair[1]), tree)
        if place == "name":
            done.append(f"{pair[0]} renamed to {_said(value)}")
            pair[0] = value
        else:
            done.append(f"{pair[0]}.{place} = {_said(value)}")
            pair[1] = Obj([key, value if key == place else old] for key, old in pair[1])
    return emit_json(tree).encode("utf-8", "surrogatepass"), done


def _odd_entry(rng: random.Random, place: str, entry: Mapping[str, Any], tree: Obj) -> Any:
    if place == "name":
        return rng.choice((str(rng.choice(tree)[0]), *_ODD_KEYS, "__metadata__", "x"))
    if place == "dtype":
        return rng.choice((*_DTYPES, None, 3, []))
    if place == "shape":
        shape = list(entry.get("shape", [1]))
        odd = ([], [0], [-1], [2**62, 4], [2**63], [10**12], [1] * 1000, [1.5], ["x"], None, shape[::-1], [*shape, 1])
        return rng.choice((*odd, [0, *shape], shape[:-1], [size * 2 for size in shape]))
    begin, end = entry.get("data_offsets", [0, 4])
    odd = ([end, begin], [begin, end + 4], [begin + 4, end + 4], [0, 4], [-4, end], [begin, 2**63], [begin], None)
    return rng.choice((*odd, [begin, end, end], [float(begin), end], [2**64, 2**65], [begin, begin], [str(begin), end]))


_RICH = """\
# everything that can be set
parallel: &split
  ulysses_degree: 1
  ring_degree: 1
  tp_degree: 1
  cfg_degree: 1
  dp_degree: 1
  hsdp: {replicate: 1, shard: 1}
  attention: native
offload:
  layerwise: true
  prefetch: 2
  device_budget: "6MiB"
  host: shared
launch:
  launcher: auto
  world_size: 1
  device: cpu
  ray_address: null
  port: 0
  cpus_per_rank: 0.25
  timeouts:
    launch_s: 180.0
    load_s: 1800
    collective_s: 300.0
    request_s: 3600.0
  recovery:
    retries: 2
    keep_every: 4
dtype: float32
"""
# fmt: off
_YAML_KEYS = (
    "parallel", "offload", "launch", "dtype", "hsdp", "tp_degree", "ulysses_degree", "ring_degree", "dp_degree",
    "cfg_degree", "layerwise", "prefetch", "device_budget", "host", "world_size", "timeouts", "load_s", "attention",
    "ulyses_degree", "zzz", "", "class", "__init__", "replicate", "shard", "port", "device", "launcher", "keep_every",
    Raw("<<"), Raw("1"), Raw("null"), Raw(".nan"), Raw("2026-01-01"), Raw("? [1, 2]\n"), Raw("!!binary aGk="),
    Raw("*a"), Raw("&a x"), Raw('"a\\nb"'), Raw("!!python/name:os.system x"), Raw("{a: b}"), Raw("[a]"),
    Raw('"\\uD800"'), Raw("~"), Raw("=" * 3), Raw("!!int x"), Raw("x" * 2000), Raw("é"), Raw("- a"),
)
# fmt: on
_YAML_VALUES = (
    *("18GiB", "0GiB", "1e400GiB", "9" * 400 + "GiB", "nanGiB", "-1GiB", "1.5MiB", "auto", "0.8", "xfuser", "native"),
    *("mmap", "shared", "bfloat16", "float16", "cuda", "cpu", "ray", "torchrun", "one_copy", 4, 6, 8, 16, 0.8, 1e-300),
)
# fmt: off
_YAML_RAW = (
    *_DIGITS, "~", "", "''", ".inf", "-.inf", ".nan", ".NaN", "1e999", "1_000", "0x1F", "0x", "0b", "0b2", "0o7",
    "017", "1:60:99", "190:20:30.15", "1" * 300 + ":1", "2026-13-45", "2026-01-01", "2026-01-01T99:00:00Z",
    "2026-01-01t00:00:00+99:99",
    "!!binary aGk=", '!!binary "%%%"', "!!binary [a]", "!!set {a, b}", "!!set [a]", "!!omap [a: 1]", "!!omap [1]",
    "!!pairs [a: 1]", "!!pairs 3", "!!timestamp 2026-13-45", "!!timestamp x", "!!int x", "!!int ''", "!!int 0x",
    "!!float x", "!!float ''", "!!float 1:x", "!!bool maybe", "!!bool ''", "!!null x", "!!str 3", "!!str [a]",
    "!!map [1]", "!!seq {a: 1}", "!!map x", "!unknown 3", "!<tag:x> 3", "!!python/object:os.system {}",
    '!!python/object/apply:os.system ["exit 1"]', "!!python/name:os.system", "!!python/tuple [1, 2]", "!!merge x",
    "!!value =", "=", "!", "! 3", "!!", "*missing", "&a [*a]",
    "&a {b: *a}", "&x 3", "*split", "{<<: *split}", "{<<: 3}", "{<<: [1]}", "{? [1]: 2}", "{[1]: 2}", "{a: 1, a: 2}",
    '"\\uD800"', '"\\0"', '"\\x"', "'\\0'", "|\n", ">-\n", "[", "{", "]", "}", "@x", "`x", "%x", "- 1", ": :",
    "a: b: c", "[" * 400 + "]" * 400, "[" * 5000, "{a: " * 1000, "- " * 500 + "1", "? " * 500,
    '"' + "x" * 100_000 + '"', "x" * 100_000, "# x", "<<", "on", "no", "True", "FALSE", "Null", "1e3", "+1", "-0",
    "1.", ".5", "1__0", "\t1", "1\t", "\x00", "\x07", "\x85",
)
# fmt: on
_LAUGHS = "\n".join(
    ["a0: &a0 [x, x, x, x, x, x, x, x, x]"] + [f"a{n}: &a{n} [{', '.join([f'*a{n - 1}'] * 9)}]" for n in range(1, 12)]
)
_MERGES = "\n".join(
    ["m0: &m0 {a: 1}"] + [f"m{n}: &m{n} {{<<: [{', '.join([f'*m{n - 1}'] * 9)}]}}" for n in range(1, 12)]
)
# fmt: off
_YAML_TEXTS = (
    "", " ", "---", "--- {}\n--- {}", "...", "null", "3", "[]", "{}", "- a", "x", "%YAML 9.9\n---\n{}",
    "%TAG ! x\n---\n!a", _LAUGHS, f"{_LAUGHS}\nparallel: *a11", _MERGES, f"{_MERGES}\nparallel: {{<<: *m11}}",
    "&a [*a]", "&a {parallel: *a}", "parallel: &a {hsdp: *a}", "parallel: &a [*a]", "offload: &a {<<: *a}",
    "<<: {parallel: {tp_degree: 2}}", "<<: [{}, 3]", "[" * 5000, "[" * 5000 + "]" * 5000, "{" * 3000, "{a: " * 3000,
    "- " * 5000, "? " * 3000, "a: " * 300, "&a " * 300, "!!" * 300, "\ufeffparallel: {}", "\0", "\x1b[2J", "\t",
    "parallel:\n\ttp_degree: 2", "parallel: {}\r\noffload: {}", "a\x85b: 1", "x: " + "[" + "1, " * 30_000 + "1]",
    "\n".join(f"k{n}: {n}" for n in range(30_000)), " " * 1_000_000, "#" * 1_000_000,
    "parallel:\n" + "  tp_degree: 2\n" * 3000, '"' + "\\\n" * 10_000 + '"', "x: |\n" + "  y\n" * 20_000,
    "k" * 100_000 + ": 1", "!!python/object/apply:os.system ['exit 1']", "!!set {parallel}", "!!omap [parallel: {}]",
    "!!map {parallel: {}}", "? {}\n: {}",
)
# fmt: on


def _yaml_input(rng: random.Random, number: int, _checkpoints: Path) -> FuzzInput:
    texts = [_RICH, _RICH, *(path.read_text(encoding="utf-8") for path in sorted(CONFIGS.glob("*.yaml")))]
    text, way = rng.choice(texts), rng.random()
    if way < 0.68:
        tree = _tree(yaml.safe_load(text))
        done = mutate_tree(rng, tree, _YAML_RAW, lambda: _yaml_addition(rng))
        data = emit_yaml(tree, rng).encode("utf-8", "surrogatepass")
    elif way < 0.88:
        data, done = mutate_bytes(rng, text.encode("utf-8"))
    else:
        whole = rng.choice(_YAML_TEXTS)
        data, done = whole.encode("utf-8"), [f"replaced by {_said(whole)}"]
    recipe = rng.choice(("flux2-klein", "z-image", "wan2.1"))
    return FuzzInput("yaml", number, recipe, CONFIG_FILE, data, False, tuple(done))


def _yaml_addition(rng: random.Random) -> tuple[Any, Any]:
    value = rng.choice(_YAML_VALUES) if rng.random() < 0.5 else interesting(rng, _YAML_RAW)
    return rng.choice(_YAML_KEYS), value


def emit_yaml(tree: Any, rng: random.Random, indent: int = 0) -> str:
    """Block style, here and there flow style; `Raw` as it is."""
    if not isinstance(tree, Obj) or not tree or rng.random() < 0.1:
        return _flow(tree)
    lines = []
    for key, value in tree:
        text = emit_yaml(value, rng, indent + 2)
        inline = not isinstance(value, Obj) or text.startswith("{")
        lines.append(f"{' ' * indent}{_yaml_key(key)}:{' ' if inline else chr(10)}{text}")
    return "\n".join(lines)


def _flow(tree: Any) -> str:
    if isinstance(tree, Obj):
        return "{" + ", ".join(f"{_yaml_key(key)}: {_flow(value)}" for key, value in tree) + "}"
    if isinstance(tree, list):
        return "[" + ", ".join(map(_flow, tree)) + "]"
    return str(tree) if isinstance(tree, Raw) else json.dumps(tree, ensure_ascii=False)


def _yaml_key(key: Any) -> str:
    plain = isinstance(key, Raw) or (isinstance(key, str) and key.isidentifier())
    return str(key) if plain else json.dumps(str(key), ensure_ascii=False)


_REQUEST: dict[str, Any] = {"prompt": "a red fox in snow", "seed": 0, "steps": 4, "height": 256, "width": 256}
# fmt: off
_EXTREMES: tuple[Any, ...] = (
    None, True, False, 0, 1, -1, 2, 16, 17, 250, 255, 1024, 2**31, 2**62, 2**63 - 1, 2**63, 2**64, 10**30, 10**400,
    0.0, -0.0, 0.5, 1.0, 16.0, 1e-320, 1e308, float("nan"), float("inf"), -float("inf"), "", "256", "x", "\ud800",
    "x" * 1_000_000, b"256", b"", [], [256], (256, 256), {}, {"a": 1}, 3 + 4j, Decimal(256), Decimal("NaN"), object,
    len,
)
# fmt: on
# fmt: off
_PROMPTS: tuple[Any, ...] = (
    None, (), [], "", "a fox", b"a fox", 3, ("",), (" ",), ("\0",), ("a\0b",), ("\ud800",), ("\udcff x",), (None,),
    (3,), (b"a fox",), (("a",),), (["a"],), ({},), ("a", None), ("a", ""), ["a fox"], {"a": 1}, {"a"}, ("\u200b",),
    ("\n",), ("x" * 1_000_000,), ("é" * 500_000,), ("a",) * 10_000, ("\x1b[2J",), ("\u202e",), (True,),
    (float("nan"),), range(3), ("<|endoftext|>",), ("{}",), ("%s",), ("\ufeff",), ("a\r\nb",),
)
# fmt: on
# fmt: off
_NEGATIVES: tuple[Any, ...] = (
    "", " ", "blurred", "\ud800", "\0", "x" * 1_000_000, b"x", 3, [], ["x"], ("x",), {}, True,
)
# fmt: on
_SETTINGS: dict[str, tuple[Any, ...]] = {
    "prompt": _PROMPTS,
    "seed": _EXTREMES,
    "steps": _EXTREMES,
    "height": _EXTREMES,
    "width": _EXTREMES,
    "guidance_scale": (*_EXTREMES, 3.5, 7.0),
    "negative_prompt": (*_NEGATIVES, *_EXTREMES[:30]),
    "frames": (*_EXTREMES, 9, 81, 124, 141, 345, 346),
    "time_limit_s": (*_EXTREMES, 60.0),
    "images_per_prompt": _EXTREMES,
    "batch_size": _EXTREMES,
}


def _request_input(rng: random.Random, number: int, _checkpoints: Path) -> FuzzInput:
    """One to three settings of a request, wrong or extreme."""
    names = rng.sample(sorted(_SETTINGS), rng.choice((1, 1, 2, 3)))
    fields = _REQUEST | {name: rng.choice(_SETTINGS[name]) for name in names}
    done = tuple(f"{name} = {_said(fields[name])}" for name in names)
    shown = ", ".join(f"{name}={shorten(repr(value), 400)}" for name, value in fields.items())
    return FuzzInput("request", number, _recipe(rng), "request", shown.encode(), False, done, fields)


_MAKERS: Mapping[str, Callable[[random.Random, int, Path], FuzzInput]] = {
    "yaml": _yaml_input,
    "json": _json_input,
    "safetensors": _safetensors_input,
    "request": _request_input,
}
