"""`exchange_overhead`: what exchange costs the training loop, with real nodes on both sides of a real link.

Two nodes on loopback run the worker below on the demo's model. Blocks of one exchange interval alternate: in one,
`codistiller.step()` is called after each update (a snapshot is published in its middle, the peer's newer checkpoint arrives
and is swapped in); in the other it is not, so that the teachers are frozen. Both blocks run the teacher, and the nodes run
throughout. The figure is the median over pairs of (seconds frozen / seconds with exchange), which is steps/s with exchange
over steps/s without.
"""

from __future__ import annotations

import json
import statistics
import sys
import tempfile
import time
from pathlib import Path

from benchmarks.figure import print_figure
from benchmarks.site_pair import SITES, run_nodes, write_node_files

NUM_PAIRS = 24
BLOCK_STEPS = 50
MIN_RATIO = 0.98


def main() -> None:
    """Start both nodes, wait for their workers' measurements, print the figure."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        # The worker counts only the steps of blocks with exchange: a snapshot is due in the middle of each.
        codistillation = {"burn_in_steps": 0, "exchange_interval_steps": BLOCK_STEPS}
        write_node_files(folder, "benchmarks.exchange_overhead", {"codistillation": codistillation})
        run_nodes(folder, timeout_s=1800)
        results = [json.loads((folder / f"{site}.json").read_text()) for site in SITES]
    ratios = [ratio for result in results for ratio in result["ratios"]]
    value = statistics.median(ratios)
    quartiles = statistics.quantiles(ratios, n=4)
    print_figure(
        "exchange_overhead",
        round(value, 4),
        "steps/s with exchange / with teachers frozen",
        f"at least {MIN_RATIO}",
        holds=value >= MIN_RATIO,
        on=f"two nodes on loopback, byte-level LSTM 2 x 256, {results[0]['device']}, {NUM_PAIRS} pairs of blocks of "
        f"{BLOCK_STEPS} steps a site, one exchange a block",
        quartiles=[round(quartiles[0], 4), round(quartiles[2], 4)],
        num_pairs=len(ratios),
        num_swaps=[result["num_swaps"] for result in results],
        exchange_stall_ratio=round(max(result["stall_ratio"] for result in results), 5),
    )


def worker() -> None:
    """The training script: warm up until a teacher is there, then measure pairs of blocks and write them down."""
    import torch
    from torch import Tensor

    import p2pcodistill
    from p2pcodistill.codistill.teachers import map_tensors
    from p2pcodistill.group.exchange import read_group_spec
    from p2pcodistill.group.task import load_task
    from p2pcodistill.group.train import choose_device, choose_precision

    spec = read_group_spec()
    assert spec is not None
    torch.set_num_threads(spec.group.num_threads)
    torch.manual_seed(spec.training.seed)
    device = choose_device(spec.group, num_local_ranks=1, local_rank=0)
    dtype = choose_precision(spec.training, device)
    task = load_task(spec, rank=0, num_ranks=1, device=device)
    model = task.make_model()
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    codistiller = p2pcodistill.join(model, forward=task.forward)
    state = None
    num_swaps, versions = 0, dict(codistiller.teacher_versions)

    def run_block(num_steps: int, *, exchange: bool) -> float:
        nonlocal state, num_swaps, versions
        started_s = time.perf_counter()
        for _ in range(num_steps):
            inputs, targets = task.next_batch()
            with torch.autocast(device.type, torch.bfloat16, enabled=dtype == torch.bfloat16):
                logits, state = task.forward(model, inputs, state)
                loss = task.loss(logits, targets) + codistiller.loss(logits, inputs)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            state = map_tensors(Tensor.detach, state)
            if exchange:
                codistiller.step()
                num_swaps += codistiller.teacher_versions != versions
                versions = dict(codistiller.teacher_versions)
        if device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter() - started_s

    while not codistiller.teacher_versions:
        run_block(BLOCK_STEPS, exchange=True)
    run_block(BLOCK_STEPS - codistiller.num_steps % BLOCK_STEPS + BLOCK_STEPS // 2, exchange=True)
    num_swaps, exchange_s, exchange_blocks_s, ratios = 0, codistiller.exchange_s, 0.0, []
    for index in range(NUM_PAIRS):
        order = (True, False) if index % 2 else (False, True)  # so that a drift of the machine cancels
        seconds = {exchange: run_block(BLOCK_STEPS, exchange=exchange) for exchange in order}
        ratios.append(seconds[False] / seconds[True])
        exchange_blocks_s += seconds[True]
    stall_ratio = (codistiller.exchange_s - exchange_s) / exchange_blocks_s
    result = {"ratios": ratios, "num_swaps": num_swaps, "stall_ratio": stall_ratio, "device": device.type}
    Path(sys.argv[1]).write_text(json.dumps(result))
    codistiller.close()


if __name__ == "__main__":
    main()
