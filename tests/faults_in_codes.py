"""Faults in what is encoded, to be planted in a rank that has a model; see `test_lossless_faults`.

As in `faults_in_weights`, a plant takes effect in step `at`, and what it changes for good it undoes itself.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from faults_in_steps import BLOCK, Plant, _when, block_of, runs
from torch import Tensor

from crossdock.offload.codecs.lossless import Lossless
from crossdock.offload.codecs.part_format import PartFormat, part_formats
from crossdock.offload.stream import loader
from crossdock.runtime.rank.worker import RankWorker

Spoil = Callable[[Tensor, PartFormat, Any], None]
"""Changes an encoded part: its bytes, its format, the span of its largest tensor."""


def _in_store(spoil: Spoil) -> Plant:
    """What rests is changed when step `at - 1` has ended."""

    def plant(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
        def act(pipe: Any) -> None:
            block = block_of(worker)
            (form,) = part_formats(block.layout, 1, block.codec.plain)
            before = block.source.clone()
            worker.undo.append(lambda: block.source.copy_(before))
            spoil(block.source, form, max(form.coded, key=lambda span: span.values))

        if at > 1:
            _when(worker, patch, at - 1, act)
        else:
            act(None)

    return plant


def _flip(held: Tensor, at: int, bit: int = 1) -> None:
    held[at] ^= bit


low_byte = _in_store(lambda held, form, span: _flip(held, span.places[0] + span.values // 3))
sign = _in_store(lambda held, form, span: _flip(held, span.places[0], 0x80))
number = _in_store(lambda held, form, span: _flip(held, span.places[1] + span.values // 4, 0x10))
window = _in_store(lambda held, form, span: _flip(held, 4 + form.coded.index(span)))
not_coded = _in_store(lambda held, form, span: _flip(held, form.plain[0].places[0]))


def _missing(held: Tensor, form: PartFormat, span: Any) -> None:
    count = held[:4].view(torch.int32)
    assert count > 0, "this block has no escapes"
    count.sub_(1)


def _elsewhere(held: Tensor, form: PartFormat, span: Any) -> None:
    held[form.escapes_at :][:4].view(torch.int32).add_(1)


def _another(held: Tensor, form: PartFormat, span: Any) -> None:
    _flip(held, form.values_at)


missing_escape, escape_elsewhere, another_escape = map(_in_store, (_missing, _elsewhere, _another))


def _decoding(change: Callable[..., None]) -> Plant:
    """`change(decode, codec, layout, parts, index, travelled, raw)` in place of decoding, in step `at`."""

    def plant(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
        decode, layout = Lossless.decode, block_of(worker).layout

        def changed(codec: Lossless, of: Any, parts: int, index: int, travelled: Tensor, raw: Tensor) -> None:
            if runs(worker, at) and of is layout:
                change(decode, codec, of, parts, index, travelled, raw)
            else:
                decode(codec, of, parts, index, travelled, raw)

        patch.setattr(Lossless, "decode", changed)

    return plant


left_out = _decoding(lambda decode, *args: None)


@_decoding
def half_done(decode: Any, *args: Any) -> None:
    raw = args[-1]
    before = raw[len(raw) // 2 :].clone()
    decode(*args)
    raw[len(raw) // 2 :] = before


@_decoding
def too_early(decode: Any, *args: Any) -> None:
    """What travels is not all there: the second half is what was in the staging before."""
    *others, travelled, raw = args
    early = travelled.clone()
    early[len(early) // 2 :] = 0
    decode(*others, early, raw)


def stale_staging(worker: RankWorker, patch: pytest.MonkeyPatch, at: int) -> None:
    """The copy is left out: what is decoded is what the block before left there."""
    moves = loader._moves

    def none(block: Any, target: Tensor) -> list[tuple[Tensor, Tensor]]:
        return [] if block.name == BLOCK and runs(worker, at) else moves(block, target)

    patch.setattr(loader, "_moves", none)
