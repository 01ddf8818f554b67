"""Adapters that change a model's weights as they are read."""
