"""Safetensors files of bounded size, written tensor by tensor."""

from __future__ import annotations

import json
from pathlib import Path

import torch

from ds_compress.files import write_tensors

DEFAULT_SHARD_BYTES = 2 * 2**30


class ShardWriter:
    """Holds at most one shard in memory; `close` renames the files as transformers expects them."""

    def __init__(self, folder: Path, shard_bytes: int = DEFAULT_SHARD_BYTES) -> None:
        self.folder = folder
        self.total_bytes = 0
        self._shard_bytes = shard_bytes
        self._waiting: dict[str, torch.Tensor] = {}
        self._waiting_bytes = 0
        self._places: dict[str, int] = {}
        self._files: list[Path] = []

    def add(self, name: str, tensor: torch.Tensor) -> None:
        """Stores a CPU tensor; raises ValueError for a name that is there already."""
        if name in self._places or name in self._waiting:
            raise ValueError(f"{name} is stored twice")
        if self._waiting and self._waiting_bytes + tensor.nbytes > self._shard_bytes:
            self._flush()
        self._waiting[name] = tensor.contiguous()
        self._waiting_bytes += tensor.nbytes
        self.total_bytes += tensor.nbytes

    def close(self) -> None:
        """Writes the last shard, and the index where there are several files."""
        if self._waiting or not self._files:
            self._flush()
        count = len(self._files)
        if count == 1:
            self._files[0].rename(self.folder / "model.safetensors")
            return
        names = [f"model-{number + 1:05d}-of-{count:05d}.safetensors" for number in range(count)]
        for file, name in zip(self._files, names, strict=True):
            file.rename(self.folder / name)
        weight_map = {name: names[place] for name, place in self._places.items()}
        index = {"metadata": {"total_size": self.total_bytes}, "weight_map": weight_map}
        (self.folder / "model.safetensors.index.json").write_text(json.dumps(index, indent=1) + "\n")

    def _flush(self) -> None:
        file = self.folder / f"shard-{len(self._files):05d}.safetensors"
        write_tensors(file, self._waiting, metadata={"format": "pt"})
        self._places.update(dict.fromkeys(self._waiting, len(self._files)))
        self._files.append(file)
        self._waiting, self._waiting_bytes = {}, 0
