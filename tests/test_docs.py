"""What the pages under `docs/` show: every YAML is a layout of that size that can be planned, links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
import yaml

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.plan.make_plan import make_plan

CHOOSING = (Path(__file__).resolve().parents[1] / "docs" / "choosing.md").read_text(encoding="utf-8")
SECTIONS = [section.partition("\n")[::2] for section in CHOOSING.split("\n## ")[1:]]
SHOWN = [(title, text) for title, body in SECTIONS for text in re.findall(r"```yaml\n(.*?)```", body, re.S)]
RANKS = {"One": 1, "Two": 2, "Eight": 8}


@pytest.mark.parametrize(("title", "text"), SHOWN, ids=[title for title, _ in SHOWN])
def test_an_example_can_be_planned(title: str, text: str, flux2_dir: Path) -> None:
    config = RunConfig.parse(yaml.safe_load(text.replace("18GiB", "1GiB")))
    assert config.world_size == RANKS[title.partition(" ")[0]]
    assert make_plan(config, flux2_dir, "cpu").layout.mesh.world_size == config.world_size


def test_links_lead_somewhere() -> None:
    titles = {re.sub(r"[^\w\- ]", "", title.lower()).replace(" ", "-") for title, _ in SECTIONS}
    assert set(re.findall(r"\]\(#([^)]+)\)", CHOOSING)) <= titles
