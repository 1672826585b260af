"""Measurements of this library beside plain DeepSpeed; see docs/performance.md for the commands."""
