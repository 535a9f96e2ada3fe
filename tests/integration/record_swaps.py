"""A user's training script, as the README shows it: an ordinary loop and three lines. Run by the node with several ranks.

Each rank writes what it saw to `<folder>/<site>-rank<r>.json`: for every step, the versions of its teachers and the sum of
its parameters.
"""

import json
import sys
import time
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel

import p2pcodistill

torch.set_num_threads(1)
folder, site, num_steps = Path(sys.argv[1]), sys.argv[2], int(sys.argv[3])
dist.init_process_group("gloo")
rank = dist.get_rank()
torch.manual_seed(len(site))
model = DistributedDataParallel(
    torch.nn.Sequential(torch.nn.Linear(8, 16), torch.nn.BatchNorm1d(16), torch.nn.Linear(16, 4))
)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
codistiller = p2pcodistill.join(model)
# It ends soon, and learns from the other site only if that trains at the same time.
(folder / f"{site}-rank{rank}.here").touch()
while len(list(folder.glob("*-rank*.here"))) < 2 * dist.get_world_size():
    time.sleep(0.01)
seen = []
generator = torch.Generator().manual_seed(rank)
for step in range(1, num_steps + 1):
    inputs = torch.randn(16, 8, generator=generator)
    targets = inputs[:, :4].argmax(dim=1)
    logits = model(inputs)
    loss = F.cross_entropy(logits, targets) + codistiller.loss(logits, inputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    codistiller.step()
    total = sum(p.double().sum().item() for p in model.parameters())
    seen.append([step, codistiller.teacher_versions, total])
    if codistiller.stop_requested:
        break
(folder / f"{site}-rank{rank}.json").write_text(json.dumps(seen))
codistiller.close()
dist.barrier()
dist.destroy_process_group()
