"""What a module is called with, changed on the way in."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from types import FunctionType
from typing import Any

from torch import Tensor, nn
from torch._C._dynamo.eval_frame import _FrameAction, _FrameExecStrategy, set_code_exec_strategy
from torch.utils.hooks import RemovableHandle


class Arguments:
    """What a module is called with, by name, however it was passed."""

    def __init__(self, places: Mapping[str, int], args: tuple[object, ...], kwargs: Mapping[str, object]) -> None:
        self._places = places
        self.names = tuple(places)
        self.args, self.kwargs = list(args), dict(kwargs)

    def get(self, name: str) -> Any:
        """None where it was not passed."""
        place = self._places[name]
        return self.args[place] if place < len(self.args) else self.kwargs.get(name)

    def change(self, name: str, act: Callable[[Any], Any]) -> None:
        """What was passed becomes what `act` makes of it; what was not passed stays the default."""
        place = self._places[name]
        if place < len(self.args):
            self.args[place] = act(self.args[place])
        elif name in self.kwargs:
            self.kwargs[name] = act(self.kwargs[name])


def hook_arguments(
    module: nn.Module, names: tuple[str, ...], act: Callable[[Arguments], None], optional: tuple[str, ...] = ()
) -> RemovableHandle:
    """Have `act` look at, and change, the arguments `names` whenever `module` is called.

    Args:
        optional: more arguments, where the module has them.

    Raises:
        ValueError: the module's forward does not have them all.
    """
    parameters = list(inspect.signature(module.forward).parameters)
    if missing := [name for name in names if name not in parameters]:
        raise ValueError(f"{type(module).__name__}.forward has no argument {missing[0]!r}")
    places = {name: parameters.index(name) for name in (*names, *optional) if name in parameters}

    def hook(_module: nn.Module, args: tuple[object, ...], kwargs: dict[str, object]) -> Any:
        arguments = Arguments(places, args, kwargs)
        act(arguments)
        return tuple(arguments.args), arguments.kwargs

    return module.register_forward_pre_hook(beside(hook), with_kwargs=True)


def beside(hook: Callable[..., Any]) -> Callable[..., Any]:
    """`hook`, which runs as it is where its own module is compiled; where a module around that is, it is traced.

    Left to itself, torch makes graphs of such a hook, one for each block and size, until there are too many.
    """
    assert isinstance(hook, FunctionType)
    set_code_exec_strategy(hook.__code__, _FrameExecStrategy(_FrameAction.SKIP, _FrameAction.SKIP))
    return hook


def map_tensors(act: Callable[[Tensor], Tensor], value: object) -> Any:
    """`act` on a tensor, or on every tensor of a tuple; whatever else it is stays."""
    if isinstance(value, Tensor):
        return act(value)
    if isinstance(value, tuple | list):
        return type(value)(map_tensors(act, element) for element in value)
    return value
