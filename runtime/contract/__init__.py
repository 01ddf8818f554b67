"""The composition contract: one module per check, `verify.py` for all of them, the coordinator who judges by it."""
