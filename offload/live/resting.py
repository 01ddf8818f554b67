"""A streamed block's tensors outside its turns: the user's own objects, whose bytes are those at rest.

Whoever touches one gets the right values: reading, `state_dict`, copying and saving see what rests, and what is
written goes there. What computes with one beside tensors of the streaming device gets a copy there. Giving one another
dtype, shape or memory is refused: the block would go on being streamed as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

_VIEWS = {"data", "T", "mT", "H", "mH", "real", "imag"}
"""Attributes that are tensors over the same memory; the others tell what a tensor is, not what it holds."""
_OWN = {"requires_grad_", "register_hook"}


class LiveModelError(RuntimeError):
    """What a model that is being streamed cannot be asked for; one line: the tensor or module, what, the way out."""


@dataclass(frozen=True)
class Place:
    """Where a tensor rests.

    Attributes:
        name: from the model.
        host: the very memory.
        device: where it computes in its turns.
        finish: waits until what the block wrote has come back.
    """

    name: str
    host: Tensor
    device: torch.device
    finish: Callable[[], None]


class _Resting:
    __slots__ = ()
    place: Place

    def __deepcopy__(self, memo: dict[int, object]) -> Tensor:
        copied = _plain(self).detach().clone()
        memo[id(self)] = copied = nn.Parameter(copied, self.requires_grad) if isinstance(self, nn.Parameter) else copied
        return copied

    def __reduce_ex__(self, protocol: object) -> Any:
        return _plain(self).__reduce_ex__(protocol)  # type: ignore[no-untyped-call]

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if (getset := getattr(func, "__self__", None)) is not None and func.__name__ in ("__get__", "__set__"):
            return _attribute(func, getset.__name__, *args)
        if getattr(func, "__name__", "") in _OWN:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        return _computed(func, args, kwargs or {})


class RestingParameter(_Resting, nn.Parameter):
    """A parameter at rest; a plain `nn.Parameter` is made one, and again a plain one, by changing its class."""


class RestingBuffer(_Resting, Tensor):
    """A buffer at rest."""


ATTACHED: WeakSet[nn.Module] = WeakSet()
"""All modules of the models that are being streamed."""
_CLASSES: dict[type, type] = {nn.Parameter: RestingParameter, Tensor: RestingBuffer}


def is_resting(tensor: object) -> bool:
    return isinstance(tensor, _Resting)


def lay_down(tensor: Tensor, place: Place) -> None:
    """Make a plain tensor one at rest. A DTensor stays what it is: its local part is what rests."""
    if (resting := _CLASSES.get(type(tensor))) is not None:
        tensor.__class__ = resting
        tensor.place = place  # type: ignore[attr-defined]


def take_up(tensor: Tensor) -> None:
    """Make it the plain tensor that it was."""
    if is_resting(tensor):
        tensor.__class__ = nn.Parameter if isinstance(tensor, nn.Parameter) else Tensor
        del tensor.place  # type: ignore[attr-defined]


def _plain(tensor: Any) -> Tensor:
    """What rests, as a plain tensor or parameter over the very memory."""
    tensor.place.finish()
    host: Tensor = tensor.place.host.detach()
    return nn.Parameter(host, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else host


def _attribute(func: Any, name: str, tensor: Any, *value: Any) -> Any:
    place: Place = tensor.place
    if name == "data" and value:
        return _exchange(place, value[0])
    if name in _VIEWS:
        place.finish()
        return place.host.detach() if name == "data" else getattr(place.host, name)
    if name == "device":
        return place.device
    with torch._C.DisableTorchFunctionSubclass():
        return func(tensor, *value)


def _exchange(place: Place, value: Tensor) -> None:
    """`tensor.data = value`."""
    host = place.host
    if (value.dtype, value.shape) != (host.dtype, host.shape):
        raise LiveModelError(
            f"{place.name} is streamed as {host.dtype} {[*host.shape]} and cannot become {value.dtype} "
            f"{[*value.shape]}: call the offloader's remove(), change the model, attach it again"
        )
    place.finish()
    if value.data_ptr() != host.data_ptr():
        host.copy_(value)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """With what rests in place of the tensors at rest, or with copies of it where the other tensors are.

    What the function changed of a copy is written to where it rests. A view that it makes of a copy is a copy.
    """
    leaves, spec = tree_flatten((args, kwargs))
    places = {id(leaf): leaf.place for leaf in leaves if is_resting(leaf)}
    others = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and not is_resting(leaf)}
    used: dict[int, Tensor] = {}
    for key, place in places.items():
        place.finish()
        used[key] = place.host.to(place.device) if place.device in others else place.host
    versions = {key: tensor._version for key, tensor in used.items()}
    plain_args, plain_kwargs = tree_unflatten([used.get(id(leaf), leaf) for leaf in leaves], spec)
    result = func(*plain_args, **plain_kwargs)
    for key, tensor in used.items():
        if tensor is not places[key].host and tensor._version != versions[key]:
            places[key].host.copy_(tensor)
    return next((leaf for leaf in leaves if id(leaf) in used and result is used[id(leaf)]), result)
