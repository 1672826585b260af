"""The only package that knows DeepSpeed: registration, master fragments, step hooks, checkpoints, teachers."""
