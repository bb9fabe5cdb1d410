"""Quantizers: formulas on one value a channel in front of the one primitive `fake_quantize`."""

from .base import QUANTIZERS, Codes, Quantizer, make_quantizer
from .lsq import LSQ
from .self_compressing import PublishedSelfCompressing, SelfCompressing

__all__ = ["LSQ", "QUANTIZERS", "Codes", "PublishedSelfCompressing", "Quantizer", "SelfCompressing", "make_quantizer"]
