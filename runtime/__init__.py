"""A run: config and models make a plan, the rank runs the pipeline, reports go to the contract, the watch blames."""

from crossdock.runtime.config.schema import RunConfig
from crossdock.runtime.request import GenerateRequest, RequestItem

__all__ = ["GenerateRequest", "RequestItem", "RunConfig"]
