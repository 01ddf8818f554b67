"""The hooks of a block stream on its blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from crossdock.offload.stream.block import StreamedBlock

Act = Callable[[int], None]
"""Gets the index of the block that is about to run, or has run."""
_CALL = nn.Module._wrapped_call_impl.__code__  # also where the module or its caller is compiled


class BlockHooks:
    """`suspended`: they do nothing meanwhile."""

    def __init__(self) -> None:
        self.suspended = False
        self.attached = False
        self._handles: list[RemovableHandle] = []

    def attach(self, index: int, block: StreamedBlock, before: Act, after: Act) -> None:
        """Around every call of the block, if it is called at all."""
        self.attached = True
        if block.is_called:
            self._handles += [
                block.module.register_forward_pre_hook(self._hook(before, index, block.module), prepend=True),
                block.module.register_forward_hook(self._hook(after, index, block.module), always_call=True),
            ]

    def remove(self) -> None:
        """Take the hooks off."""
        self.attached = False
        for handle in self._handles:
            handle.remove()
        self._handles.clear()

    def _hook(self, act: Act, index: int, own: nn.Module) -> Callable[..., None]:
        """A hook that a compiled caller calls but does not trace. On a copy of the block it does nothing."""

        def hook(module: nn.Module, *_: object) -> None:
            if module is own and not self.suspended:
                act(index)

        disabled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        disabled.__qualname__ = "(of a streamed block: pickle its state_dict(), or call remove() first)"  # in the error
        return disabled


def is_running(module: nn.Module) -> bool:
    """Whether a call of it is on this thread's stack. An interrupt ends one without hooks; a frame that were kept to
    see that would keep activations alive.
    """
    frame: FrameType | None = sys._getframe()
    while frame is not None and not (frame.f_code is _CALL and frame.f_locals["self"] is module):
        frame = frame.f_back
    return frame is not None
