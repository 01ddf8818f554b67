"""A spec that is read off a live model: the right stacks in the order in which they run, and a plan that computes the
same, for every transformer class of the pinned diffusers; what cannot be told is said.

No class is left out: `tiny_transformers.TINY` makes inputs for all of them.
"""

from __future__ import annotations

import copy
import inspect
import threading
import warnings
from dataclasses import dataclass
from typing import Any, cast

import diffusers
import pytest
import torch
from diffusers.models import transformers as diffusers_transformers
from torch import Tensor, nn

from crossdock.offload.live.discovery import discover_blocks
from crossdock.offload.live.offloader import LayerwiseOffloader
from crossdock.parallel.group import Group
from crossdock.parallel.tensor import COLUMN, ROW, LinearStyle, TensorParallelism, TensorPlan
from crossdock.runtime.models.families import SPECS
from crossdock.runtime.models.inferred.spec import infer_spec
from tiers import every
from tiny_transformers import TINY, build, make_inputs, tensors_of

CPU = torch.device("cpu")

STACKS: dict[str, dict[str, int]] = {
    "AceStepTransformer1DModel": {"layers": 24},
    "AllegroTransformer3DModel": {"transformer_blocks": 32},
    "AnyFlowFARTransformer3DModel": {"blocks": 40},
    "AnyFlowTransformer3DModel": {"blocks": 40},
    "AuraFlowTransformer2DModel": {"joint_transformer_blocks": 4, "single_transformer_blocks": 32},
    "BriaFibo2Transformer2DModel": {"noise_refiner": 2, "perceiver.layers": 2, "layers": 44},
    "BriaFiboTransformer2DModel": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "BriaTransformer2DModel": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "ChromaTransformer2DModel": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "ChronoEditTransformer3DModel": {"blocks": 40},
    "CogVideoXTransformer3DModel": {"transformer_blocks": 30},
    "CogView3PlusTransformer2DModel": {"transformer_blocks": 30},
    "CogView4Transformer2DModel": {"transformer_blocks": 30},
    "ConsisIDTransformer3DModel": {"transformer_blocks": 30},
    "CosmosTransformer3DModel": {"transformer_blocks": 28},
    "DiTTransformer2DModel": {"transformer_blocks": 28},
    "ErnieImageTransformer2DModel": {"layers": 24},
    "Flux2Transformer2DModel": {"transformer_blocks": 8, "single_transformer_blocks": 48},
    "Flux3Transformer2DModel": {
        "txt_mode_blocks": 5,
        "mode_blocks.image": 5,
        "mode_blocks.image_cond": 5,
        "single_transformer_blocks": 28,
    },
    "FluxTransformer2DModel": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "GlmImageTransformer2DModel": {"transformer_blocks": 30},
    "HeliosTransformer3DModel": {"blocks": 40},
    "HunyuanImageTransformer2DModel": {"transformer_blocks": 20, "single_transformer_blocks": 40},
    "HunyuanVideo15Transformer3DModel": {"transformer_blocks": 54},
    "HunyuanVideoFramepackTransformer3DModel": {"transformer_blocks": 20, "single_transformer_blocks": 40},
    "HunyuanVideoTransformer3DModel": {"transformer_blocks": 20, "single_transformer_blocks": 40},
    "Ideogram4Transformer2DModel": {"layers": 34},
    "JoyImageEditPlusTransformer3DModel": {"double_blocks": 20},
    "JoyImageEditTransformer3DModel": {"double_blocks": 20},
    "Kandinsky5Transformer3DModel": {"text_transformer_blocks": 2, "visual_transformer_blocks": 32},
    "Kandinsky6SRTransformer3DModel": {"visual_transformer_blocks": 32},
    "Kandinsky6Transformer3DModel": {
        "video_text_transformer_blocks": 4,
        "audio_text_transformer_blocks": 4,
        "visual_transformer_blocks": 60,
    },
    "Krea2Transformer2DModel": {
        "text_fusion.layerwise_blocks": 2,
        "text_fusion.refiner_blocks": 2,
        "transformer_blocks": 28,
    },
    "LTX2VideoTransformer3DModel": {"transformer_blocks": 48},
    "LTXVideoTransformer3DModel": {"transformer_blocks": 28},
    "LongCatImageTransformer2DModel": {"transformer_blocks": 19, "single_transformer_blocks": 38},
    "Lumina2Transformer2DModel": {"context_refiner": 2, "noise_refiner": 2, "layers": 26},
    "MiniMaxH3Transformer3DModel": {"token_refiner.refiner_blocks": 2, "transformer_blocks": 50},
    "MiniMaxMusic3Transformer1DModel": {"transformer_blocks": 36},
    "MochiTransformer3DModel": {"transformer_blocks": 48},
    "MotifVideoTransformer3DModel": {"transformer_blocks": 20, "single_transformer_blocks": 40},
    "NucleusMoEImageTransformer2DModel": {"transformer_blocks": 24},
    "OvisImageTransformer2DModel": {"transformer_blocks": 6, "single_transformer_blocks": 27},
    "PRXTransformer2DModel": {"blocks": 16},
    "PixArtTransformer2DModel": {"transformer_blocks": 28},
    "QwenImage21Transformer2DModel": {"transformer_blocks": 32},
    "QwenImageTransformer2DModel": {"transformer_blocks": 60},
    "SD3Transformer2DModel": {"transformer_blocks": 18},
    "SanaTransformer2DModel": {"transformer_blocks": 20},
    "SanaVideoTransformer3DModel": {"transformer_blocks": 20},
    "SanaWMLTX2RefinerTransformer3DModel": {"transformer_blocks": 48},
    "SanaWMTransformer3DModel": {"blocks": 20},
    "SkyReelsV2Transformer3DModel": {"blocks": 32},
    "WanAnimate2Transformer3DModel": {"blocks": 40},
    "WanAnimateTransformer3DModel": {"motion_encoder.res_blocks": 7, "blocks": 40, "face_adapter": 8},
    "WanTransformer3DModel": {"blocks": 40},
    "WanVACETransformer3DModel": {"vace_blocks": 8, "blocks": 40},
    "ZImageTransformer2DModel": {"noise_refiner": 2, "context_refiner": 2, "layers": 30},
}
"""Class -> its stacks in the order in which they first run, with their blocks, in the default configuration."""

NO_DEFAULT = {
    "DreamLiteTransformer2DModel",
    "EasyAnimateTransformer3DModel",
    "HiDreamImageTransformer2DModel",
    "LatteTransformer3DModel",
    "OmniGenTransformer2DModel",
    "Transformer2DModel",
    "TransformerTemporalModel",
}
"""Classes that cannot be built without arguments."""

INTERLEAVED = {"LatteTransformer3DModel", "WanAnimateTransformer3DModel"}
"""One stack runs within the loop over another."""

REGISTERED_LATER = {"Flux3Transformer2DModel", "Lumina2Transformer2DModel", "WanVACETransformer3DModel"}
"""A stack that runs first is registered after one that does not."""

NOT_CUT = {"PRXTransformer2DModel", "SanaVideoTransformer3DModel", "SanaWMTransformer3DModel"}
"""Classes of whose blocks nothing can be cut."""

WRONG_PLAN = {"MochiTransformer3DModel": "its rotary table has a dim for the heads and is made outside the blocks"}
"""Classes whose inferred tensor plan fails, loudly."""


def test_the_tables_name_every_transformer_of_diffusers() -> None:
    exported = {
        name
        for name, value in vars(diffusers_transformers).items()
        if inspect.isclass(value) and "Transformer" in name and name.endswith("Model")
    }
    inner = {"DualTransformer2DModel"}  # two others, in a U-Net
    assert exported - inner == STACKS.keys() | NO_DEFAULT == TINY.keys()


@pytest.mark.parametrize("name", every(STACKS, 3))
def test_the_stacks_of_every_default_configuration(name: str) -> None:
    with torch.device("meta"), warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        model = getattr(diffusers, name)()
    spec = infer_spec(model)
    assert {stack: len(model.get_submodule(stack)) for stack in spec.block_stacks} == STACKS[name]
    as_run = list(spec.block_stacks) == list(STACKS[name])
    assert as_run == (name not in REGISTERED_LATER)


@dataclass
class Case:
    name: str
    model: nn.Module
    expected: list[Tensor]

    def run(self) -> list[Tensor]:
        with torch.no_grad():
            return tensors_of(self.model(**make_inputs(self.name, self.model)))


@pytest.fixture(scope="module", params=every(TINY, 3))
def case(request: pytest.FixtureRequest) -> Case:
    case = Case(request.param, build(request.param), [])
    case.expected = case.run()
    assert case.expected
    assert all(output.isfinite().all() and output.any() for output in case.expected)
    return case


def test_a_tiny_model_is_streamed_bit_identically_in_the_order_that_is_recorded(case: Case) -> None:
    spec = infer_spec(case.model)
    from_run = infer_spec(case.model, make_inputs(case.name, case.model))
    with LayerwiseOffloader(case.model, CPU) as offloader:
        stream = offloader.stream
        for _ in range(3):
            misses = stream.counters.misses
            assert all(map(torch.equal, case.run(), case.expected))
        assert case.name in INTERLEAVED or stream.counters.misses == misses, "the order that was recorded is not used"
        recorded = stream.recorded_order
        assert recorded is not None, "every block ran"
        ran = [stream.blocks[index].name for index in recorded]
    assert list(from_run.run_order) == ran
    listed = [block.name for block in discover_blocks(case.model, spec.block_stacks)]
    assert sorted(listed) == sorted(ran)
    assert (listed == ran) == (case.name not in INTERLEAVED | REGISTERED_LATER)
    open_order = any(sentence.startswith("Order") for sentence in spec.missing)
    assert open_order == (len(spec.block_stacks) > 1), "only a run tells"
    as_run = tuple(STACKS[case.name]) if case.name in REGISTERED_LATER else spec.block_stacks
    assert from_run.block_stacks == as_run
    assert [block.name for block in discover_blocks(case.model, from_run.run_order)] == ran
    assert not any(sentence.startswith("Order") for sentence in from_run.missing)


def test_every_streamed_block_matters(case: Case) -> None:
    """Or a test of bits would not see a block that is not there."""
    for block in (discover_blocks(case.model)[0], discover_blocks(case.model)[-1]):
        kept = [parameter.clone() for parameter in block.module.parameters()]
        for parameter in block.module.parameters():
            parameter.mul_(1.5).add_(0.1)
        changed = case.run()
        for parameter, value in zip(block.module.parameters(), kept, strict=True):
            parameter.copy_(value)
        assert not all(map(torch.equal, changed, case.expected)), block.name


def test_the_tensor_plan_that_is_inferred_computes_the_same_on_two_ranks(case: Case) -> None:
    spec = infer_spec(case.model)
    assert bool(spec.tensor_plan.linears) == (case.name not in NOT_CUT)
    if case.name in WRONG_PLAN:
        with pytest.raises(RuntimeError, match="Sizes of tensors must match"):
            _on_ranks(case, spec.tensor_plan)
    elif case.name not in NOT_CUT:
        for outputs in _on_ranks(case, spec.tensor_plan):
            for output, expected in zip(outputs, case.expected, strict=True):
                torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))
    else:
        assert any("no attention and no MLP of the blocks can be cut" in sentence for sentence in spec.missing)


class _SumOfThreads:
    """An all-reduce between the ranks of one process."""

    def __init__(self, ranks: int) -> None:
        self.barrier = threading.Barrier(ranks, timeout=60)
        self.parts: dict[int, Tensor] = {}

    def member(self, rank: int) -> Group:
        return cast(Group, _Member(self, rank))


@dataclass
class _Member:
    group: _SumOfThreads
    rank: int

    def all_reduce(self, tensor: Tensor) -> None:
        self.group.parts[self.rank] = tensor.clone()
        self.group.barrier.wait()
        tensor.copy_(sum(part for _, part in sorted(self.group.parts.items())))
        self.group.barrier.wait()


def _on_ranks(case: Case, plan: TensorPlan, degree: int = 2) -> list[list[Tensor]]:
    """What each rank returns; the error of the first one that raises."""
    group = _SumOfThreads(degree)
    models = [_cut(case.model, plan, rank, degree, group.member(rank)) for rank in range(degree)]
    inputs = [make_inputs(case.name, case.model) for _ in models]
    outputs: dict[int, list[Tensor]] = {}
    errors: list[Exception] = []

    def work(rank: int) -> None:
        try:
            with torch.no_grad():
                outputs[rank] = tensors_of(models[rank](**inputs[rank]))
        except Exception as error:
            errors.append(error)
            group.barrier.abort()

    threads = [threading.Thread(target=work, args=(rank,), daemon=True) for rank in range(degree)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=120)
    if errors:
        raise errors[0]
    return [outputs[rank] for rank in range(degree)]


def _cut(model: nn.Module, plan: TensorPlan, rank: int, degree: int, group: Group) -> nn.Module:
    full, local = dict(model.named_parameters()), copy.deepcopy(model)
    slices = TensorParallelism.apply(local, plan, rank, degree, group).slices
    for fqn, parameter in list(local.named_parameters()):
        if parameter.is_meta:
            value = full[fqn]
            if fqn in slices:
                cuts = [value.narrow(slices[fqn].dim, start, stop - start) for start, stop in slices[fqn].ranges]
                value = torch.cat(cuts, slices[fqn].dim)
            path, _, leaf = fqn.rpartition(".")
            setattr(local.get_submodule(path), leaf, nn.Parameter(value.clone(), requires_grad=False))
    return local


# Against what was written by hand


def test_flux2_is_what_its_spec_says() -> None:
    model = build("Flux2Transformer2DModel")
    spec = infer_spec(model, make_inputs("Flux2Transformer2DModel", model))
    assert spec.block_stacks == SPECS["flux2-klein"].block_stacks
    assert spec.tensor_plan == SPECS["flux2-klein"].tensor_plan
    assert spec.regions == SPECS["flux2-klein"].regions
    assert [sentence.partition(":")[0] for sentence in spec.missing] == ["Pipeline"]


def test_z_image_is_what_its_spec_says_but_for_the_regions() -> None:
    spec = infer_spec(build("ZImageTransformer2DModel"))
    assert spec.block_stacks == SPECS["z-image"].block_stacks
    assert spec.tensor_plan == SPECS["z-image"].tensor_plan
    assert spec.regions == ()
    assert any("has no _cp_plan" in sentence for sentence in spec.missing)


# What cannot be told


class Block(nn.Module):
    def __init__(self, width: int = 8) -> None:
        super().__init__()
        self.linear = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(x)


class Fused(nn.Module):
    """Its q, k and v are one projection, and its gate sits between attention and output."""

    def __init__(self) -> None:
        super().__init__()
        self.heads = 2
        self.to_qkv = nn.Linear(8, 24)
        self.to_q = nn.Linear(8, 8)
        self.to_out = nn.Linear(8, 8)


class AttentionBlock(nn.Module):
    def __init__(self, attention: nn.Module) -> None:
        super().__init__()
        self.attn = attention

    def forward(self, x: Tensor) -> Tensor:
        return self.attn(x)


class Attention(nn.Module):
    def __init__(self, **changes: Any) -> None:
        super().__init__()
        self.heads = 2
        self.to_q, self.to_k, self.to_v, self.to_out = (nn.Linear(8, 8) for _ in range(4))
        for name, value in changes.items():
            setattr(self, name, value)

    def forward(self, x: Tensor) -> Tensor:
        return x


def _model(*blocks: nn.Module) -> nn.Module:
    model = nn.Module()
    model.blocks = nn.ModuleList(blocks)
    return model


def _said(model: nn.Module, what: str, inputs: dict[str, Any] | None = None) -> list[str]:
    return [line for line in infer_spec(model, inputs).missing if line.startswith(f"{what}: ")]


def test_a_model_without_lists_has_no_stacks_and_says_so() -> None:
    spec = infer_spec(nn.Sequential(Block(), Block()))
    assert spec.block_stacks == spec.regions == spec.run_order == ()
    assert spec.tensor_plan.linears == {}
    assert "declares no block stack, and no module list looks like one" in spec.missing[0]
    assert len(spec.missing) == 4


def test_a_declaration_is_the_users_word() -> None:
    class Declares(nn.Module):
        _layerwise_offload_blocks_attrs = ("second", "first")

        def __init__(self) -> None:
            super().__init__()
            self.first, self.second = (nn.ModuleList(Block() for _ in range(2)) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in (*self.first, *self.second):
                x = block(x)
            return x

    assert infer_spec(Declares()).block_stacks == ("second", "first")
    assert infer_spec(Declares(), {"x": torch.ones(1, 8)}).block_stacks == ("first", "second")


@pytest.mark.parametrize(
    ("attention", "why"),
    [
        (Fused(), "to_qkv is a layer of unknown meaning"),
        (Attention(to_out=None), "its output projection lies elsewhere"),
        (Attention(heads=None), "it does not keep its number of heads as `heads`"),
        (Attention(num_kv_heads=1), "it keeps a number of heads as `num_kv_heads`, too"),
        (Attention(to_k=nn.Linear(8, 4)), "its projections are of different sizes"),
        (Attention(heads=3), "its projections are of different sizes"),
        (Attention(norm_q=nn.RMSNorm(8)), "norm_q normalises 8 features, which is not one head of 4"),
        (Attention(norm_q=nn.LayerNorm(8, elementwise_affine=False)), "norm_q normalises 8 features"),
        (Attention(mix=nn.Conv1d(8, 8, 1)), "mix, a Conv1d, may need all heads at once"),
        (Attention(scale=nn.Parameter(torch.ones(8))), "it has parameters of its own"),
    ],
)
def test_an_attention_that_cannot_be_cut_stays_whole_and_says_why(attention: nn.Module, why: str) -> None:
    model = _model(AttentionBlock(attention), AttentionBlock(attention))
    assert infer_spec(model).tensor_plan.linears == {}
    assert any(
        line.startswith("Tensor parallelism: blocks.*.attn stays whole on every rank: ") and why in line
        for line in _said(model, "Tensor parallelism")
    )


def test_an_attention_that_reads_the_size_of_all_heads_stays_whole() -> None:
    class Reads(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return x if self.ignored_dim is None else x.view(-1, self.inner_dim)

    said = _said(_model(*(AttentionBlock(Reads(inner_dim=8, ignored_dim=8)) for _ in range(2))), "Tensor parallelism")
    assert any("its source reads `inner_dim`, the size of all heads" in line for line in said)


def test_what_one_block_of_a_stack_cannot_do_none_does() -> None:
    blocks = [AttentionBlock(Attention()), AttentionBlock(Attention(norm_q=nn.RMSNorm(8)))]
    assert infer_spec(_model(*blocks)).tensor_plan.linears == {}
    assert infer_spec(_model(blocks[0], AttentionBlock(Attention()))).tensor_plan.heads == {"blocks.*.attn": ("heads",)}


class Mlp(nn.Module):
    def __init__(self, up: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(8, up), nn.Linear(16, 8)

    def forward(self, x: Tensor) -> Tensor:
        return self.down(self.between(self.up(x)))

    def between(self, x: Tensor) -> Tensor:
        return x.relu()


class Gated(Mlp):
    def between(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, -1)
        return gate.relu() * up


class GatedInTurns(Mlp):
    """Gate and up alternate, as in some checkpoints."""

    def between(self, x: Tensor) -> Tensor:
        return x[..., ::2].relu() * x[..., 1::2]


class Softmaxed(Mlp):
    def between(self, x: Tensor) -> Tensor:
        return x.softmax(-1)


class NeedsMore(Mlp):
    def forward(self, x: Tensor, gate: Tensor) -> Tensor:  # type: ignore[override]
        return x * gate


@pytest.mark.parametrize(("mlp", "up"), [(Mlp(16), COLUMN), (Gated(32), LinearStyle("column", (1, 1)))])
def test_an_mlp_is_cut_by_what_it_does(mlp: nn.Module, up: LinearStyle) -> None:
    plan = infer_spec(_model(AttentionBlock(mlp), AttentionBlock(mlp))).tensor_plan
    assert plan.linears == {"blocks.*.attn.up": up, "blocks.*.attn.down": ROW}


@pytest.mark.parametrize(
    ("mlp", "why"),
    [
        (GatedInTurns(32), "its halves do not add up to the whole"),
        (Softmaxed(16), "its halves do not add up to the whole"),
        (NeedsMore(16), "it does not run alone (TypeError)"),
    ],
)
def test_an_mlp_whose_halves_do_not_add_up_stays_whole(mlp: nn.Module, why: str) -> None:
    model = _model(AttentionBlock(mlp), AttentionBlock(mlp))
    assert infer_spec(model).tensor_plan.linears == {}
    assert any(why in line for line in _said(model, "Tensor parallelism"))


def test_linears_that_are_not_recognised_are_named() -> None:
    said = _said(_model(Block(), Block()), "Tensor parallelism")
    assert any(line.startswith("Tensor parallelism: linear of blocks.* stays whole") for line in said)


def test_entries_of_a_declared_plan_that_do_not_fit_are_left_out() -> None:
    model = _model(Block(), Block())
    model._tp_plan = {"blocks.*.linear": "colwise", "blocks.*.gone": "rowwise", "blocks.*": "rowwise", "x": "sliced"}
    spec = infer_spec(model)
    assert spec.tensor_plan.linears == {"blocks.*.linear": COLUMN}
    said = "\n".join(_said(model, "Tensor parallelism"))
    assert "blocks.*.gone of _tp_plan is left out: no module of Module matches" in said
    assert "blocks.* of _tp_plan is left out: it is no linear layer" in said
    assert "x of _tp_plan is left out: the style 'sliced' is not known" in said
    assert "which key of the model's config is its number of heads is not to be seen" in said


def test_a_plan_that_does_not_run_on_the_shapes_of_the_inputs_is_dropped() -> None:
    class Rigid(Attention):
        def forward(self, x: Tensor) -> Tensor:
            return self.to_out(self.to_v(x).view(-1, 8))

    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(AttentionBlock(Rigid()) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            for block in self.blocks:
                x = block(x)
            return x

    assert infer_spec(Model()).tensor_plan.linears
    spec = infer_spec(Model(), {"x": torch.ones(1, 8)})
    assert spec.tensor_plan.linears == {}
    assert any("cut as its layers suggest, Model does not run: RuntimeError: shape" in line for line in spec.missing)
    meta = Model().to("meta")
    assert infer_spec(meta, {"x": torch.ones(1, 8, device="meta")}).missing == spec.missing


def test_a_plan_that_cannot_be_tried_says_so() -> None:
    model = build("MochiTransformer3DModel")
    said = _said(model, "Tensor parallelism", make_inputs("MochiTransformer3DModel", model))
    assert any("the plan was not tried: the model does not run on the meta device" in line for line in said)


def test_a_small_list_and_blocks_that_did_not_run_are_named() -> None:
    class Model(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.blocks = nn.ModuleList(Block(32) for _ in range(3))
            self.small = nn.ModuleList(Block(2) for _ in range(2))

        def forward(self, x: Tensor) -> Tensor:
            return self.blocks[2](self.blocks[0](x))

    spec = infer_spec(Model(), {"x": torch.ones(1, 32)})
    assert spec.run_order == ("blocks.0", "blocks.2")
    assert "Order: on these inputs blocks.1 did not run." in spec.missing
    assert "Block stacks: small (2 x Block) is taken for no stack and stays on the device." in spec.missing


@pytest.mark.parametrize(
    ("name", "why"),
    [
        ("WanTransformer3DModel", "it cuts what rope returns"),
        ("HeliosTransformer3DModel", "it cuts tokens in 3 places"),
        ("FluxTransformer2DModel", "seen in a run only; give inputs"),
    ],
)
def test_a_cp_plan_that_is_no_region_says_why(name: str, why: str) -> None:
    (said,) = _said(build(name), "Sequence parallelism")
    assert said.startswith(f"Sequence parallelism: {name}._cp_plan is no region: ")
    assert why in said


def test_segments_of_equal_length_cannot_be_told_apart() -> None:
    model = build("FluxTransformer2DModel")
    inputs = make_inputs("FluxTransformer2DModel", model)
    inputs["encoder_hidden_states"] = torch.randn(1, inputs["hidden_states"].shape[1], 32)
    inputs["txt_ids"] = torch.zeros_like(inputs["img_ids"])
    (said,) = _said(model, "Sequence parallelism", inputs)
    assert "are of equal length in the inputs" in said
