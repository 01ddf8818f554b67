"""Blocks are found where they are, under their true names, or an error says in one line why not."""

from __future__ import annotations

import importlib
import warnings
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from crossdock.offload.live.discovery import (
    CURRENT,
    DEPRECATED,
    DiscoveryError,
    SharedStorage,
    discover_blocks,
    infer_stacks,
    plain_tensors,
    shared_storage,
)


class Block(nn.Module):
    def __init__(self, size: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(size, size)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class OtherBlock(Block):
    pass


class Model(nn.Module):
    """Declares nothing. `layers` under `inner`, two stacks at the top, and a large part that is no list."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Linear(8, 8)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.inner = nn.Module()
        self.inner.layers = nn.ModuleList(Block() for _ in range(2))
        self.single = Block()


class UsersModel(Model):
    """What a user writes for a model of their own."""

    _layerwise_offload_blocks_attrs = ("inner.layers", "blocks")


class OldUsersModel(Model):
    _layerwise_offload_blocks_attr = "blocks"


class BothSpellings(OldUsersModel):
    _layerwise_offload_blocks_attrs = ("inner.layers",)


class BehindAProperty(Model):
    """The declared attribute exists nowhere in the module tree (pitfall 12)."""

    _layerwise_offload_blocks_attrs = ("all_blocks",)
    kind: Callable[[list[nn.Module]], Any] = list

    @property
    def all_blocks(self) -> Any:
        return type(self).kind([*self.inner.layers, *self.blocks])


def _names(model: nn.Module, stacks: Any = None) -> list[str]:
    return [block.name for block in discover_blocks(model, stacks)]


BLOCKS = ["blocks.0", "blocks.1", "blocks.2"]
LAYERS = ["inner.layers.0", "inner.layers.1"]


# Which stacks


def test_a_declaration_gives_the_stacks_in_its_order_and_wins_over_the_argument() -> None:
    model = UsersModel()
    assert _names(model) == _names(model, ["blocks"]) == LAYERS + BLOCKS
    assert [block.module for block in discover_blocks(model)] == [*model.inner.layers, *model.blocks]


def test_an_instance_may_declare_too_and_one_path_may_stand_alone() -> None:
    model = Model()
    setattr(model, CURRENT, "inner.layers")
    assert _names(model) == LAYERS


def test_the_old_spelling_works_with_a_warning_that_names_the_class_and_the_new_spelling() -> None:
    with pytest.warns(DeprecationWarning, match=rf"OldUsersModel declares {DEPRECATED}.*{CURRENT} = \['blocks'\]") as w:
        blocks = discover_blocks(OldUsersModel(), ["inner.layers"])
    assert [block.name for block in blocks] == BLOCKS
    assert [warning.filename for warning in w] == [__file__], "once, and it points at the caller"


def test_of_both_spellings_the_current_one_wins_and_the_old_one_still_warns() -> None:
    with pytest.warns(DeprecationWarning, match="BothSpellings"):
        assert _names(BothSpellings()) == LAYERS


def test_the_current_spelling_does_not_warn() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        discover_blocks(UsersModel())


def test_without_a_declaration_the_argument_counts_and_without_that_the_structure() -> None:
    model = Model()
    assert _names(model, ["inner.layers"]) == _names(model, "inner.layers") == LAYERS
    assert _names(model) == BLOCKS + LAYERS
    setattr(model, CURRENT, None)
    assert _names(model, ["inner.layers"]) == LAYERS


# What a stack may be


@pytest.mark.parametrize("kind", [list, tuple, nn.ModuleList, lambda blocks: nn.Sequential(*blocks)])
def test_blocks_behind_a_property_go_by_their_true_paths(kind: Callable[[list[nn.Module]], Any]) -> None:
    model = type("Kind", (BehindAProperty,), {"kind": staticmethod(kind)})()
    assert _names(model) == LAYERS + BLOCKS


def test_a_module_dict_and_a_sequential_are_stacks() -> None:
    model = nn.Module()
    model.dict = nn.ModuleDict({"image": Block(), "text": Block()})
    model.sequential = nn.Sequential(Block(), Block())
    assert _names(model, ["dict", "sequential"]) == ["dict.image", "dict.text", "sequential.0", "sequential.1"]


def test_a_module_that_is_no_sequence_is_one_block_under_its_true_path() -> None:
    class OneBlock(Model):
        @property
        def the_block(self) -> nn.Module:
            return self.single

    assert _names(OneBlock(), ["the_block"]) == ["single"]
    assert _names(OneBlock(), ["blocks.1"]) == ["blocks.1"]


def test_entries_that_hold_no_tensors_are_skipped() -> None:
    model = nn.Module()
    model.stack = nn.ModuleList([nn.Identity(), Block(), nn.BatchNorm1d(2, affine=False)])
    model.stack.append(None)  # type: ignore[arg-type]
    assert _names(model, ["stack"]) == ["stack.1", "stack.2"], "one with buffers only counts"
    model.listed = [None, *model.stack]
    assert _names(model, ["listed"]) == ["stack.1", "stack.2"]
    model.shared_placeholder = [model.stack[0], model.stack[0], model.stack[1]]
    assert _names(model, ["shared_placeholder"]) == ["stack.1"]


# Errors: one line with the class, what, the module lists, and what to do


def _missing() -> tuple[nn.Module, Any]:
    return Model(), ["block"]


def _missing_in_declaration() -> tuple[nn.Module, Any]:
    return type("Wrong", (Model,), {CURRENT: ["inner.layer"]})(), None


def _empty() -> tuple[nn.Module, Any]:
    model = Model()
    model.blocks = nn.ModuleList()
    return model, ["blocks"]


def _empty_python_list() -> tuple[nn.Module, Any]:
    model = Model()
    model.listed = []
    return model, ["listed"]


def _only_placeholders() -> tuple[nn.Module, Any]:
    model = Model()
    model.blocks = nn.ModuleList([nn.Identity(), nn.Identity()])
    return model, ["blocks"]


def _only_nones() -> tuple[nn.Module, Any]:
    model = Model()
    model.listed = [None]
    return model, ["listed"]


def _attribute(value: object) -> Callable[[], tuple[nn.Module, Any]]:
    def build() -> tuple[nn.Module, Any]:
        model = Model()
        model.thing = value
        return model, ["thing"]

    return build


def _twice_in_two_stacks() -> tuple[nn.Module, Any]:
    return type("Undeclared", (BehindAProperty,), {CURRENT: None})(), ["inner.layers", "all_blocks"]


def _twice_in_one_list() -> tuple[nn.Module, Any]:
    model = Model()
    model.listed = [model.single, model.single]
    return model, ["listed"]


def _outside_the_tree() -> tuple[nn.Module, Any]:
    model = Model()
    model.listed = [model.single, Block()]
    return model, ["listed"]


def _itself() -> tuple[nn.Module, Any]:
    model = Model()
    model.listed = [model]
    return model, ["listed"]


def _list_of_lists() -> tuple[nn.Module, Any]:
    model = nn.Module()
    model.stages = nn.ModuleList([nn.ModuleList([Block(), Block()])])
    return model, ["stages"]


@pytest.mark.parametrize(
    ("case", "what", "advice"),
    [
        (_missing, "there is no block stack 'block', which the argument stacks names", "name an attribute"),
        (_missing_in_declaration, f"there is no block stack 'inner.layer', which {CURRENT} names", "name an attribute"),
        (lambda: (Model(), [""]), "there is no block stack ''", "name an attribute"),
        (_empty, "block stack 'blocks', which the argument stacks names, is empty", "name another"),
        (_empty_python_list, "block stack 'listed', which the argument stacks names, is empty", "name another"),
        (_only_placeholders, "block stack 'blocks', which the argument stacks names, holds no tensors", "drop it"),
        (_only_nones, "block stack 'listed', which the argument stacks names, holds no tensors", "drop it"),
        (_attribute(7), "block stack 'thing', which the argument stacks names, holds a int", "name a module"),
        (_attribute(None), "holds a NoneType", "name a module"),
        (_attribute({"a": 1}), "holds a dict", "name a module"),
        (_attribute([torch.zeros(99, 99)]), "holds a Tensor", "name a module"),
        (_attribute([Block(), "x"]), "holds a str", "name a module"),
        (_twice_in_two_stacks, "block 'inner.layers.0' is listed twice", "list every block once"),
        (_twice_in_one_list, "block 'single' is listed twice", "list every block once"),
        (lambda: (Model(), ["blocks", "blocks.1.linear"]), "block 'blocks.1.linear' lies inside block 'blocks.1'", ""),
        (lambda: (Model(), ["blocks.1.linear", "blocks"]), "block 'blocks.1.linear' lies inside block 'blocks.1'", ""),
        (_outside_the_tree, "a Block of block stack 'listed' is not in the model's module tree", "register it"),
        (_itself, "is not in the model's module tree", "register it"),
        (_list_of_lists, "block 'stages.0' is a ModuleList, which is never called itself", "name the list"),
        (lambda: (Model(), ()), "the argument stacks names no block stack", "name at least one"),
        (lambda: (Model(), [1]), "the argument stacks is no list of attribute paths", "make it one"),
        (lambda: (type("Wrong", (Model,), {CURRENT: 7})(), None), f"{CURRENT} is no list of attribute", "make it one"),
        (lambda: (nn.Sequential(Block(), Block()), None), "it declares no block stack", f"declare {CURRENT}"),
    ],
)
def test_an_error_says_in_one_line_what_is_wrong(
    case: Callable[[], tuple[nn.Module, Any]], what: str, advice: str
) -> None:
    model, stacks = case()
    with pytest.raises(DiscoveryError) as error:
        discover_blocks(model, stacks)
    message = str(error.value)
    assert message.startswith(f"{type(model).__name__}: ")
    assert what in message
    assert advice in message.rpartition("; ")[2]
    assert "\n" not in message
    assert "; its module lists: " in message


def test_an_error_lists_the_outermost_module_lists_with_their_lengths() -> None:
    model = Model()
    model.blocks[0].to_out = nn.ModuleList([nn.Linear(8, 8), nn.Dropout()])
    with pytest.raises(DiscoveryError, match=r"its module lists: blocks \(3\), inner\.layers \(2\); name"):
        discover_blocks(model, ["nothing"])
    with pytest.raises(DiscoveryError, match="its module lists: none;"):
        discover_blocks(Block())


# Stacks of a model that declares nothing


def test_small_lists_and_lists_of_different_classes_are_no_stacks() -> None:
    model = Model()
    model.small = nn.ModuleList(Block(2) for _ in range(2))
    model.mixed = nn.ModuleList([Block(), OtherBlock(), Block()])
    model.alone = nn.ModuleList([Block(16)])
    model.containers = nn.ModuleList([nn.ModuleList([Block(16), Block(16)])])
    model.functions = nn.ModuleList([nn.GELU(), nn.GELU()])
    assert infer_stacks(model) == ("blocks", "inner.layers", "containers.0")


def test_inferred_stacks_stand_in_module_order_whether_named_or_not() -> None:
    model = Model()
    model.others = nn.ModuleList(OtherBlock() for _ in range(2))
    model._no_split_modules = ["OtherBlock"]
    assert infer_stacks(model) == ("blocks", "inner.layers", "others")


@pytest.mark.parametrize("attribute", ["_no_split_modules", "_repeated_blocks"])
def test_named_classes_make_a_stack_whatever_its_size_and_mixture(attribute: str) -> None:
    model = Model()
    model.small = nn.ModuleList(Block(2) for _ in range(2))
    model.mixed = nn.ModuleList([Block(), OtherBlock(), nn.Identity()])
    model.alone = nn.ModuleList([OtherBlock(2)])
    setattr(model, attribute, {"Block", "OtherBlock"})
    assert infer_stacks(model) == ("blocks", "inner.layers", "small", "mixed", "alone")


def test_the_share_counts_bytes_of_parameters_and_buffers() -> None:
    def model(dtype: torch.dtype) -> nn.Module:
        model = nn.Module()
        model.stack = nn.ModuleList(nn.Linear(10, 10, bias=False, dtype=dtype) for _ in range(2))
        model.register_buffer("large", torch.empty(2600, dtype=torch.float32))
        return model

    assert infer_stacks(model(torch.float32)) == ("stack",), "800 of 11,200 bytes"
    assert infer_stacks(model(torch.bfloat16)) == (), "400 of 10,800 bytes"


def test_of_nested_lists_the_outer_one_is_taken_unless_only_the_inner_one_is_named() -> None:
    class Stage(Block):
        def __init__(self) -> None:
            super().__init__()
            self.parts = nn.ModuleList([OtherBlock(), OtherBlock()])

    model = nn.Module()
    model.stages = nn.ModuleList([Stage(), Stage()])
    assert infer_stacks(model) == ("stages",)
    model.stages[1]._no_split_modules = ["OtherBlock"]
    assert infer_stacks(model) == ("stages.0.parts", "stages.1.parts")


def test_a_second_list_of_the_same_blocks_is_not_a_second_stack() -> None:
    model = Model()
    model.again = nn.ModuleList(model.blocks[1:])
    assert infer_stacks(model) == ("blocks", "inner.layers")


DIFFUSERS = {
    "FluxTransformer2DModel": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "Flux2Transformer2DModel": {"transformer_blocks": 8, "single_transformer_blocks": 48},
    "ZImageTransformer2DModel": {"noise_refiner": 2, "context_refiner": 2, "layers": 30},
    "QwenImageTransformer2DModel": {"transformer_blocks": 60},
    "WanTransformer3DModel": {"blocks": 40},
    "WanVACETransformer3DModel": {"blocks": 40, "vace_blocks": 8},
    "Kandinsky6Transformer3DModel": {
        "video_text_transformer_blocks": 4,
        "audio_text_transformer_blocks": 4,
        "visual_transformer_blocks": 60,
    },
    "SD3Transformer2DModel": {"transformer_blocks": 18},
}
TRANSFORMERS = {
    "Qwen3Model": {"layers": 32},
    "Qwen3ForCausalLM": {"model.layers": 32},
    "Qwen2_5_VLForConditionalGeneration": {"model.visual.blocks": 32, "model.language_model.layers": 80},
    "T5EncoderModel": {"encoder.block": 6},
    "UMT5EncoderModel": {"encoder.block": 8},
    "CLIPTextModel": {"encoder.layers": 12},
    "CLIPTextModelWithProjection": {"text_model.encoder.layers": 12},
    "LlamaModel": {"layers": 32},
    "GemmaModel": {"layers": 28},
    "Gemma2Model": {"layers": 26},
    "Mistral3ForConditionalGeneration": {
        "model.vision_tower.transformer.layers": 24,
        "model.language_model.layers": 40,
    },
}


@pytest.mark.parametrize(
    ("library", "name", "expected"),
    [
        *(("diffusers", name, expected) for name, expected in DIFFUSERS.items()),
        *(("transformers", name, expected) for name, expected in TRANSFORMERS.items()),
    ],
)
def test_the_stacks_of_published_classes_are_inferred(library: str, name: str, expected: dict[str, int]) -> None:
    """Default configurations, on meta; they declare nothing of their own. No storage is shared."""
    module = getattr(importlib.import_module(library), name)
    with torch.device("meta"):
        model = module() if library == "diffusers" else module(module.config_class())
    assert {path: len(model.get_submodule(path)) for path in infer_stacks(model)} == expected
    blocks = discover_blocks(model)
    assert [block.name for block in blocks] == [f"{path}.{i}" for path, n in expected.items() for i in range(n)]
    assert shared_storage(model, blocks) == []


# Shared storage


def _shared(model: nn.Module, stacks: Any = ("blocks",)) -> list[SharedStorage]:
    return shared_storage(model, discover_blocks(model, stacks))


def test_nothing_is_shared_in_an_ordinary_model_nor_within_one_block() -> None:
    model = Model()
    model.blocks[0].tied = model.blocks[0].linear.weight
    model.embed.again = model.embed.weight
    model.blocks[1].empty, model.blocks[2].empty = (nn.Parameter(torch.empty(0)) for _ in range(2))
    model.alias = nn.ModuleList(model.blocks)
    assert _shared(model) == []


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_tied_parameters_are_reported_with_both_names_and_owners(device: str) -> None:
    with torch.device(device):
        model = Model()
    model.blocks[2].linear.weight = model.blocks[0].linear.weight
    model.embed.bias = model.blocks[1].linear.bias
    assert _shared(model) == [
        SharedStorage("blocks.0.linear.weight", "blocks.0", "blocks.2.linear.weight", "blocks.2"),
        SharedStorage("blocks.1.linear.bias", "blocks.1", "embed.bias", None),
    ]


@pytest.mark.parametrize("device", ["cpu", "meta"])
def test_views_into_one_storage_are_shared_even_where_they_do_not_overlap(device: str) -> None:
    with torch.device(device):
        model, table = Model(), torch.zeros(10)
    model.blocks[0].register_buffer("table", table[:5])
    model.blocks[1].register_buffer("table", table[5:])
    model.register_buffer("table", table.detach())
    assert _shared(model) == [
        SharedStorage("blocks.0.table", "blocks.0", "blocks.1.table", "blocks.1"),
        SharedStorage("blocks.0.table", "blocks.0", "table", None),
    ]


def test_two_storages_over_the_same_addresses_are_shared() -> None:
    """Two tensors made from one buffer, as when a file is mapped once and read in pieces that overlap."""
    model, memory = Model(), bytearray(64)
    model.blocks[0].register_buffer("table", torch.frombuffer(memory, dtype=torch.uint8, count=40))
    model.blocks[1].register_buffer("table", torch.frombuffer(memory, dtype=torch.uint8, offset=32))
    assert [(item.owner, item.other_owner) for item in _shared(model)] == [("blocks.0", "blocks.1")]
    model.blocks[0].register_buffer("table", torch.frombuffer(memory, dtype=torch.uint8, count=32))
    assert _shared(model) == [], "neighbours"
    model.blocks[1].register_buffer("table", torch.frombuffer(memory, dtype=torch.uint8, offset=8))
    model.blocks[2].register_buffer("table", torch.frombuffer(memory, dtype=torch.uint8, offset=48))
    assert [item.other_owner for item in _shared(model)] == ["blocks.1", "blocks.2"], "a chain of overlaps"


def test_a_submodule_that_two_blocks_or_a_block_and_the_model_hold_is_shared() -> None:
    model = Model()
    rope = nn.BatchNorm1d(3, affine=False)
    model.blocks[0].rope = model.blocks[1].rope = model.rope = rope
    assert {(item.owner, item.other_owner) for item in _shared(model)} == {("blocks.0", "blocks.1"), ("blocks.0", None)}
    assert {item.other_fqn for item in _shared(model)} >= {"blocks.1.rope.running_mean", "rope.running_mean"}


def test_the_storage_inside_a_tensor_subclass_counts() -> None:
    from torch.testing._internal.two_tensor import TwoTensor

    model, weight = Model(), torch.zeros(4)
    model.blocks[0].weight = nn.Parameter(TwoTensor(torch.zeros(4), weight))
    model.blocks[1].weight = nn.Parameter(weight)
    assert _shared(model) == [SharedStorage("blocks.0.weight", "blocks.0", "blocks.1.weight", "blocks.1")]


# Plain tensors


def test_tensors_kept_as_plain_attributes_are_named() -> None:
    model = Model()
    model.scale = torch.ones(1)
    model.blocks[0].linear.cache = [torch.ones(1), None, torch.ones(1)]
    model.blocks[1].pair = (1, torch.ones(1))
    model.blocks[2].tables = {"cos": torch.ones(1), "n": 3, "sin": torch.ones(1)}
    model.inner.layers[0].stale = model.inner.layers[0].linear.weight.data  # another tensor over the same bytes
    model.inner.layers[1].hidden = [nn.Parameter(torch.ones(1))]
    assert plain_tensors(model) == [
        "scale",
        "blocks.0.linear.cache.0",
        "blocks.0.linear.cache.2",
        "blocks.1.pair.1",
        "blocks.2.tables.cos",
        "blocks.2.tables.sin",
        "inner.layers.0.stale",
        "inner.layers.1.hidden.0",
    ]
    assert plain_tensors(model.blocks[1]) == ["pair.1"]


def test_parameters_and_buffers_are_no_plain_tensors_under_any_name() -> None:
    model = Model()
    model.register_buffer("table", torch.ones(2), persistent=False)
    model.listed = [model.embed.weight, model.table]
    model.other = SimpleNamespace(table=torch.ones(1))  # deeper than a list or dict: not looked into
    vars(model)["alias"] = model.single.linear.bias
    assert plain_tensors(model) == []
