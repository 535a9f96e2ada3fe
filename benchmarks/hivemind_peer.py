"""hivemind's side of `exchange_vs_hivemind`, in its own venv: `python -m benchmarks.hivemind_peer fetch` prints JSON.

Two processes on loopback: one shares the model of `large_model`, the other fetches it with `load_state_from_peers`, in fp16.
The clock is around that call; they have found each other before. hivemind's links are encrypted by default, as ours are.
"""

from __future__ import annotations

import json
import subprocess
import sys
import time

import hivemind
import torch
from hivemind.averaging import DecentralizedAverager
from hivemind.compression import Float16Compression

from benchmarks.large_model import LargeModel

NUM_WARM_UPS = 1
NUM_EXCHANGES = 5
_PREFIX = "benchmark"


def main(role: str) -> None:
    """`fetch` starts `share`, fetches a few times, and prints one line of JSON."""
    if role == "share":
        share()
        return
    command = [sys.executable, "-m", "benchmarks.hivemind_peer", "share"]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as donor:
        assert donor.stdout is not None
        try:
            seconds, num_parameters = fetch(json.loads(donor.stdout.readline()))
        finally:
            assert donor.stdin is not None
            donor.stdin.close()  # tells it to end, with the processes that it has started
            donor.wait(timeout=60)
    versions = {"version": hivemind.__version__, "torch": torch.__version__}
    print(json.dumps({"seconds": seconds, "num_parameters": num_parameters} | versions), flush=True)


def share() -> None:
    """Have the model, and print the addresses that it is to be had from, until stdin ends."""
    model = LargeModel()
    dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"])
    averager = _make_averager([parameter.data for parameter in model.parameters()], dht)
    print(json.dumps([str(address) for address in dht.get_visible_maddrs()]), flush=True)
    sys.stdin.read()
    averager.shutdown()
    dht.shutdown()


def fetch(addresses: list[str]) -> tuple[list[float], int]:
    """Seconds of each fetch after the warm-up, and how many parameters came."""
    model = LargeModel()
    dht = hivemind.DHT(start=True, host_maddrs=["/ip4/127.0.0.1/tcp/0"], initial_peers=addresses)
    averager = _make_averager([parameter.data for parameter in model.parameters()], dht, shares=False)
    seconds = []
    deadline_s = time.monotonic() + 120
    while len(seconds) < NUM_WARM_UPS + NUM_EXCHANGES:
        start_s = time.monotonic()
        loaded = averager.load_state_from_peers(timeout=60)
        if loaded is None:  # the other's declaration has not arrived yet
            if time.monotonic() > deadline_s:
                raise TimeoutError("hivemind found no peer to load from")
            time.sleep(0.5)
            continue
        seconds.append(time.monotonic() - start_s)
        num_parameters = sum(tensor.numel() for tensor in loaded[1])
    averager.shutdown()
    dht.shutdown()
    return seconds[NUM_WARM_UPS:], num_parameters


def _make_averager(
    tensors: list[torch.Tensor], dht: hivemind.DHT, *, shares: bool = True
) -> DecentralizedAverager:
    return DecentralizedAverager(
        tensors,
        dht,
        prefix=_PREFIX,
        start=True,
        allow_state_sharing=shares,
        state_compression=Float16Compression(),
        target_group_size=2,
    )


if __name__ == "__main__":
    main(sys.argv[1])
