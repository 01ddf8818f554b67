"""Small checkpoints in the real format: what tests and a first try run on."""
