"""Codes: what rests and travels of a block in place of the bytes that compute."""
