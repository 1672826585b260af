"""From a trained model to a folder that other programs load.

api         `export`: reads the source, lets a format write it, has it checked, renames it into place
source      a model to export, wherever its weights are
read        its modules one by one: integer codes, scales, what else is stored
encoded     a weight as integers, exactly those that training computed with
hf, compressed_tensors, serving_format, onnx    one format each
shards      safetensors files of bounded size, written as tensors come
check       the folder is loaded by a fresh process, and its logits compared
report      `ds_compress.json`
load        `from_pretrained`, for the `torch` format; serve, fuse: the modules that it runs
"""
