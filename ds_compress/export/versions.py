"""Versions of what wrote an export."""

from __future__ import annotations

from importlib import metadata

from ds_compress.version import __version__

_PACKAGES = ("torch", "transformers", "compressed-tensors", "onnx", "onnxruntime", "openvino")


def versions() -> dict[str, str]:
    """{package: version} of those that are installed."""
    found = {"ds_compress": __version__}
    for package in _PACKAGES:
        try:
            found[package] = metadata.version(package)
        except metadata.PackageNotFoundError:
            continue
    return found
