"""The API of `deepspeed.compression`, which DeepSpeed removed in 0.19.7, on this library.

Replace the text `deepspeed.compression` by `ds_compress.compat` in a script; its JSON stays as it is
(`ds_compress migrate old.json` explains what changed since). The three ways in which the old library was used:

    model = init_compression(model, "ds_config.json", teacher_model=teacher)      # the same model object
    engine, *_ = deepspeed.initialize(model=model, config="ds_config.json", ...)  # takes the prepared model over
    ...                                                                           # engine.step() keeps the schedule
    model = redundancy_clean(engine, "ds_config.json")

    model = init_compression(model, config)                                       # without DeepSpeed's engine
    scheduler = compression_scheduler(model, config)
    for batch in data:
        ...; loss.backward(); optimizer.step(); optimizer.zero_grad(); scheduler.step()
    model = redundancy_clean(model, config)

and, third, with a JSON that enables nothing, or has no `compression_training` block: then nothing happens, and the
log says so. The new way needs none of these calls: `import ds_compress` and `deepspeed.initialize`.

| module | names |
|---|---|
| `compress` | `init_compression`, `redundancy_clean`, `student_initialization`, `get_module_name` |
| `scheduler` | `compression_scheduler`, now with `state_dict` and `load_state_dict` |
| `helper` | `convert_conv1d_to_linear`, `module_replacement`, `compression_preparation`, `fix_compression`, ... |
| `basic_layer` | `LinearLayer_Compress`, ...: for isinstance; `QuantAct` |
| `utils` | the quantizers and the top-k mask as autograd functions |
| `config`, `constants` | `get_compression_config`; the names of the keys |

What differs on purpose: layers are changed in place, not replaced, so hooks, ties, frozen flags and eval mode stay;
every mask is applied to the fp32 weights after the optimizer's step instead of in forward; only applied steps count.
"""

from __future__ import annotations

from ds_compress.compat import basic_layer, config, constants, helper, utils
from ds_compress.compat.compress import init_compression, redundancy_clean
from ds_compress.compat.helper import convert_conv1d_to_linear
from ds_compress.compat.scheduler import compression_scheduler

__all__ = [
    "basic_layer",
    "compression_scheduler",
    "config",
    "constants",
    "convert_conv1d_to_linear",
    "helper",
    "init_compression",
    "redundancy_clean",
    "utils",
]
