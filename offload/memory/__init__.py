"""Bytes: how a block is laid out in them, where they rest on the host, and how they get to the device."""
