"""Integer grids, fake quantization that keeps no copy for backward, and the layers that use it."""
