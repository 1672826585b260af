"""Our kernels under the face that DeepSpeed gives its ops: `ds_report` and `deepspeed.ops` know them by name."""

from __future__ import annotations

from typing import Any

from deepspeed.ops.op_builder.builder import OpBuilder

from ds_compress.ops import build, library
from ds_compress.ops.toolchain import ToolchainError


class CompressOpsBuilder(OpBuilder):
    """Finds, builds and loads the library of `ds_compress.ops`; building is `ops.build`'s, not DeepSpeed's.

    DeepSpeed's own way would compile CUDA with fast math (so that CPU and CUDA scales differ), fail on a torch
    without CUDA, and leave a lock behind when it is killed.
    """

    BUILD_VAR = "DS_COMPRESS_BUILD_OPS"
    NAME = "ds_compress"

    def __init__(self) -> None:
        super().__init__(name=self.NAME)

    def absolute_name(self) -> str:
        return "ds_compress.ops.prebuilt"

    def sources(self) -> list[str]:
        return [str(path) for path in library.wanted_build().sources]

    def include_paths(self) -> list[str]:
        return [str(build.sources_folder() / "include")]

    def is_compatible(self, verbose: bool = False) -> bool:
        if library.prebuilt() is not None:
            return True
        try:
            library.wanted_build()
        except ToolchainError as error:
            if verbose:
                self.warning(str(error))
            return False
        return True

    def load(self, verbose: bool = True) -> Any:
        """`torch.ops.ds_compress` with native kernels; raises KernelsUnavailable when they cannot be had."""
        return library.native()


def register_builder() -> None:
    """Adds the builder to DeepSpeed's list of ops; idempotent."""
    from deepspeed.ops.op_builder.all_ops import ALL_OPS

    ALL_OPS.setdefault(CompressOpsBuilder.NAME, CompressOpsBuilder())
