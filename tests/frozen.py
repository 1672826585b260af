"""What imports have left behind is no garbage: told so, the collector is fast.

DeepSpeed collects garbage several times for every engine, and walks each time through all that torch and transformers
have made at import: four fifths of the time of a test with a tiny model.
"""

from __future__ import annotations

import gc
import importlib

_IMPORTS = (
    "deepspeed.runtime.zero.stage3",
    "deepspeed.runtime.zero.stage_1_and_2",
    # What every engine with ZeRO asks whether its optimizer is of; brings torch's inductor along.
    "deepspeed.runtime.zero.muon.muon_optimizer",
    "deepspeed.module_inject.auto_ep_layer",
    "torch._dynamo",
    "ds_compress",
    "ds_compress.engine.attach",
    "ds_compress.engine.internals_check",
)


def freeze_imports() -> None:
    """Imports what the tests with engines use, and keeps the collector out of it from now on."""
    for name in _IMPORTS:
        importlib.import_module(name)
    from transformers import BertForSequenceClassification, LlamaForCausalLM  # noqa: F401  (found when asked for)

    gc.collect()
    gc.freeze()
