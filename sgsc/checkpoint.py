"""Checkpoints: any tree of dicts, lists, numbers, texts and tensors in one safetensors file; never pickle.

Tensors lie in the payload as "0", "1", …; the metadata's only key is "checkpoint", JSON: {"sha256": …, "tree": …}. The
digest is of the whole file, its 64 digits read as zeros. In the tree {"t": "3"} stands for a tensor, {"d": [[key,
value], …]} for a dict, {"l": […]} and {"u": […]} for a list and a tuple, {"f": "inf"} for a float that JSON does not
have. Everything round-trips exactly, but tensors that share memory no longer do, and subclasses come back as the plain
type.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
from pathlib import Path
from typing import Any

import safetensors.torch
from safetensors import SafetensorError
from torch import Tensor

from .files import write_atomically

_ZEROS = "0" * 64  # stands for the digest while it is computed


def save_checkpoint(path: str | os.PathLike, tree: Any) -> None:
    """Write a tree, atomically: state dicts of run, optimiser and generators, in whatever nesting.

    Raises:
        TypeError: If the tree holds something else than dict, list, tuple, number, text, None or tensor.
    """
    tensors: dict[str, Tensor] = {}
    whole = {"sha256": _ZEROS, "tree": _encode(tree, tensors, "tree")}
    text = json.dumps(whole, separators=(",", ":"), allow_nan=False)
    data = safetensors.torch.save(tensors, metadata={"checkpoint": text})
    write_atomically(Path(path), data.replace(_ZEROS.encode(), hashlib.sha256(data).hexdigest().encode(), 1))


def load_checkpoint(path: str | os.PathLike) -> Any:
    """Read a tree that `save_checkpoint` wrote.

    Raises:
        ValueError: If the file is not such a file, or is damaged.
        FileNotFoundError: If there is none.
    """
    name = Path(path).name
    if not Path(path).is_file():
        raise FileNotFoundError(f"no checkpoint at {path}; name another, or start anew without it")
    data = Path(path).read_bytes()
    try:
        tensors = safetensors.torch.load(data)  # first, since it checks the lengths
        header = json.loads(data[8 : 8 + int.from_bytes(data[:8], "little")])
        whole = json.loads(header["__metadata__"]["checkpoint"])
        said = str(whole["sha256"])
        if hashlib.sha256(data.replace(said.encode(), _ZEROS.encode(), 1)).hexdigest() != said:
            raise ValueError("the digest is another: the file is damaged")
        return _decode(whole["tree"], tensors)
    except (SafetensorError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{name} is not a whole checkpoint ({type(error).__name__}: {error})") from None


def _encode(value: Any, tensors: dict[str, Tensor], where: str) -> Any:
    if isinstance(value, Tensor):
        key = str(len(tensors))
        tensors[key] = value.detach().cpu().contiguous().clone()
        return {"t": key}
    if isinstance(value, dict):
        return {"d": [[_encode(k, tensors, where), _encode(v, tensors, f"{where}.{k}")] for k, v in value.items()]}
    if isinstance(value, (list, tuple)):
        items = [_encode(v, tensors, f"{where}[{i}]") for i, v in enumerate(value)]
        return {"u" if isinstance(value, tuple) else "l": items}
    if isinstance(value, float) and not math.isfinite(value):
        return {"f": repr(float(value))}  # NumPy's own float would say its type too
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    raise TypeError(f"a checkpoint cannot hold {type(value).__name__} (at {where}); pass its state_dict()")


def _decode(value: Any, tensors: dict[str, Tensor]) -> Any:
    if isinstance(value, list):
        raise ValueError("a list that is not marked as one")
    if not isinstance(value, dict):
        return value
    ((kind, inner),) = value.items()
    if kind == "t":
        return tensors[inner]
    if kind == "d":
        return {_decode(k, tensors): _decode(v, tensors) for k, v in inner}
    if kind in ("l", "u"):
        items = [_decode(v, tensors) for v in inner]
        return tuple(items) if kind == "u" else items
    if kind == "f" and inner in ("inf", "-inf", "nan"):
        return float(inner)
    raise ValueError(f"unknown entry {kind!r}")
