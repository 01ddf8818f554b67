"""Ranks of one machine: the process that forks them, the way to it and to them, and their gang."""
