"""Networks that compress themselves while the cases that matter stay right, and run from the bits they kept.

The public names. Each is imported when it is first used, so that loading and running a file needs no training code.
"""

from __future__ import annotations

from importlib import import_module
from importlib.metadata import PackageNotFoundError, version
from typing import TYPE_CHECKING, Any

try:
    __version__ = version("sgsc")
except PackageNotFoundError:  # run from the source tree
    __version__ = "0+source"

_HOME = {
    "fake_quantize": "kernels",
    "fake_quantize_many": "kernels",
    "QuantConv1d": "layers",
    "QuantConv2d": "layers",
    "QuantEmbedding": "layers",
    "QuantLinear": "layers",
    "QuantMultiheadAttention": "layers",
    "PackedConv1d": "packed",
    "PackedConv2d": "packed",
    "PackedEmbedding": "packed",
    "PackedLinear": "packed",
    "pack": "packed",
    "set_numerics": "packed",
    "adopt_widths": "averaging",
    "distilled": "distillation",
    "prepare": "preparation",
    "quantize_together": "together",
    "PreservationSet": "preservation",
    "SelfCompression": "compression",
    "certify": "certificate",
    "ArtefactError": "artefact",
    "load": "artefact",
    "load_into": "artefact",
    "read": "artefact",
    "save": "artefact",
    "stored_size": "artefact",
    "file_bits": "size",
    "float_bytes": "size",
    "nominal_bits": "size",
    "Budget": "search.cost",
    "KMeansTPESampler": "search.kmeans_tpe",
    "search_network": "search.study",
    "StrategyTraining": "strategies.qat",
    "fold_batch_norms": "strategies.folding",
    "load_derived": "strategies.derived",
    "save_derived": "strategies.derived",
    "search_strategies": "strategies.search",
    "load_checkpoint": "checkpoint",
    "save_checkpoint": "checkpoint",
}
__all__ = [
    "ArtefactError",
    "Budget",
    "KMeansTPESampler",
    "PackedConv1d",
    "PackedConv2d",
    "PackedEmbedding",
    "PackedLinear",
    "PreservationSet",
    "QuantConv1d",
    "QuantConv2d",
    "QuantEmbedding",
    "QuantLinear",
    "QuantMultiheadAttention",
    "SelfCompression",
    "StrategyTraining",
    "adopt_widths",
    "certify",
    "distilled",
    "fake_quantize",
    "fake_quantize_many",
    "file_bits",
    "float_bytes",
    "fold_batch_norms",
    "load",
    "load_checkpoint",
    "load_derived",
    "load_into",
    "nominal_bits",
    "pack",
    "prepare",
    "quantize_together",
    "read",
    "save",
    "save_checkpoint",
    "save_derived",
    "search_network",
    "search_strategies",
    "set_numerics",
    "stored_size",
]

if TYPE_CHECKING:
    from .artefact import ArtefactError, load, load_into, read, save, stored_size
    from .averaging import adopt_widths
    from .certificate import certify
    from .checkpoint import load_checkpoint, save_checkpoint
    from .compression import SelfCompression
    from .distillation import distilled
    from .kernels import fake_quantize, fake_quantize_many
    from .layers import QuantConv1d, QuantConv2d, QuantEmbedding, QuantLinear, QuantMultiheadAttention
    from .packed import PackedConv1d, PackedConv2d, PackedEmbedding, PackedLinear, pack, set_numerics
    from .preparation import prepare
    from .preservation import PreservationSet
    from .search.cost import Budget
    from .search.kmeans_tpe import KMeansTPESampler
    from .search.study import search_network
    from .size import file_bits, float_bytes, nominal_bits
    from .strategies.derived import load_derived, save_derived
    from .strategies.folding import fold_batch_norms
    from .strategies.qat import StrategyTraining
    from .strategies.search import search_strategies
    from .together import quantize_together


# packages that a user may name after `import sgsc` alone
_PARTS = ("artefact", "config", "distributed", "kernels", "layers", "packed", "quantizers", "strategies")


def __getattr__(name: str) -> Any:
    if name in _PARTS:
        return import_module(f".{name}", __name__)
    if name not in _HOME:
        raise AttributeError(f"module 'sgsc' has no attribute {name!r}")
    value = getattr(import_module(f".{_HOME[name]}", __name__), name)
    globals()[name] = value
    return value
