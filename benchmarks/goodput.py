"""`goodput_ratio`: a large frame from one node to another / plain pyzmq that does the same to the same bytes, same run.

The nodes: from the moment a student begins to fetch an announced frame until it is verified and durable in its store.
Plain pyzmq: one process reads the file and sends its pieces from a DEALER, the other takes them at a ROUTER (CURVE on
both), hashes each (BLAKE3) and writes it, and syncs the file in the end. Rounds take turns, and so do two sizes of piece,
of which the better one counts.
"""

from __future__ import annotations

import multiprocessing
import os
import statistics
import tempfile
import time
from multiprocessing.connection import Connection
from pathlib import Path

import zmq
from blake3 import blake3

from benchmarks.bulk import events_of, prepare_nodes, publish, wait_for
from benchmarks.figure import file_system_of, print_figure
from benchmarks.site_pair import SITES, running_nodes

NUM_BYTES = 256 << 20
NUM_ROUNDS = 7
NUM_WARM_UPS = 1
PIECES_BYTES = (256 << 10, 1 << 20)
MIN_RATIO = 0.85
_WINDOW_PIECES = 64
_POLL_S = 0.1
"""Looking takes processor time, which is what this is about; when the frame was there, its event says."""


def main() -> None:
    """Measure and print the figure."""
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        prepare_nodes(folder, NUM_BYTES)
        nodes_s: list[float] = []
        plain_s: dict[int, list[float]] = {piece_bytes: [] for piece_bytes in PIECES_BYTES}
        with running_nodes(folder):
            for number in range(1, NUM_WARM_UPS + NUM_ROUNDS + 1):
                nodes_s.append(_fetch(folder, number))
                for piece_bytes in PIECES_BYTES:
                    plain_s[piece_bytes].append(_send_plainly(folder, piece_bytes))
        file_system = file_system_of(folder)
    node_s = statistics.median(nodes_s[NUM_WARM_UPS:])
    best_s = min(statistics.median(times_s[NUM_WARM_UPS:]) for times_s in plain_s.values())
    value = round(best_s / node_s, 3)
    print_figure(
        "goodput_ratio",
        value,
        "of the rate of plain pyzmq",
        f"at least {MIN_RATIO}",
        holds=value >= MIN_RATIO,
        on=f"{NUM_BYTES >> 20} MiB of random bytes between two nodes on loopback, CURVE, medians of {NUM_ROUNDS} rounds "
        f"that take turns, files on {file_system}",
        nodes_mb_s=round(NUM_BYTES / node_s / 1e6, 1),
        plain_mb_s=round(NUM_BYTES / best_s / 1e6, 1),
        nodes_s=[round(seconds, 3) for seconds in nodes_s],
        plain_s={str(size): [round(s, 3) for s in times_s] for size, times_s in plain_s.items()},
    )


def _fetch(folder: Path, number: int) -> float:
    publish(folder, number)
    fetched = wait_for(
        lambda: events_of(folder / SITES[1], "frame-fetched")[number - 1 :],
        f"frame {number} is fetched",
        poll_s=_POLL_S,
    )
    assert fetched[0]["num_bytes"] == NUM_BYTES
    return float(fetched[0]["duration_s"])


def _send_plainly(folder: Path, piece_bytes: int) -> float:
    server_key, client_key = zmq.curve_keypair(), zmq.curve_keypair()
    context = multiprocessing.get_context("spawn")
    here, there = context.Pipe()
    receiver = context.Process(
        target=_receive, args=(there, folder / "received", piece_bytes, server_key), daemon=True
    )
    receiver.start()
    port = here.recv()
    sender = context.Process(
        target=_send,
        args=(folder / "payload", piece_bytes, port, server_key[0], client_key),
        daemon=True,
    )
    sender.start()
    seconds = float(here.recv())
    sender.join()
    receiver.join()
    (folder / "received").unlink()
    return seconds


def _receive(results: Connection, path: Path, piece_bytes: int, key: tuple[bytes, bytes]) -> None:
    """Take all pieces at a ROUTER; the time from the request for the first one until the file is durable."""
    with zmq.Context() as context, context.socket(zmq.ROUTER) as router:
        router.curve_server, router.curve_publickey, router.curve_secretkey = True, *key
        router.maxmsgsize = piece_bytes + 64
        results.send(router.bind_to_random_port("tcp://127.0.0.1"))
        peer, _ = router.recv_multipart()
        start_s = time.monotonic()
        router.send_multipart([peer, b"go"])
        descriptor, num_bytes = os.open(path, os.O_CREAT | os.O_WRONLY), 0
        while num_bytes < NUM_BYTES:
            _, index, piece = router.recv_multipart()
            blake3(piece).digest()
            os.pwrite(descriptor, piece, int(index) * piece_bytes)
            num_bytes += len(piece)
        os.fsync(descriptor)
        os.close(descriptor)
        results.send(time.monotonic() - start_s)
        router.send_multipart([peer, b"done"])


def _send(path: Path, piece_bytes: int, port: int, server_key: bytes, key: tuple[bytes, bytes]) -> None:
    """Send all pieces from a DEALER, as many at a time as its queue takes."""
    with zmq.Context() as context, context.socket(zmq.DEALER) as dealer, path.open("rb") as file:
        dealer.curve_serverkey = server_key
        dealer.curve_publickey, dealer.curve_secretkey = key
        dealer.sndhwm = _WINDOW_PIECES
        dealer.connect(f"tcp://127.0.0.1:{port}")
        dealer.send(b"ready")
        dealer.recv()
        for index in range(-(-NUM_BYTES // piece_bytes)):
            dealer.send_multipart([b"%d" % index, os.pread(file.fileno(), piece_bytes, index * piece_bytes)])
        dealer.recv()


if __name__ == "__main__":
    main()
