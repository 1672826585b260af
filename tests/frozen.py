"""What imports have left behind is no garbage: told so, the collector is fast.

DeepSpeed collects garbage several times for every engine, and walks each time through all that torch and transformers
have made at import: four fifths of the time of a test with a tiny model.
"""

from __future__ import annotations

import gc


def freeze_imports() -> None:
    """Imports what the tests with engines use, and keeps the collector out of it from now on."""
    import deepspeed.runtime.engine
    import deepspeed.runtime.zero.stage3
    import deepspeed.runtime.zero.stage_1_and_2
    import torch._dynamo
    from transformers import BertForSequenceClassification, LlamaForCausalLM  # noqa: F401

    import ds_compress  # noqa: F401

    gc.collect()
    gc.freeze()
