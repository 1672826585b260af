"""A model that changes its shapes in mid-training, and the engine built anew around it."""
