"""A user's training script at a steady pace: `exchanges_per_s`, ten steps each, until it is asked to stop."""

import sys
import time

import torch
import torch.nn.functional as F

import p2pcodistill

torch.set_num_threads(1)
step_s = 0.1 / float(sys.argv[1])
model = torch.nn.Sequential(torch.nn.Linear(64, 256), torch.nn.ReLU(), torch.nn.Linear(256, 8))
optimizer = torch.optim.SGD(model.parameters(), lr=0.05)
codistiller = p2pcodistill.join(model)
due_s = time.monotonic()
while not codistiller.stop_requested:
    inputs = torch.randn(16, 64)
    targets = inputs[:, :8].argmax(dim=1)
    logits = model(inputs)
    loss = F.cross_entropy(logits, targets) + codistiller.loss(logits, inputs)
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    codistiller.step()
    due_s = max(due_s + step_s, time.monotonic() - 1.0)
    time.sleep(max(0.0, due_s - time.monotonic()))
codistiller.close()
