"""A streamed block's tensors outside its turns: the user's own objects, whose bytes are those at rest.

Whoever touches one gets the right values: reading, `state_dict`, copying and saving see what rests, and what is
written goes there. What computes with one beside tensors of the streaming device gets a copy there. Giving one another
dtype, shape or memory is refused: the block would go on being streamed as it was.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakSet

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils._pytree import TreeSpec, tree_flatten, tree_map, tree_unflatten

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
        host: the very memory; None where the block rests encoded.
        decoded: makes a copy of it then.
        device: where it computes in its turns.
        finish: waits until what the block wrote has come back.
    """

    name: str
    host: Tensor | None
    decoded: Callable[[], Tensor]
    device: torch.device
    finish: Callable[[], None]

    def read(self) -> Tensor:
        self.finish()
        if self.host is not None:
            return self.host
        with torch.inference_mode(False):
            return self.decoded()

    def write(self, value: Tensor) -> None:
        if self.host is None:
            raise LiveModelError(
                f"{self.name} rests encoded and is not written to alone: change its block inside "
                "gathered(..., write_back=True), or attach without codec"
            )
        self.host.copy_(value)

    def shown(self, tensor: Tensor) -> Tensor:
        """A view of what `read` returned: where that was a copy, one that is not written to."""
        if self.host is not None:
            return tensor
        with torch._C.DisableTorchFunctionSubclass():
            shown = tensor.as_subclass(ReadOnly)
        shown.place = self
        return shown


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


class ReadOnly(Tensor):
    """Over a copy of what rests encoded: what was written to it would be lost, and is refused."""

    place: Place

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Sequence[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        leaves, spec = tree_flatten((args, kwargs or {}))
        places = {id(leaf): leaf.place for leaf in leaves if isinstance(leaf, ReadOnly)}
        with torch._C.DisableTorchFunctionSubclass():
            used = {id(leaf): leaf.as_subclass(Tensor) for leaf in leaves if id(leaf) in places}
        return _shown(_called(func, leaves, spec, used, places), used, places)


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
    host: Tensor = tensor.place.read().detach()
    return nn.Parameter(host, tensor.requires_grad) if isinstance(tensor, nn.Parameter) else host


def _attribute(func: Any, name: str, tensor: Any, *value: Any) -> Any:
    place: Place = tensor.place
    if name == "data" and value:
        return _exchange(place, value[0])
    if name in _VIEWS:
        rests = place.read()
        return place.shown(rests.detach() if name == "data" else getattr(rests, name))
    if name == "device":
        return place.device
    with torch._C.DisableTorchFunctionSubclass():
        return func(tensor, *value)


def _exchange(place: Place, value: Tensor) -> None:
    """`tensor.data = value`."""
    rests = place.read()
    if (value.dtype, value.shape) != (rests.dtype, rests.shape):
        raise LiveModelError(
            f"{place.name} is streamed as {rests.dtype} {[*rests.shape]} and cannot become {value.dtype} "
            f"{[*value.shape]}: call the offloader's remove(), change the model, attach it again"
        )
    if value.data_ptr() != rests.data_ptr():
        place.write(value)


def _computed(func: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """With what rests in place of the tensors at rest, or with copies of it where the other tensors are.

    What the function changed of a copy is written to where it rests. A view that it makes of a copy is a copy; of what
    was decoded, one that is not written to.
    """
    leaves, spec = tree_flatten((args, kwargs))
    places = {id(leaf): leaf.place for leaf in leaves if is_resting(leaf)}
    others = {leaf.device for leaf in leaves if isinstance(leaf, Tensor) and not is_resting(leaf)}
    with torch.inference_mode(False):  # whose tensors do not tell when they are written to
        used = {
            key: place.read().to(place.device) if place.device in others else place.read()
            for key, place in places.items()
        }
    result = _called(func, leaves, spec, used, places)
    own = next((leaf for leaf in leaves if id(leaf) in used and result is used[id(leaf)]), None)
    return _shown(result, {key: used[key] for key in used if places[key].host is None}, places) if own is None else own


def _called(
    func: Any, leaves: Sequence[Any], spec: TreeSpec, used: Mapping[int, Tensor], places: Mapping[int, Place]
) -> Any:
    """With `used` in place of the leaves that have these `id`s; what was changed of a copy goes to where it rests."""
    versions = {key: tensor._version for key, tensor in used.items()}
    args, kwargs = tree_unflatten([used.get(id(leaf), leaf) for leaf in leaves], spec)
    result = func(*args, **kwargs)
    for key, tensor in used.items():
        if tensor is not places[key].host and tensor._version != versions[key]:
            places[key].write(tensor)
    return result


def _shown(result: Any, decoded: Mapping[int, Tensor], places: Mapping[int, Place]) -> Any:
    """What is over the memory of a decoded copy is not written to: it would be lost."""
    if not decoded:
        return result
    owners = {tensor.untyped_storage().data_ptr(): places[key] for key, tensor in decoded.items()}

    def show(found: Any) -> Any:
        if isinstance(found, np.ndarray):
            found.flags.writeable = False
        elif type(found) is Tensor and not found.is_meta:
            place = owners.get(found.untyped_storage().data_ptr())
            return found if place is None else place.shown(found)
        return found

    return tree_map(show, result)
