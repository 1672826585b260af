"""Structures: what a model can lose whole (rows, heads, channels, layers, hidden units), found and cut."""
