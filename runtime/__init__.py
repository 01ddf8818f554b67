"""Config, plan, model specs, rank worker, reports, coordinator and verifier."""

from crossdock.runtime.config.schema import RunConfig

__all__ = ["RunConfig"]
