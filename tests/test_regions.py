"""Sequence regions on a toy: what is cut and how, what attention is told, what is put back, and what is refused."""

from __future__ import annotations

import copy
from dataclasses import replace
from types import SimpleNamespace
from typing import Any

import diffusers
import pytest
import torch
from diffusers.models.transformers.transformer_qwenimage21 import QwenImage21KVCache
from parallel_models import CASES, IMAGE, build
from test_parallel_models import LIMIT, Gang, run_parallel, run_whole
from thread_ranks import as_group, groups_of, run_threads
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode_stack

from crossdock.parallel.regions import AttentionScope, SequenceParallelism, SequenceRegion, ShardLike
from crossdock.parallel.sequence import SequenceLayout, take_shard
from crossdock.runtime.rank.attention_backend import AttentionBinding

PARTS = 3


class Seen:
    """In attention's place: writes down what it is told."""

    def __init__(self) -> None:
        self.calls: list[dict[str, Any]] = []
        self.queries: list[Tensor] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, **options: Any) -> Tensor:
        self.calls.append(options)
        self.queries.append(query)
        return query


class Block(nn.Module):
    """Writes down what it is called with; `attend` stands for its attention."""

    def __init__(self) -> None:
        super().__init__()
        self.attn = nn.Identity()
        self.seen: list[dict[str, Any]] = []
        self.attend: Any = None

    def forward(
        self,
        image: Tensor,
        text: Tensor | None = None,
        tail: int | None = None,
        tables: Any = None,
        temb: Tensor | None = None,
        real: Tensor | None = None,
    ) -> Any:
        self.seen.append({"image": image, "text": text, "tail": tail, "tables": tables, "temb": temb, "real": real})
        if self.attend is not None:
            self.attend(image)
        return image if text is None else (image, text)


class Model(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList(Block() for _ in range(2))

    def forward(self, image: Tensor, text: Tensor | None = None, first_only: tuple[str, ...] = (), **along: Any) -> Any:
        for block in self.blocks:
            result = block(image, text, **along)
            along = {name: value for name, value in along.items() if name not in first_only}
            image, text = (result, None) if text is None else result
        return image if text is None else (image, text)


def region(**changes: Any) -> SequenceRegion:
    stack: dict[str, Any] = {"enter": "blocks.0", "within": "blocks.*", "leave": "blocks.-1"}
    return SequenceRegion(**{**stack, "segments": ("image", "text"), "gathers": ("image", "text"), **changes})


def run(
    of: SequenceRegion, scope: AttentionScope | None = None, **inputs: Any
) -> list[tuple[Any, list[dict[str, Any]], Seen]]:
    """Per rank: the output, what the second block saw, and what attention was told."""
    meeting, groups = groups_of(PARTS)

    def work(rank: int) -> tuple[Any, list[dict[str, Any]], Seen]:
        model, seen = Model(), Seen()
        group = as_group(groups[rank])
        assert group is not None
        sequence = SequenceParallelism(seen, rank, PARTS, group)
        sequence.apply(model, (of,))
        attention = replace(sequence.attention_of("blocks.1.attn"), scope=scope)
        model.blocks[1].attend = lambda tokens: attention.attend(tokens, tokens, tokens)
        output = model(**inputs)
        assert not sequence.running
        return output, [block.seen[0] for block in model.blocks], seen

    return run_threads([meeting], work, PARTS)


def share(tensor: Tensor, dim: int, rank: int) -> Tensor:
    return take_shard(tensor, dim, PARTS, rank)


def test_several_segments_come_out_of_a_tuple() -> None:
    image, text = torch.randn(2, 8, 3), torch.randn(2, 4, 3)
    for rank, (output, blocks, seen) in enumerate(run(region(), image=image, text=text)):
        assert torch.equal(output[0], image)
        assert torch.equal(output[1], text)
        for block in blocks:
            assert torch.equal(block["image"], share(image, 1, rank))
            assert torch.equal(block["text"], share(text, 1, rank))
        assert seen.calls == [{"layout": SequenceLayout((8, 4), PARTS), "mask": None}]


@pytest.mark.parametrize("tokens", [1, 2])
def test_a_rank_without_tokens_has_a_copy(tokens: int) -> None:
    """Models cannot reshape what has no entries. Attention is not told of it, and it does not come out."""
    image, text, tables = torch.randn(2, tokens, 3), torch.randn(2, 4, 3), torch.randn(tokens, 5)
    of = region(shard_like={"tables": ShardLike("image", 0)})
    found = run(of, AttentionScope(("image",)), image=image, text=text, tables=tables)
    for rank, (output, blocks, seen) in enumerate(found):
        assert torch.equal(output[0], image)
        assert torch.equal(output[1], text)
        held = slice(rank, rank + 1) if rank < tokens else slice(1)
        for block in blocks:
            assert torch.equal(block["image"], image[:, held])
            assert torch.equal(block["tables"], tables[held])
        assert torch.equal(seen.queries[0], share(image, 1, rank))


def test_the_last_tokens_are_a_segment_of_their_own() -> None:
    """An int counts them; every block is given its own number, and they come out in one piece, in order."""
    image, tables = torch.randn(2, 13, 3), torch.randn(1, 13, 1, 5)
    both = ("image", "tail")
    of = region(
        segments=both, gathers=both, shard_like={"tables": ShardLike(both, 1), "temb": ShardLike(both, 1, ndim=4)}
    )
    temb = torch.randn(2, 13, 6)  # three dims: not per token
    found = run(of, image=image, tail=8, tables=(tables, tables + 1), temb=temb)
    for rank, (output, blocks, seen) in enumerate(found):
        assert torch.equal(output, image)
        for block in blocks:
            head, tail = share(image[:, :5], 1, rank), share(image[:, 5:], 1, rank)
            assert torch.equal(block["image"], torch.cat([head, tail], 1))
            assert block["tail"] == tail.shape[1]
            expected = torch.cat([share(tables[:, :5], 1, rank), share(tables[:, 5:], 1, rank)], 1)
            assert torch.equal(block["tables"][0], expected)
            assert torch.equal(block["tables"][1], expected + 1)
            assert block["temb"] is temb
        assert seen.calls == [{"layout": SequenceLayout((5, 8), PARTS), "mask": None}]


def test_elements_of_a_tuple_follow_what_they_belong_to() -> None:
    image, text = torch.randn(2, 8, 3), torch.randn(2, 4, 3)
    tables, one = (torch.randn(8, 5), torch.randn(4, 5)), torch.randn(2, 1, 6)
    shard_like = {"tables": (ShardLike("image", 0), ShardLike("text", 0)), "temb": ShardLike("image", 1)}
    for rank, (_, blocks, _) in enumerate(
        run(region(shard_like=shard_like), image=image, text=text, tables=tables, temb=one)
    ):
        for block in blocks:
            assert torch.equal(block["tables"][0], share(tables[0], 0, rank))
            assert torch.equal(block["tables"][1], share(tables[1], 0, rank))
            assert block["temb"] is one  # one entry for all tokens
    assert run(region(shard_like=shard_like), image=image, text=text)[0][1][0]["tables"] is None


def test_what_does_not_follow_is_refused() -> None:
    shard_like = {"temb": ShardLike("image", 1)}
    with pytest.raises(ValueError, match=r"shape \(2, 7, 6\) does not follow the 8 tokens of image"):
        run(
            region(shard_like=shard_like),
            image=torch.randn(2, 8, 3),
            text=torch.randn(2, 4, 3),
            temb=torch.randn(2, 7, 6),
        )


def test_padding_is_told_of_the_whole_sequence() -> None:
    """In the model's order, for the keys that are asked for; a call without padding has no mask."""
    image, text = torch.randn(2, 8, 3), torch.randn(2, 4, 3)
    real = torch.tensor([[1, 1, 1, 1], [1, 0, 0, 0]])
    of = region(padding={"real": "text"})
    for rank, (_, blocks, seen) in enumerate(run(of, image=image, text=text, real=real)):
        assert torch.equal(blocks[1]["real"], share(real, 1, rank))
        mask = seen.calls[0]["mask"]
        assert mask.dtype == torch.bool
        assert torch.equal(mask, torch.cat([torch.ones(2, 8), real], 1).bool())
    for _, _, seen in run(of, AttentionScope(("text", "image")), image=image, text=text, real=real):
        assert torch.equal(seen.calls[0]["mask"], torch.cat([real, torch.ones(2, 8)], 1).bool())
    for _, _, seen in run(of, AttentionScope(("image",)), image=image, text=text, real=real):
        assert seen.calls[0] == {"layout": SequenceLayout((8,), PARTS), "mask": None}
    assert run(of, image=image, text=text)[0][2].calls[0]["mask"] is None
    found = run(of, image=image, text=text, real=real, first_only=("real",))  # the second block is given none
    assert found[0][2].calls[0]["mask"] is None


def test_queries_and_keys_may_be_of_different_segments() -> None:
    image, text = torch.randn(2, 8, 3), torch.randn(2, 4, 3)
    for _, _, seen in run(region(), AttentionScope(("image",), ("text",)), image=image, text=text):
        layouts = {"layout": SequenceLayout((8,), PARTS), "key_layout": SequenceLayout((4,), PARTS)}
        assert seen.calls == [{**layouts, "mask": None}]


def test_a_segment_that_is_none_is_not_there() -> None:
    image = torch.randn(2, 8, 3)
    for output, _, seen in run(region(gathers="image"), image=image):
        assert torch.equal(output, image)
        assert seen.calls[0]["layout"] == SequenceLayout((8,), PARTS)


def test_an_output_that_is_not_what_comes_out_is_refused() -> None:
    with pytest.raises(ValueError, match=r"blocks\.-1 gives a tuple, which is not one tensor of each of \('image',\)"):
        run(region(gathers="image"), image=torch.randn(2, 8, 3), text=torch.randn(2, 4, 3))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"shard_like": {"nonsense": "image"}}, r"Block\.forward has no argument 'nonsense'"),
        ({"cross": ("blocks.*.attn2",)}, "no module of Model matches 'blocks.*.attn2'"),
        ({"scopes": {"blocks.*.attn2": AttentionScope(("image",))}}, "no module of Model matches 'blocks.*.attn2'"),
    ],
)
def test_a_region_that_does_not_fit_leaves_the_model_alone(changes: dict[str, Any], message: str) -> None:
    model, sequence = Model(), SequenceParallelism(Seen(), 0, 2, SimpleNamespace())  # type: ignore[arg-type]
    with pytest.raises(ValueError, match=message):
        sequence.apply(model, (region(**changes),))
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())


# -- on the classes of diffusers -------------------------------------------------------------------------------------


def worst(name: str, prepare: Any = None, **changes: Any) -> float:
    """Relative error of the worst of two ranks, Ulysses, with another region or another model."""
    case = CASES[name]
    model, inputs, expected = run_whole(case)
    if prepare is not None:
        prepare(model)
    of = (replace(case.regions[0], **changes),)
    ranks = run_parallel(replace(case, regions=of), model, inputs, Gang(1, 2, 1))
    pairs = [pair for of_rank in ranks for pair in zip(of_rank, expected, strict=True)]
    return max(float((found - whole).abs().max() / whole.abs().max()) for found, whole in pairs)


def test_cross_attention_is_told_by_its_module_not_by_lengths() -> None:
    """The text here is as long as a rank's share of the video: named, it is right; not named, it is refused."""
    assert run_whole(CASES["Wan"])[1]["encoder_hidden_states"].shape[1] == 9 == 18 // 2
    assert worst("Wan") < LIMIT
    with pytest.raises(
        ValueError, match=r"is kept from sequence parallelism; .* name the module in the region's cross"
    ):
        worst("Wan", cross=())


@pytest.mark.parametrize("name", ["Wan", "LTX-2, per token", "SD 3.5", "FLUX.3, edit"])
def test_modules_may_share_a_processor(name: str) -> None:
    def share_one(model: Any) -> None:
        attentions = [module for module in model.modules() if hasattr(module, "processor")]
        for attention in attentions:
            attention.processor = attentions[0].processor

    assert worst(name, share_one) < LIMIT


@pytest.mark.parametrize(
    ("name", "changes"),
    [
        ("FLUX.3, edit", {"scopes": {}}),
        ("SD 3.5", {"scopes": {}}),
        ("HunyuanVideo 1.5", {"segments": ("encoder_hidden_states", IMAGE)}),
        ("LTX-2", {"scopes": {}}),
    ],
)
def test_what_the_data_says_matters(name: str, changes: dict[str, Any]) -> None:
    """A wrong region is refused, or shows in the numbers."""
    try:
        error = worst(name, **changes)
    except (ValueError, RuntimeError):
        return
    assert error > 1000 * LIMIT


@pytest.mark.parametrize("name", ["Wan", "SD 3.5"])
def test_the_model_is_given_back(name: str) -> None:
    """Processors shared between modules included; and it runs in one piece again."""
    case = CASES[name]
    model, inputs, expected = run_whole(case)
    attentions = [module for module in model.modules() if hasattr(module, "processor")]
    for attention in attentions:
        attention.processor = attentions[0].processor
    before = [(module.processor, vars(module.processor).copy()) for module in attentions]
    sequence = Gang(1, 2, 1).sequence(0)
    sequence.apply(model, case.regions)
    binding = AttentionBinding(model, sequence)
    binding.remove()
    sequence.remove()
    for module, (processor, state) in zip(attentions, before, strict=True):
        assert module.processor is processor
        assert {key: value for key, value in vars(processor).items() if value is not None} == state
    assert not any(module._forward_pre_hooks or module._forward_hooks for module in model.modules())
    with torch.no_grad():
        assert torch.equal(model(**inputs, return_dict=False)[0], expected[0])


def test_an_error_in_a_region_leaves_nothing_behind() -> None:
    """Also where torch's own attention is listened to."""
    case = CASES["SD 3.5"]
    model, inputs, _ = run_whole(case)
    sequence = Gang(1, 2, 1).sequence(0)
    sequence.apply(model, case.regions)
    binding = AttentionBinding(model, sequence)
    sequence._attention = SimpleNamespace(attend=_fail)  # type: ignore[assignment]
    with torch.no_grad(), pytest.raises(ArithmeticError):
        model(**inputs)
    assert not sequence.running
    assert not _get_current_function_mode_stack()
    binding.remove()


def _fail(*_: Any, **__: Any) -> Tensor:
    raise ArithmeticError


def test_calls_of_different_lengths_follow_each_other() -> None:
    """As the branches of guidance do, with prompts of different lengths, one padded and one not."""
    case = CASES["Qwen-Image"]
    model = build(case)
    torch.manual_seed(2)
    first = case.inputs()
    second = {**first, "encoder_hidden_states": torch.randn(2, 4, 20).double(), "encoder_hidden_states_mask": None}
    with torch.no_grad():
        expected = [model(**inputs, return_dict=False)[0] for inputs in (first, second)]
    gang = Gang(1, 2, 1)
    locals_ = [copy.deepcopy(model) for _ in range(2)]

    def work(rank: int) -> list[Tensor]:
        sequence = gang.sequence(rank)
        sequence.apply(locals_[rank], case.regions)
        AttentionBinding(locals_[rank], sequence)
        return [locals_[rank](**inputs, return_dict=False)[0] for inputs in (first, second)]

    for found in run_threads(gang.meetings, work, 2):
        for part, whole in zip(found, expected, strict=True):
            assert (part - whole).abs().max() < LIMIT * whole.abs().max()


def test_causal_attention_with_a_cache() -> None:
    """The first step fills the cache of text and condition image, the second one runs the target image alone."""
    case = CASES["Qwen-Image 2.1"]
    model, inputs, _ = run_whole(case)
    gang = Gang(1, 2, 1)
    locals_ = [copy.deepcopy(model) for _ in range(2)]

    def two_steps(of: nn.Module) -> list[Tensor]:
        cache = QwenImage21KVCache(2)
        more: dict[str, Any] = {"kv_cache": cache, "return_dict": False}
        first = of(**inputs, **more, kv_cache_mode="extract")[0]
        return [first, of(**inputs | {"timestep": inputs["timestep"] / 2}, **more, kv_cache_mode="cached")[0]]

    def work(rank: int) -> list[Tensor]:
        sequence = gang.sequence(rank)
        sequence.apply(locals_[rank], case.regions)
        AttentionBinding(locals_[rank], sequence)
        return two_steps(locals_[rank])

    with torch.no_grad():
        expected = two_steps(model)
    assert expected[1].shape[1] == 24 < expected[0].shape[1]
    for found in run_threads(gang.meetings, work, 2):
        for part, whole in zip(found, expected, strict=True):
            assert (part - whole).abs().max() < LIMIT * whole.abs().max()


def test_heads_that_cannot_be_scattered_are_named() -> None:
    """Four heads to six ranks."""
    case = CASES["Qwen-Image 2.1"]
    sequence = Gang(1, 2, 3).sequence(0)
    with pytest.raises(ValueError, match=r"blocks\.0\.attn\.to_q: 4 heads cannot be scattered over 6 ranks"):
        sequence.apply(build(case), case.regions)


def test_a_model_without_attention_is_refused() -> None:
    model = diffusers.models.attention.FeedForward(8)
    with pytest.raises(ValueError, match="FeedForward has no attention"):
        AttentionBinding(model, Gang(1, 2, 1).sequence(0))
