"""Around one step: hooks of the optimizer, clipping, what forwards may not do."""
