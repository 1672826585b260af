"""What a Trainer's logs say of the compression; a Trainer gets this callback by itself."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback
from transformers.trainer_callback import DefaultFlowCallback

from ds_compress.config.schema.run_length import refuse_unfinished
from ds_compress.engine.registry import run_of
from ds_compress.engine.run_end import say_end, warn_if_alone

PREFIX = "compression"


class CompressionCallback(TrainerCallback):
    """Checks the schedules against the Trainer's `max_steps`, adds numbers to its logs, and says what was reached.

    Before each checkpoint of the Trainer and at the end of training it makes the weights of every process exact, so
    that the Trainer saves those that the optimizer stepped and not copies that were sent rounded.

    Each log of a training loss gets `compression/<technique>/<number>`, all of `engine.compression.metrics()`: on the
    console, in `trainer.state.log_history`, and in what `report_to` names (TensorBoard, W&B, ...), because a Trainer
    calls its default callbacks, of which `import ds_compress` makes this one, before those of `report_to`.
    DeepSpeed's own monitor gets the numbers in any case. Without a `compression_training` block it does nothing.
    """

    @classmethod
    def add_to(cls, trainer: Any) -> CompressionCallback:
        """Puts a callback before all of `trainer` but the one that decides when to save; there may be one already."""
        callbacks = trainer.callback_handler.callbacks
        callback = next((c for c in callbacks if isinstance(c, cls)), None) or cls()
        deciding = [c for c in callbacks if isinstance(c, DefaultFlowCallback)]
        others = [c for c in callbacks if not isinstance(c, cls | DefaultFlowCallback)]
        callbacks[:] = [*deciding, callback, *others]
        return callback

    @classmethod
    def join_every_trainer(cls, trainer_module: Any) -> None:
        """Makes it one of the default callbacks of `transformers.trainer`; idempotent."""
        if cls not in trainer_module.DEFAULT_CALLBACKS:
            trainer_module.DEFAULT_CALLBACKS.append(cls)

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Raises ConfigError when a schedule ends after the Trainer's last optimizer step."""
        run = run_of(kwargs["model"])
        if run is not None:
            warn_if_alone(args.world_size)
        if run is not None and run.engine is not None and state.max_steps > 0:
            refuse_unfinished(run.config, state.max_steps, "the Trainer's max_steps")

    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before_saving(control, kwargs["model"])

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._before_saving(control, kwargs["model"])

    @staticmethod
    def _before_saving(control: Any, model: Any) -> None:
        run = run_of(model)
        if control.should_save and run is not None and run.engine is not None:
            run.refresh_weights()

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs, run = kwargs.get("logs"), run_of(kwargs["model"])
        if not logs or "loss" not in logs or run is None or not state.is_world_process_zero:
            return
        numbers = {f"{PREFIX}/{name}": value for name, value in run.metrics().items()}
        logs.update(numbers)
        # The Trainer has copied the log into its history already.
        state.log_history[-1].update(numbers)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        run = run_of(kwargs["model"])
        if run is None or run.engine is None:
            return
        # Here, where every process comes by, and not in save_model, which a script may call in one of them.
        run.refresh_weights()
        say_end(run, "trainer")
