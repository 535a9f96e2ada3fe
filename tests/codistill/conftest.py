"""Tensor tests run on one thread: they are small, and test machines are shared."""

from __future__ import annotations

import torch

torch.set_num_threads(1)
