"""How many pictures a replica computes at once: as many as fit beside the weights, by what requests took so far."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any

from crossdock.runtime.request import GenerateRequest


class BatchLimit:
    """
    Args:
        most: whatever the memory allows.
        measured: the device's memory is counted (CUDA): the first pictures of a server are computed one by one.
    """

    def __init__(self, most: int, measured: bool) -> None:
        self._most, self._measured = most, measured
        self._fit: dict[int, float] = {}  # pixels of a picture, all frames -> how many such pictures fit at once

    def of(self, request: GenerateRequest) -> int:
        """At least 1."""
        if not self._measured or self._most == 1:
            return self._most
        pixels = _pixels(request)
        if not self._fit:
            return 1
        nearest = min(self._fit, key=lambda known: max(known, pixels) / min(known, pixels))
        return max(1, min(self._most, int(self._fit[nearest] * nearest / pixels)))

    def learn(self, asked: GenerateRequest, ranks: Iterable[Mapping[str, Any]]) -> None:
        """`asked`: with `batch_size` pictures at once; `ranks`: the rows of its report."""
        fit = []
        for row in ranks:
            if (peak := row.get("peak_device_bytes")) is not None:
                used = max(peak - row["peak_weight_bytes"], 1)
                fit.append(asked.batch_size * (used + row["spare_device_bytes"]) / used)
        if fit:
            self._fit[_pixels(asked)] = min(fit)


def _pixels(request: GenerateRequest) -> int:
    return request.height * request.width * (request.frames or 1)
