"""Self-compression in transformers' Trainer: a callback, and nothing to edit in the Trainer.

    callback = SGSCCallback(keep, target_size=0.1)
    trainer = Trainer(model=sgsc.prepare(net).model, args=..., train_dataset=..., callbacks=[callback])
    trainer.train()
    print(callback.outcome)
    packed = sgsc.pack(trainer.model)

The Trainer makes the task loss and its backward, the callback adds the gradient of the rest: as a step begins, with the
gradients of the last one gone. Parts of a batch add theirs to it, and clipping sees the sum.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from torch import Tensor, nn

from sgsc.checkpoint import load_checkpoint, save_checkpoint
from sgsc.compression import Outcome, SelfCompression
from sgsc.distributed import leave_out
from sgsc.preservation import PreservationSet

try:
    from transformers import TrainerCallback  # pyright: ignore[reportMissingImports]
except ImportError as error:
    raise ImportError(
        f"sgsc.integrations.huggingface needs transformers 5 (pip install transformers): {error}"
    ) from None

FILE = "sgsc.safetensors"


class Logits(nn.Module):
    """A transformers model as tensor in, logits out: what a preservation set is chosen with and judged by.

    Args:
        model: Its first argument is a tensor (token ids, pixel values); its output has `logits`.
        pad: Token id that the attention mask shall leave out; None for no mask.
    """

    def __init__(self, model: nn.Module, pad: int | None = None) -> None:
        super().__init__()
        self.model, self.pad = model, pad

    def forward(self, x: Tensor) -> Tensor:
        """(N, ...) -> (N, classes) or (N, T, vocabulary)."""
        mask = {} if self.pad is None else {"attention_mask": x.ne(self.pad).long()}
        return self.model(x, **mask).logits


class SGSCCallback(TrainerCallback):
    """Compresses the Trainer's model, a prepared one, while the Trainer trains it.

    Its state goes into the Trainer's checkpoints and comes back with `train(resume_from_checkpoint=True)`.

    Args:
        keep: Chosen with `PreservationSet.select(Logits(net), data, size)`; None for none.
        pad: As of `Logits`.
        checkpoint: Folder of the Trainer's checkpoint to resume from, if it does not lie in `args.output_dir`.
        settings: Further arguments of `SelfCompression`. `steps` are those of the Trainer.

    Attributes:
        run: The `SelfCompression`, from the first step on.
        outcome: What it reached, once training has ended.
    """

    run: SelfCompression | None = None
    outcome: Outcome | None = None

    def __init__(
        self,
        keep: PreservationSet | None,
        *,
        pad: int | None = None,
        checkpoint: str | Path | None = None,
        **settings: Any,
    ) -> None:
        for name in ("cut", "steps"):
            if settings.get(name):
                raise ValueError(
                    f"{name}={settings[name]} in a Trainer: "
                    + {
                        "cut": "its checkpoints hold the whole model; leave cut off, `pack` removes the same channels"
                    }.get(name, "its own arguments say how many steps there are; leave steps out")
                )
        self.keep, self.pad, self.checkpoint, self.settings = keep, pad, checkpoint, settings

    def on_init_end(self, args, state, control, model=None, **rest) -> None:
        """Before the Trainer wraps the model for several processes."""
        if model is not None:
            leave_out(model)

    def on_train_begin(self, args, state, control, model=None, optimizer=None, **rest) -> None:
        """Start the run, or go on with that of the checkpoint which the Trainer has loaded.

        Raises:
            ValueError: If the Trainer is set up in a way that is not served.
        """
        if args.load_best_model_at_end:
            raise ValueError(
                "load_best_model_at_end puts back weights of an earlier size; leave it off, since the callback ends "
                "with the best model that held the target and the tolerance"
            )
        if getattr(args, "deepspeed", None) or getattr(args, "fsdp", None):
            raise ValueError("SGSCCallback serves one process and DistributedDataParallel, no DeepSpeed and no FSDP")
        assert model is not None
        inner = getattr(optimizer, "optimizer", optimizer)  # accelerate wraps it
        view = Logits(model, self.pad)
        scaler = getattr(optimizer, "scaler", None)
        self.run = SelfCompression(
            view, self.keep, optimizer=inner, scaler=scaler, **{**self.settings, "steps": state.max_steps}
        )
        if state.global_step:
            folder = Path(self.checkpoint or Path(args.output_dir) / f"checkpoint-{state.global_step}")
            if not (folder / FILE).is_file():
                raise ValueError(
                    f"the Trainer resumes from step {state.global_step}, but there is no {folder / FILE}; name the "
                    "folder with SGSCCallback(checkpoint=...), or start anew"
                )
            saved = load_checkpoint(folder / FILE)
            self.run.load_state_dict(saved | {"model": view.state_dict()})

    def on_step_begin(self, args, state, control, optimizer=None, **rest) -> None:
        """Add the gradient of what the Trainer's loss lacks."""
        assert self.run is not None
        extra = self.run.extra_loss()
        if extra.requires_grad:
            scaler = self.run.scaler
            (extra if scaler is None else scaler.scale(extra)).backward()

    def on_pre_optimizer_step(self, args, state, control, **rest) -> None:
        """Stop before weights move by a gradient that is not finite: the Trainer's own loss is seen nowhere else."""
        assert self.run is not None
        self.run.control.bits.check_finite()

    def on_step_end(self, args, state, control, **rest) -> None:
        """Move widths and ranges, behind the optimiser."""
        assert self.run is not None
        self.run.step()

    def on_save(self, args, state, control, **rest) -> None:
        """Write the state into the checkpoint that the Trainer has just written."""
        assert self.run is not None
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if state.is_world_process_zero and folder.is_dir():
            saved = self.run.state_dict()
            del saved["model"]  # the Trainer's own files hold it
            save_checkpoint(folder / FILE, saved)

    def on_train_end(self, args, state, control, **rest) -> None:
        """Return to the best model that held."""
        assert self.run is not None
        self.outcome = self.run.finish()
