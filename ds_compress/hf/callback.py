"""The Trainer's logs also say how compressed the model is."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from ds_compress.engine.sessions import session_of

PREFIX = "compression"


class CompressionCallback(TrainerCallback):
    """Adds `compression/<stage>/<number>` (all of `engine.compression.metrics()`) to each log of a training loss.

        Trainer(..., callbacks=[CompressionCallback()])     console and trainer.state.log_history
        CompressionCallback.add_to(trainer)                 also what `report_to` names: TensorBoard, W&B, ...

    A Trainer calls the callbacks of `report_to` before those that it is given, so these see the log without our
    numbers; `add_to` puts this one first. DeepSpeed's own monitor gets the numbers in either case.
    Without a `compression_training` block it does nothing.
    """

    @classmethod
    def add_to(cls, trainer: Any) -> CompressionCallback:
        """Makes a callback the first of `trainer`, in place of one that it may have already."""
        callbacks = trainer.callback_handler.callbacks
        callback = next((c for c in callbacks if isinstance(c, cls)), None) or cls()
        callbacks[:] = [callback, *(c for c in callbacks if not isinstance(c, cls))]
        return callback

    def on_log(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        logs, session = kwargs.get("logs"), session_of(kwargs["model"])
        if not logs or "loss" not in logs or session is None or not state.is_world_process_zero:
            return
        numbers = {f"{PREFIX}/{name}": value for name, value in session.metrics().items()}
        logs.update(numbers)
        # The Trainer has copied the log into its history already.
        state.log_history[-1].update(numbers)
