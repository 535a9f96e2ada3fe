"""How densely checkpoints travel, in bits a weight, as measured."""

from __future__ import annotations

CODEC_BITS = {"fp32": 32.0, "fp16": 16.0, "keyframes": 13.8, "adaptive": 0.78}
"""Bits a weight. fp32 and fp16 are raw; fp16 keyframes were 1.16 times, and all frames of a whole run with adaptive deltas
20.5 times smaller than raw fp16 (benchmarks/RESULTS.md, the language model)."""
