"""Grids of integers and small floats, fake quantization that saves no copy for backward, and the layers that use it.

grid                   the formulas, and what a grid is: bits, granularity, symmetric or not
formats, schemes       floats of 4 to 8 bits, and pairs of formats by the names that servers have
layout                 which weights share a scale
qparams                scale and offset of a group of values
arithmetic             one block quantized and dequantized; weights: a whole weight; fused: in one pass of a kernel
search                 scales that stay as they are chosen at the start
fake_quant             weights and inputs as a layer computes with them now
linear_ops, gradients  what the layers compute, and its gradients
fake_quantized_linear, embedding, integer_linear, fp8_linear   these together, as autograd functions
quantizers, layers     the state of a quantized layer, and the layers
fast_paths             torch's fused encoder kernels, switched off where they would bypass a quantized layer
"""
