"""Block layout, host store, block stream, residency schedule, copy engines."""
