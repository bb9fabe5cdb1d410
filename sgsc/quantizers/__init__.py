"""Quantizers: formulas on one value a channel in front of the one primitive `fake_quantize`."""

from .base import QUANTIZERS, Codes, Diverged, Quantizer, make_quantizer
from .grids import HalfSteps, Interpolated, Ternary
from .inputs import InputQuantizer, StaticInput
from .lsq import LSQ
from .self_compressing import PublishedSelfCompressing, SelfCompressing

__all__ = [
    "LSQ",
    "QUANTIZERS",
    "Codes",
    "Diverged",
    "HalfSteps",
    "InputQuantizer",
    "Interpolated",
    "PublishedSelfCompressing",
    "Quantizer",
    "SelfCompressing",
    "StaticInput",
    "Ternary",
    "make_quantizer",
]
