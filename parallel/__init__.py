"""Mesh, tensor parallelism, sequence parallelism, HSDP."""
