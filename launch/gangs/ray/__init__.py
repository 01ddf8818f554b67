"""Ranks that are Ray's actors, on one machine or in a cluster."""
