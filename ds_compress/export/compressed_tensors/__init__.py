"""The format `compressed-tensors`, which vanilla HF transformers and vLLM load: see `format`."""
