"""placeholder while the adapter is being written"""
from typing import Any
class XFuserAttention:
    def __init__(self, **_: Any) -> None: raise NotImplementedError
def xfuser_installed() -> bool: return False
def xfuser_limits(device_type: str, tp_degree: int, heads: int, ulysses_degree: int) -> str | None: return None
