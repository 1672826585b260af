"""Gradients and weights on their way between processes."""
