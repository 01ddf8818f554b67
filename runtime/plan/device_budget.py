"""How a device's memory is divided between the components of a pipeline.

What is outside the transformer's blocks, and a little of the VAE, never leaves the device. All else shares one arena:
the transformer's blocks, the text encoder and the VAE take turns in it, so that the peak of the whole run is what
never leaves and the arena.
"""

from __future__ import annotations

from collections.abc import Sequence

from crossdock.offload.memory.layout import ALIGNMENT
from crossdock.offload.schedule.residency import Residency, assumed_costs, minimum_bytes, plan_residency
from crossdock.offload.schedule.shared_slots import place_sizes, usable_bytes
from crossdock.runtime.config.schema import OffloadConfig
from crossdock.runtime.errors import ConfigError
from crossdock.runtime.plan.component_needs import ComponentNeed


def divide_device(
    offload: OffloadConfig,
    device_bytes: int | None,
    outside_bytes: int,
    passes: Sequence[Sequence[int]],
    travel: Sequence[Sequence[int]],
    staging_bytes: int,
    others: Sequence[ComponentNeed],
) -> tuple[Residency, int | None, int | None]:
    """Residency, budget and arena, as a `MemoryPlan` has them.

    Args:
        device_bytes: memory of the smallest device; None: not known yet, and a relative budget is not judged.
        outside_bytes: of what never leaves the device.
        passes: of each transformer's blocks that can be streamed, the bytes in a slot, as they run.
        travel: of the same blocks, the bytes that travel.
        staging_bytes: what the blocks need of the device besides slots, as long as one of them is streamed.
        others: the components that take turns with the transformer.

    Raises:
        ConfigError: the budget is below the minimum, which the message names.
    """
    block_sizes, travel_sizes, depths = place_sizes(passes), place_sizes(travel), offload.depths
    costs = assumed_costs(block_sizes, travel_sizes)
    if not offload.layerwise:
        return plan_residency(block_sizes, costs, None, depths, travel_sizes), None, None
    least = minimum_bytes(block_sizes, depths) + staging_bytes
    largest = max((need.turn_bytes for need in others), default=0)
    budget = offload.budget_bytes(device_bytes)
    if budget is None:
        residency = plan_residency(block_sizes, costs, None, depths, travel_sizes)
        return residency, None, max(residency.device_bytes + staging_bytes, largest)
    arena_bytes = budget - outside_bytes - ALIGNMENT
    if arena_bytes < max(least, largest):
        raise _too_small(offload, budget, outside_bytes, least, others)
    room = arena_bytes - staging_bytes
    residency = plan_residency(block_sizes, costs, room, depths, travel_sizes)
    return residency, budget, min(arena_bytes, max(usable_bytes(passes, room) + staging_bytes, largest))


def _too_small(
    offload: OffloadConfig, budget: int, outside_bytes: int, least: int, others: Sequence[ComponentNeed]
) -> ConfigError:
    needs = {"transformer": least} | {need.name: need.turn_bytes for need in others}
    name = max(needs, key=lambda name: needs[name])
    minimum = outside_bytes + ALIGNMENT + needs[name]
    return ConfigError(
        f'found "{offload.device_budget}" ({budget} bytes); this model needs at least {minimum} bytes '
        f"({minimum / 2**20:.1f}MiB) at prefetch {offload.depths[0]}, most of all for its {name}",
        "offload.device_budget",
    )
