"""Measurements of this library beside plain DeepSpeed; see the README for the commands."""
