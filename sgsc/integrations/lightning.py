"""Self-compression in Lightning's Trainer: a callback, and nothing to edit in the LightningModule.

    callback = SGSCCallback(keep, model="net", target_size=0.1)  # module.net is what prepare(net).model returned
    Trainer(max_steps=1000, callbacks=[callback]).fit(module, data)
    print(callback.outcome)
    packed = sgsc.pack(module.net)

The callback puts `run.loss` around what `training_step` returns, so that parts of a batch, precision and strategy treat
it as any loss.
"""

from __future__ import annotations

import math
from dataclasses import replace
from typing import Any

from torch import Tensor, nn

from sgsc.compression import Outcome, SelfCompression
from sgsc.distributed import leave_out
from sgsc.preservation import PreservationSet

try:
    from lightning.pytorch import Callback  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(f"sgsc.integrations.lightning needs lightning 2 (pip install lightning): {error}") from None


class SGSCCallback(Callback):
    """Compresses a prepared model in a LightningModule while the Trainer trains it.

    Its state goes into the Trainer's checkpoints and comes back with `fit(ckpt_path=...)`.

    Args:
        keep: The preservation set, chosen with the float model; None for none.
        model: Name of the prepared model in the LightningModule; "" for the module itself.
        settings: Further arguments of `SelfCompression`. `steps` are those of the Trainer.

    Attributes:
        run: The `SelfCompression`, from the start of fitting on.
        outcome: What it reached, once training has ended.
    """

    run: SelfCompression | None = None
    outcome: Outcome | None = None

    def __init__(self, keep: PreservationSet | None, *, model: str = "", **settings: Any) -> None:
        for name, why in (
            ("cut", "its checkpoints hold the whole model; leave cut off, `pack` removes the same channels"),
            ("steps", "its own arguments say how many steps there are; leave steps out"),
        ):
            if settings.get(name):
                raise ValueError(f"{name}={settings[name]} in a Trainer: {why}")
        self.keep, self.name, self.settings = keep, model, settings
        self.saved: dict[str, Any] | None = None
        self.seen = 0

    def setup(self, trainer: Any, pl_module: Any, stage: str) -> None:
        """Before the strategy wraps the module."""
        leave_out(pl_module)

    def on_fit_start(self, trainer: Any, pl_module: Any) -> None:
        """Start the run, or go on with that of the checkpoint which the Trainer has loaded.

        Raises:
            ValueError: If the Trainer or the module is set up in a way that is not served.
        """
        if not pl_module.automatic_optimization or len(trainer.optimizers) != 1:
            raise ValueError(
                f"SGSCCallback serves automatic optimisation with one optimizer, got {len(trainer.optimizers)}; with "
                "manual optimisation call run.loss and run.step of SelfCompression in training_step yourself"
            )
        steps = trainer.estimated_stepping_batches
        if not math.isfinite(steps) or steps < 1:
            raise ValueError("SGSCCallback needs to know how many steps there are; give the Trainer max_steps")
        model: nn.Module = pl_module.get_submodule(self.name)
        convert = trainer.precision_plugin.convert_input  # as batches are: weights may be of half precision
        keep = self.keep if self.keep is None else replace(self.keep, inputs=convert(self.keep.inputs))
        self.run = run = SelfCompression(
            model,
            keep,
            optimizer=trainer.optimizers[0],
            scaler=getattr(trainer.precision_plugin, "scaler", None),
            **{**self.settings, "steps": int(steps)},
        )
        if self.saved is not None:
            run.load_state_dict(self.saved | {"model": model.state_dict()})
            self.saved = None
        inner = pl_module.training_step

        def training_step(*arguments: Any, **named: Any) -> Any:
            made = inner(*arguments, **named)
            if isinstance(made, Tensor):
                return run.loss(made)
            return made if made is None else {**made, "loss": run.loss(made["loss"])}

        pl_module.training_step = training_step

    def on_train_start(self, trainer: Any, pl_module: Any) -> None:
        """Count from where the Trainer is: it counts batches that were skipped, too."""
        self.seen = trainer.global_step

    def on_train_batch_end(self, trainer: Any, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        """Move widths and ranges, behind the optimiser: not after each part of a batch, nor one that was skipped."""
        assert self.run is not None
        if trainer.global_step > self.seen:
            self.seen = trainer.global_step
            if self.run.calls:
                self.run.step()

    def on_train_end(self, trainer: Any, pl_module: Any) -> None:
        """Return to the best model that held, and give the module its own `training_step` back."""
        assert self.run is not None
        self.on_exception(trainer, pl_module, None)
        self.outcome = self.run.finish()

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException | None) -> None:
        """Give the module its own `training_step` back."""
        pl_module.__dict__.pop("training_step", None)

    def state_dict(self) -> dict[str, Any]:
        """What a checkpoint needs, but for the model, which it holds anyway."""
        if self.run is None:
            return {}
        state = self.run.state_dict()
        del state["model"]
        return state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Inverse of `state_dict`; taken up as fitting starts."""
        self.saved = state_dict or None
