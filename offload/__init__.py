"""Blocks that come to the device when they are needed: memory, schedule, stream, live models."""
