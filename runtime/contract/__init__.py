"""The composition contract: one module per check, `verify.py` for all of them."""
