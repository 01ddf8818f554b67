"""The layouts that come with crossdock, as YAML files in `launch/configs`."""

from __future__ import annotations

from functools import cache
from pathlib import Path

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.config.yaml_file import load_config

CONFIGS = Path(__file__).resolve().parents[1] / "configs"


@cache
def builtin_configs() -> dict[str, RunConfig]:
    """Name -> config; fewest ranks first."""
    found = {path.stem: load_config(path) for path in sorted(CONFIGS.glob("*.yaml"))}
    return dict(sorted(found.items(), key=lambda item: (item[1].world_size, item[0].split("_")[-1], len(item[0]))))
