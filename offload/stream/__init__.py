"""Blocks that pass through slots while a model runs."""
