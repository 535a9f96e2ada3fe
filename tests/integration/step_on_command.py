"""Stands in for a training script: `berlin` takes a step for each byte that it reads from a pipe, others as they can.

Each launch leaves its process id in `<site>.pid`.
"""

import os
import sys
from pathlib import Path

import torch

import p2pcodistill

torch.set_num_threads(1)
folder, site = Path(sys.argv[1]), sys.argv[2]
(folder / f"{site}.pid").write_text(str(os.getpid()))
torch.manual_seed(len(site))
model = torch.nn.Linear(64, 64)
codistiller = p2pcodistill.join(model)


def step() -> None:
    with torch.no_grad():
        model.weight += 0.01 * torch.randn_like(model.weight)
    codistiller.step()


if site == "berlin":
    with (folder / "commands").open("rb", buffering=0) as pipe:
        while pipe.read(1):
            step()
else:
    while not codistiller.stop_requested:
        step()
codistiller.close()
