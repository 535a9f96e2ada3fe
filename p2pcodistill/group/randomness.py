"""Random states of a process: seeded once, kept in training checkpoints, put back in a resumed run."""

from __future__ import annotations

import random
from typing import Any

import torch


def seed_random_states(seed: int, rank: int) -> None:
    """Different random numbers on every rank, from the run's seed."""
    own_seed = (seed * 1_000_003 + rank + 1) % 2**63
    torch.manual_seed(own_seed)
    random.seed(own_seed)


def random_states(device: torch.device) -> dict[str, Any]:
    """This process's random states, as plain data and tensors."""
    cuda = torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    return {"python": random.getstate(), "torch": torch.get_rng_state(), "cuda": cuda}


def restore_random_states(states: dict[str, Any], device: torch.device) -> None:
    """The inverse of `random_states`, as far as both ran on the same kind of device."""
    random.setstate(states["python"])
    torch.set_rng_state(states["torch"])
    if states["cuda"] is not None and device.type == "cuda":
        torch.cuda.set_rng_state(states["cuda"], device)
