"""Compression state beside a DeepSpeed checkpoint, and models read back from it."""
