"""The hooks of a block stream on its blocks."""

from __future__ import annotations

import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from crossdock.offload.stream.block import StreamedBlock

Act = Callable[[int, FrameType | None], None]
"""Gets the block's index and the call of its module that is about to run, or has run."""


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

        def hook(module: nn.Module, *_: Any) -> None:
            if module is own and not self.suspended:
                act(index, sys._getframe(2))  # beyond the wrapper: the module's own call

        disabled: Callable[..., None] = torch.compiler.disable(hook)  # type: ignore[no-untyped-call]
        disabled.__qualname__ = "(of a streamed block: pickle its state_dict(), or call remove() first)"  # in the error
        return disabled
