"""Whether the C++ extension is here, and if not, why. Importing this module never fails."""

from __future__ import annotations

import importlib
import os
import warnings

import torch  # noqa: F401  first: the extension finds libtorch_cpu.so by the name that torch has loaded

LOADED = False
WHY = ""
if os.environ.get("SGSC_NO_EXT") == "1":
    WHY = "SGSC_NO_EXT=1"
else:
    try:
        importlib.import_module("sgsc._C")  # loading it registers the CPU kernels
        LOADED = True
    except ImportError as error:
        WHY = str(error)

_said: set[str] = set()


def say_once_that_the_reference_runs() -> None:
    """Warn, once a process, that CPU tensors take the plain PyTorch path."""
    if LOADED or _said:
        return
    _said.add("said")
    warnings.warn(
        f"sgsc: no C++ extension ({WHY}); CPU tensors use plain PyTorch, which is right but slow. "
        "Install a C++ compiler and reinstall sgsc",
        RuntimeWarning,
        stacklevel=2,
    )
