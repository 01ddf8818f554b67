"""What the `models` command prints: the families, their checkpoints, and the layouts that tests hold them in."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict, dataclass

from rich.table import Table

from crossdock.launch.commands.builtin_configs import builtin_configs
from crossdock.runtime.models.families import SPECS
from crossdock.runtime.models.families.published import real_shape
from crossdock.runtime.models.spec import ModelSpec

HEADINGS = ("family", "checkpoint", "class", "block stacks", "parameters", "GB in bf16", "layouts")

INFERRED = (
    "Other pipelines of diffusers from text to pictures or videos run from what is inferred of them: layerwise, HSDP "
    "and data parallel; tensor and sequence parallel where their transformer tells how, and one step agrees with one "
    "rank's."
)


@dataclass(frozen=True)
class ModelRow:
    """One published checkpoint.

    Attributes:
        transformer: diffusers class.
        transformers: how many of it the checkpoint has.
        stacks: block stack -> number of blocks in each of them.
        parameters: of all of them.
        bytes: of all of them in bf16.
        layouts: the built-in configs in which tests hold this family.
    """

    family: str
    checkpoint: str
    transformer: str
    transformers: int
    stacks: dict[str, int]
    parameters: int
    bytes: int
    layouts: tuple[str, ...]

    @property
    def cells(self) -> tuple[str, ...]:
        """As text, under `HEADINGS`."""
        return (
            self.family,
            self.checkpoint,
            self.transformer if self.transformers == 1 else f"{self.transformers} x {self.transformer}",
            ", ".join(f"{name} x{count}" for name, count in self.stacks.items()),
            f"{self.parameters / 1e9:.2f}B",
            f"{self.bytes / 1e9:.1f}",
            _brief(self.layouts),
        )


def model_rows() -> Iterator[ModelRow]:
    for spec in SPECS.values():
        layouts = held_layouts(spec)
        for published in spec.published:
            shape = real_shape(spec, published)
            yield ModelRow(
                spec.family,
                published.name,
                spec.transformer,
                published.transformers,
                shape.stacks,
                shape.parameters,
                shape.bf16_bytes,
                layouts,
            )


def held_layouts(spec: ModelSpec) -> tuple[str, ...]:
    """The built-in configs in which the matrix of tests runs this family."""
    return tuple(name for name in builtin_configs() if why_refused(spec, name) is None)


def why_refused(spec: ModelSpec, layout: str) -> str | None:
    """Why a family cannot run in a built-in config; None: it can."""
    config = builtin_configs()[layout]
    if config.parallel.cfg_degree > 1 and spec.branches is None:
        return "has one branch of guidance"
    return spec.refused.get(layout)


def models_table(rows: list[ModelRow]) -> Table:
    table = Table(*HEADINGS)
    for row in rows:
        table.add_row(*row.cells)
    return table


def models_markdown(rows: list[ModelRow]) -> str:
    """The same as a table in Markdown, as the README has it."""
    lines = [HEADINGS, ["---"] * len(HEADINGS), *(row.cells for row in rows)]
    return "\n".join(f"| {' | '.join(cells)} |" for cells in lines)


def models_json(rows: list[ModelRow]) -> list[dict[str, object]]:
    return [asdict(row) for row in rows]


def _brief(layouts: tuple[str, ...]) -> str:
    missing = [name for name in builtin_configs() if name not in layouts]
    return "all" if not missing else f"all but {', '.join(missing)}"
