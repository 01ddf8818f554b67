"""The tiny recipe of FLUX.3 [klein]."""

from __future__ import annotations

from dataclasses import replace
from functools import partial

from crossdock.runtime.models.tiny import flux3

TINY = replace(flux3.TINY, components=partial(flux3.components, flow_map=True))
