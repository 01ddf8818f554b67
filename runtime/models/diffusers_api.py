"""What is used of diffusers: protocols of what is public in it, and functions for all that is not.

Names with a leading underscore may change with any release of it. In this hall they stand here, and nowhere else.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, MutableMapping, Sequence
from typing import Any, Protocol

import torch
from torch import Tensor, nn

Timestep = float | Tensor

_SCHEDULER_CONFIG = "_internal_dict"
"""Where a scheduler keeps its configuration, which no step changes."""


class Scheduler(Protocol):
    timesteps: Tensor
    set_timesteps: Callable[..., None]

    def step(self, output: Tensor, timestep: Timestep, *args: object, **kwargs: object) -> Sequence[Tensor]:
        """The latents `[batch, ...]` of the next step, and what else it returns."""


class Pipeline(Protocol):
    """Its components are attributes, by the names of its index."""

    scheduler: Scheduler
    config: Mapping[str, object]

    def __call__(self, **arguments: object) -> Sequence[object]: ...

    def set_progress_bar_config(self, **options: object) -> None: ...


class ModularPipeline(Pipeline, Protocol):
    pretrained_component_names: Sequence[str]

    def get_component_spec(self, name: str) -> Any: ...

    def register_components(self, **components: object) -> None: ...


def variant(own: type, **members: object) -> type:
    """A subclass that has other members, and the name: there are libraries that go by it, or compare the class."""

    def equal(cls: type, other: object) -> bool:
        return other is cls or other is own

    alike = type("Alike", (type(own),), {"__eq__": equal, "__hash__": lambda cls: hash(own)})
    made: type = alike(own.__name__, (own,), members)
    return made


def working_on(pipeline: type, device: torch.device) -> type:
    """`pipeline` that works on `device`, wherever the weights of its components rest."""
    return variant(pipeline, _execution_device=property(lambda _: device))


def guidance_scale(pipe: Pipeline) -> object:
    """Of the request that runs; None where the pipeline keeps none."""
    return getattr(pipe, "_guidance_scale", None)


def blocks_of(pipe: Any) -> MutableMapping[str, Any]:
    """The live blocks of a modular pipeline, by name, in their order."""
    found: MutableMapping[str, Any] = pipe._blocks.sub_blocks
    return found


def scheduler_state(scheduler: Scheduler) -> dict[str, object]:
    """All of its attributes but its configuration."""
    return {name: value for name, value in vars(scheduler).items() if name != _SCHEDULER_CONFIG}


def replace_scheduler_state(scheduler: Scheduler, state: Mapping[str, object]) -> None:
    for name in scheduler_state(scheduler):
        del vars(scheduler)[name]
    vars(scheduler).update(state)


def kept_in_fp32(model: nn.Module, strictly: bool = False) -> frozenset[str]:
    """Names of what the class of `model` wants in fp32 whatever the dtype; `strictly`: transformers' second list."""
    return frozenset(getattr(model, f"_keep_in_fp32_modules{'_strict' if strictly else ''}", None) or ())


def declared_linears(model: nn.Module) -> Mapping[str, object] | None:
    """Pattern -> style of tensor parallelism, as the class of `model` declares it; None: it does not."""
    found: Mapping[str, object] | None = getattr(model, "_tp_plan", None)
    return found


def declared_cuts(model: nn.Module) -> tuple[dict[str, Any], list[str]] | None:
    """Where the class of `model` declares that tokens are cut (path -> what), and put together; None: it does not."""
    from diffusers.models._modeling_parallel import ContextParallelOutput

    plan = getattr(model, "_cp_plan", None)
    if plan is None:
        return None
    ends = [path for path, what in plan.items() if isinstance(what, ContextParallelOutput)]
    return {path: what for path, what in plan.items() if path not in ends}, ends


def single_file_converter(class_name: str) -> Callable[..., Mapping[str, Tensor]] | None:
    """What gives the tensors of a single file of this transformer diffusers' names; takes `checkpoint` and `config`."""
    from diffusers.loaders.single_file_model import SINGLE_FILE_LOADABLE_CLASSES

    found: Callable[..., Mapping[str, Tensor]] | None
    found = SINGLE_FILE_LOADABLE_CLASSES.get(class_name, {}).get("checkpoint_mapping_fn")
    return found


LoraState = tuple[dict[str, Tensor], dict[str, float]]
"""A LoRA's tensors in PEFT's names, and the alphas that were found beside them."""


def lora_converter(pipeline: str) -> Callable[[Mapping[str, Tensor]], LoraState] | None:
    """What gives the tensors of a LoRA for this pipeline PEFT's names."""
    import diffusers
    from diffusers.utils import convert_unet_state_dict_to_peft

    read = getattr(getattr(diffusers, pipeline, None), "lora_state_dict", None)
    if read is None:
        return None
    apart = "return_alphas" in inspect.signature(read).parameters

    def convert(state: Mapping[str, Tensor]) -> LoraState:
        found = read(dict(state), return_alphas=True) if apart else (read(dict(state)), None)
        tensors: dict[str, Tensor] = found[0]
        if any(".lora.down" in name or "lora_linear_layer" in name for name in tensors):
            tensors = convert_unet_state_dict_to_peft(tensors)
        return tensors, found[1] or {}

    return convert


def register_attention(name: str, attention: Callable[..., Tensor]) -> object:
    """Make `attention` a backend of diffusers' dispatcher; what is returned can be given to `dispatch_to`.

    A parameter `_parallel_config` gets what `dispatch_to` was told.
    """
    from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry

    backend: Any = str.__new__(AttentionBackendName, name)  # the enum is closed, so its member is made by hand
    backend._name_, backend._value_ = name.upper(), name
    _AttentionBackendRegistry.register(backend)(attention)
    return backend


def dispatches(processor: object) -> bool:
    """Whether the attention of this processor goes through diffusers' dispatcher."""
    return hasattr(processor, "_attention_backend") and hasattr(processor, "_parallel_config")


def dispatch_to(processor: Any, backend: object, config: object) -> Callable[[], None]:
    """The attention of `processor` goes to `backend`, with `config`, until what is returned is called."""
    before = processor._attention_backend, processor._parallel_config
    processor._attention_backend, processor._parallel_config = backend, config

    def undo() -> None:
        processor._attention_backend, processor._parallel_config = before

    return undo
