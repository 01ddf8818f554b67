"""Weights that a text encoder's config ties, and of which its files may have two."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import nn

from crossdock.runtime.models.checkpoint import StoredTensor, open_weights

_ROWS = 4096
"""Compared at once."""


def untie(module: nn.Module, stored: Mapping[str, StoredTensor]) -> None:
    """Where the files have both of a pair that the config ties, and they differ, `module` (on meta) has two: what
    transformers makes of them when it loads.
    """
    tied: Mapping[str, str] = getattr(module, "all_tied_weights_keys", {})
    for target, source in tied.items():
        one, other = _stored_as(target, stored), _stored_as(source, stored)
        if one is not None and other is not None and not _equal(one, other):
            path, _, leaf = target.rpartition(".")
            parent = module.get_submodule(path)
            setattr(parent, leaf, nn.Parameter(torch.empty_like(getattr(parent, leaf))))


def _stored_as(fqn: str, stored: Mapping[str, StoredTensor]) -> StoredTensor | None:
    """In files of older models, what comes before the module's own name may be another."""
    ends = [name for name in stored if name.split(".")[-2:] == fqn.split(".")[-2:]]
    return stored.get(fqn) or (stored[ends[0]] if len(ends) == 1 else None)


def _equal(one: StoredTensor, other: StoredTensor) -> bool:
    if one.shape != other.shape:
        return False
    left, right = (open_weights(each.file).get_slice(each.name) for each in (one, other))
    return all(torch.equal(left[n : n + _ROWS], right[n : n + _ROWS]) for n in range(0, one.shape[0], _ROWS))
