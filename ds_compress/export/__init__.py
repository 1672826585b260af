"""From a trained model to a folder that other programs load.

write       reads the source, lets a format write it, checks the result, renames it into place
source      a model to export, wherever its weights are
read        its modules one by one: quantized values, scales, and what else is stored
quantized_matrix    a weight as integers, exactly those that training computed with
hf, compressed_tensors, serving_format, onnx, openvino    one format each
sparse_container    a tensor with many zeros as bitmask and values, in format `torch`
shards      safetensors files of bounded size, written tensor by tensor
compatibility, trial_load    which formats a plan can be exported in, asked before training
check       the folder is loaded by a fresh process (reload_*), and its logits compared
report      `ds_compress.json`
load        `from_pretrained`, for the `torch` format; serve, fuse: the modules that it runs; int8_product: their kernel
"""
