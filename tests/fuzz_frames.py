"""Mutated bytes against everything that reads bytes of strangers: frames above all, and manifests and messages.

Every mutation must end in a RefusedError or in a correct result; never in another error, a crash, a hang, or memory above
the cap. A mutation is a function of the seed and its number alone, so a failure names the command that repeats it.

    python tests/fuzz_frames.py --num 1000000     (make fuzz)
    python tests/fuzz_frames.py --only 12345      one mutation, in this process
"""

from __future__ import annotations

import argparse
import functools
import json
import math
import mmap
import random
import resource
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zlib
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import blosc2
import msgpack
import numpy as np
import plain_decoder
import torch
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec, standalone

from p2pcodistill.checkpoint.coding import compress_raw, compress_symbols
from p2pcodistill.checkpoint.decoder import decode_frame, read_codes
from p2pcodistill.checkpoint.manifest import Manifest, Version
from p2pcodistill.checkpoint.reference import Reference, raw_bytes
from p2pcodistill.errors import RefusedError
from p2pcodistill.gossip.codec import decode_message, encode_message
from p2pcodistill.gossip.messages import (
    Announce,
    CatchUp,
    Chunk,
    Finished,
    Gone,
    Hello,
    Refusal,
    Want,
)

MAX_BYTES = 4 << 20  # of what a frame decodes to
MAX_MEMORY_BYTES = 64 << 20  # beyond what the process needs for the frames as they are
MAX_ADDRESS_BYTES = 1 << 30
TIME_LIMIT_S = 30  # a mutation; other processes want the cores, too
REPORT_EVERY_S = 2.0
GOLDEN = Path(__file__).parent / "checkpoint" / "golden"

INTS = [0, 1, 2, 3, 255, 256, 1023, 1024, 1025, 4096, 2**16, 2**20, 2**22, 2**22 + 1, 2**23, 2**31 - 1, 2**31, 2**32 - 1,
        2**32, 2**48, 2**53, 2**62, 2**63 - 1, 2**63, 2**64 - 1, -1, -2, -(2**31), -(2**63)]  # fmt: skip
NAMES = ["", "exact", "int8", "lossless", "same", "ternary", "3-bit", "4-bit", "8-bit", "2-bit", "float16", "bfloat16",
         "float32", "float64", "uint8", "int64", "bool", "complex128", "float8_e5m2", "edge", "x" * 513, "é"]  # fmt: skip
HEADS = [b"\xdd\xff\xff\xff\xff", b"\xdc\xff\xff", b"\xdb\xff\xff\xff\xff", b"\xc6\xff\xff\xff\xff", b"\xdf\xff\xff\xff\xff",
         b"\xc9\xff\xff\xff\xff\x01", b"\xc7\xff\x05", b"\x80", b"\xc1", b"\x91" * 600, b"\xdc\x7f\xff", b""]  # fmt: skip


@dataclass(frozen=True)
class Seed:
    """A frame as it should be, and what it is applied to."""

    frame: bytes
    base: Reference | None


@functools.cache
def seeds() -> list[Seed]:
    found = [Seed(path.read_bytes(), None) for path in sorted(GOLDEN.glob("v*/keyframe-*.frame"))]
    for folder in sorted(GOLDEN.glob("v*")):
        held = None
        for path in sorted(folder.glob("chain-*.frame")):
            found.append(Seed(path.read_bytes(), held))
            held = decode_frame(path.read_bytes(), copy_of(held), max_bytes=MAX_BYTES)
    return found


def copy_of(reference: Reference | None) -> Reference | None:
    if reference is None:
        return None
    tensors = {name: tensor.clone() for name, tensor in reference.tensors.items()}
    return Reference(
        reference.step, tensors, dict(reference.dtypes), dict(reference.aliases), reference.checksum
    )


# --- frames taken apart ------------------------------------------------------------------------------------------------


@dataclass
class Parts:
    """A frame's footer as lists, and the pieces of each of its tensors; the footer's sizes need not be theirs."""

    first: list[Any]
    entries: list[list[Any]]
    aliases: list[list[Any]]
    pieces: list[list[bytes]]
    version: int = 3

    def say_sizes(self) -> None:
        """Make the footer agree with the pieces."""
        for entry, pieces in zip(self.entries, self.pieces, strict=True):
            entry[5] = [len(piece) for piece in pieces]

    def say_numbers(self) -> None:
        """Make the footer's numbers of tensors and of tied names agree with what follows."""
        self.first[3:] = [len(self.entries), len(self.aliases)]


def split(frame: bytes) -> Parts:
    (version,), (num_footer_bytes,) = (struct.unpack_from("<I", frame, at) for at in (4, len(frame) - 8))
    footer = frame[-8 - num_footer_bytes : -8]
    unpacker = msgpack.Unpacker()
    unpacker.feed(footer if version == 2 else zlib.decompress(footer))
    first, *rest = unpacker
    parts = Parts(first, rest[: first[3]], rest[first[3] :], [], version)
    offset = 8
    for entry in parts.entries:
        own = []
        for size in entry[5]:
            own.append(frame[offset : offset + size])
            offset += size
        parts.pieces.append(own)
    return parts


def join(parts: Parts) -> bytes:
    footer = b"".join(msgpack.packb(part) for part in (parts.first, *parts.entries, *parts.aliases))
    return wrap(b"".join(piece for own in parts.pieces for piece in own), footer, parts.version)


def wrap(body: bytes, footer: bytes, version: int = 3) -> bytes:
    if version > 2:
        footer = zlib.compress(footer, 9)
    return struct.pack("<4sI", b"P2PF", version) + body + footer + struct.pack("<I4s", len(footer), b"P2PF")


# --- mutations of bytes ------------------------------------------------------------------------------------------------


def flip(rng: random.Random, data: bytearray) -> None:
    for _ in range(rng.choice([1, 1, 2, 8])):
        if data:
            data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)


def cut(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    del data[start : rng.choice([start + 1, start + rng.randrange(100), len(data)])]


def insert(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = rng.choice([rng.randbytes(rng.randrange(40)), bytes(8), rng.choice(HEADS)])


def repeat(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    data[start:start] = data[start : start + rng.randrange(500)]


def overwrite(rng: random.Random, data: bytearray) -> None:
    start = rng.randrange(len(data) + 1)
    number = rng.choice(INTS) % 2**64
    new = rng.choice([rng.choice(HEADS), number.to_bytes(8, "little"), (number % 2**32).to_bytes(4, "little"),
                      (number % 256).to_bytes(1, "little"), b"\xcf" + number.to_bytes(8, "big")])  # fmt: skip
    data[start : start + len(new)] = new


def splice(rng: random.Random, data: bytearray) -> None:
    other = rng.choice(seeds()).frame
    start = rng.randrange(len(data) + 1)
    data[start:] = other[rng.choice([min(start, len(other)), rng.randrange(len(other))]) :]


BYTE_MUTATIONS = [flip, flip, cut, insert, repeat, overwrite]


def mutate_bytes(rng: random.Random, data: bytes) -> bytes:
    mutated = bytearray(data)
    for _ in range(rng.choice([1, 1, 2, 4])):
        rng.choice(BYTE_MUTATIONS)(rng, mutated)
    return bytes(mutated)


# --- mutations of the footer, all the rest being as it should ------------------------------------------------------------


def places(tree: Any) -> list[tuple[list[Any], int]]:
    """Every list and index in nested lists."""
    found = []
    for index, value in enumerate(tree):
        found.append((tree, index))
        if isinstance(value, list):
            found += places(value)
    return found


def any_value(rng: random.Random) -> Any:
    deep: Any = functools.reduce(lambda inner, _: [inner], range(rng.choice([1, 3, 400])), [])
    return rng.choice(
        [rng.choice(INTS), rng.choice(INTS), rng.choice(NAMES), None, True, 1.0, b"raw", [], deep, {}]
    )


def change_field(rng: random.Random, parts: Parts) -> None:
    holder, index = rng.choice(places([parts.first, *parts.entries, *parts.aliases]))
    value = holder[index]
    if type(value) is int and rng.random() < 0.5:
        holder[index] = (value + rng.choice([-1, 1, -1024, 1024, value])) % 2**64
    elif rng.random() < 0.3:
        other, other_index = rng.choice(places(split(rng.choice(seeds()).frame).entries))
        holder[index] = other[other_index]
    else:
        holder[index] = any_value(rng)


def change_encoding(rng: random.Random, parts: Parts) -> None:
    entry = rng.choice(parts.entries)
    entry[rng.choice([1, 2, 4])] = rng.choice(NAMES)


def change_length(rng: random.Random, parts: Parts) -> None:
    holder = rng.choice([holder for holder, _ in places([parts.first, *parts.entries, *parts.aliases])])
    if rng.random() < 0.5:
        holder.append(rng.choice([*holder, any_value(rng)]))
    else:
        holder.pop(rng.randrange(len(holder)))


def move_entries(rng: random.Random, parts: Parts) -> None:
    index, other = rng.randrange(len(parts.entries)), rng.randrange(len(parts.entries))
    match rng.randrange(3):
        case 0:
            parts.entries[index], parts.entries[other] = parts.entries[other], parts.entries[index]
            parts.pieces[index], parts.pieces[other] = parts.pieces[other], parts.pieces[index]
        case 1:
            parts.entries.append([f"copy {index}", *parts.entries[index][1:]])
            parts.pieces.append(list(parts.pieces[index]))
        case 2:
            del parts.entries[index], parts.pieces[index]
    parts.say_numbers()


# --- mutations of pieces; the footer says what is there -------------------------------------------------------------------


def pick_piece(rng: random.Random, parts: Parts) -> tuple[list[bytes], int]:
    own = rng.choice([own for own in parts.pieces if own] or [[b""]])
    return own, rng.randrange(len(own))


def damage_piece(rng: random.Random, parts: Parts) -> None:
    own, index = pick_piece(rng, parts)
    piece = bytearray(own[index])
    start = rng.randrange(min(40, len(piece)) + 1) if rng.random() < 0.5 else rng.randrange(len(piece) + 1)
    for offset in range(start, min(start + rng.choice([1, 1, 2, 8]), len(piece))):
        piece[offset] = rng.choice([rng.randrange(256), piece[offset] ^ 1 << rng.randrange(8), 0, 255])
    own[index] = bytes(piece)


def resize_piece(rng: random.Random, parts: Parts) -> None:
    own, index = pick_piece(rng, parts)
    own[index] = mutate_bytes(rng, own[index])
    parts.say_sizes()


def swap_pieces(rng: random.Random, parts: Parts) -> None:
    own, index = pick_piece(rng, parts)
    other, other_index = pick_piece(rng, rng.choice([parts, split(rng.choice(seeds()).frame)]))
    own[index], other[other_index] = other[other_index], own[index]
    if rng.random() < 0.8:
        parts.say_sizes()


def replace_piece(rng: random.Random, parts: Parts) -> None:
    own, index = pick_piece(rng, parts)
    own[index] = rng.choice([*bombs(), *strange_pieces()])
    parts.say_sizes()


def forge_content(rng: random.Random, parts: Parts) -> None:
    """Other scales, masks or codes, properly compressed: not numbers, at the edge, outside of the alphabet."""
    own, index = pick_piece(rng, parts)
    dtype = rng.choice([np.uint8, np.uint8, np.uint16, np.uint32])
    try:
        numbers = standalone.simple_decompress(own[index])
        numbers = np.zeros(rng.randrange(3), dtype) if numbers is None else numbers.copy()
    except RuntimeError:  # raw
        numbers = np.zeros(rng.choice([1, 2, 128, 1024]), dtype)
    for _ in range(rng.randrange(3)):
        if len(numbers):
            edge = [0, 0x7F80, 0xFF80, 0x7FC0, 0x7F7F, 0xFF7F, 0x8000, 0x0001, 255, 81, 80, 48, 2**32 - 1]
            numbers[rng.randrange(len(numbers))] = rng.choice(edge) % (int(np.iinfo(numbers.dtype).max) + 1)
    own[index] = compress_symbols(numbers)
    parts.say_sizes()


def claim_more(rng: random.Random, parts: Parts) -> None:
    """A tensor that claims a size around the cap, in as many pieces as that needs, each of which expands a lot."""
    index = rng.randrange(len(parts.entries))
    entry = parts.entries[index]
    num_elements = rng.choice([2**20, 2**21, 2**21 + 1, 2**22, 2**23, 2**26, 2**33, rng.randrange(2**24)])
    entry[3] = rng.choice([[num_elements], [num_elements // 2, 2], [0, num_elements], [1, num_elements, 1]])
    if rng.random() < 0.7:
        entry[4] = rng.choice(["exact", "int8", "lossless", "ternary", "3-bit", "4-bit", "8-bit"])
    num_pieces = min(-(-math.prod(entry[3]) // 2**22), 5000)
    per_segment = {"int8": 2, "lossless": 1, "exact": 1, "same": 0}.get(entry[4], 3)
    # The pieces of a tensor of only zeros of that size, mostly.
    num_blocks = -(-min(num_elements, 2**22) // 1024)
    fitting = [zeros_of(num_blocks, np.uint16), zeros_of(num_blocks * 32, np.uint8), zeros_of(0, np.uint8)]
    pool = bombs()
    pieces = fitting * num_pieces if per_segment == 3 and rng.random() < 0.5 else []
    parts.pieces[index] = pieces or [rng.choice(pool) for _ in range(per_segment * num_pieces)]
    parts.say_sizes()


@functools.lru_cache(maxsize=64)
def zeros_of(length: int, dtype: type[np.unsignedinteger[Any]]) -> bytes:
    return compress_symbols(np.zeros(length, dtype))


@functools.cache
def bombs() -> list[bytes]:
    """Small pieces that hold a lot of zeros."""
    raw = [compress_raw(np.zeros(2**exponent, np.uint8), 2) for exponent in (20, 21, 22, 23, 26)]
    return raw + [
        zeros_of(length, dtype) for length in (2**18, 2**21, 2**22) for dtype in (np.uint8, np.uint16)
    ]


@functools.cache
def strange_pieces() -> list[bytes]:
    """What the two libraries can do, and no encoder of frames lets them."""
    numbers = np.tile(np.random.default_rng(0).integers(0, 200, 97), 11)
    pieces = []
    for dtype in (np.uint8, np.uint16, np.uint32, np.int32, np.float16, np.float32, np.uint64):
        for delta in (DeltaSpec.try_lookback(), DeltaSpec.try_consecutive(3), DeltaSpec.auto()):
            for mode in (ModeSpec.auto(), ModeSpec.classic()):
                config = ChunkConfig(
                    mode_spec=mode,
                    delta_spec=delta,
                    paging_spec=PagingSpec.equal_pages_up_to(200),
                    enable_8_bit=True,
                )
                pieces.append(bytes(standalone.simple_compress(numbers.astype(dtype), config)))
    raw = numbers.astype(np.uint8)
    for codec in (blosc2.Codec.BLOSCLZ, blosc2.Codec.LZ4, blosc2.Codec.ZLIB, blosc2.Codec.ZSTD):
        for filters in ([blosc2.Filter.BITSHUFFLE], [blosc2.Filter.SHUFFLE, blosc2.Filter.DELTA], []):
            pieces.append(
                blosc2.compress2(
                    raw, codec=codec, filters=filters, filters_meta=[0] * len(filters), typesize=2
                )
            )
    return pieces


def forge_footer(rng: random.Random, parts: Parts) -> bytes:
    """A footer that is no longer made of whole values, behind a tail that fits."""
    body = b"".join(piece for own in parts.pieces for piece in own)
    footer = b"".join(msgpack.packb(part) for part in (parts.first, *parts.entries, *parts.aliases))
    if rng.random() < 0.004:  # very many tensors of nothing
        first = [1, None, 0, 2**16, 0]
        rows = [[str(index), "bool", "bool", [0], "exact", []] for index in range(rng.choice([2**14, 2**16]))]
        return wrap(b"", b"".join(msgpack.packb(part) for part in (first, *rows)), parts.version)
    if rng.random() < 0.02:
        return wrap(body, b"", parts.version)[: 8 + len(body)] + footer_bomb(rng.choice([16, 23, 26]))
    return wrap(body, mutate_bytes(rng, footer), parts.version)


@functools.cache
def footer_bomb(exponent: int) -> bytes:
    """A small compressed footer of a lot of zeros, and the tail behind it."""
    deflater = zlib.compressobj()
    footer = b"".join(deflater.compress(bytes(2**12)) for _ in range(2 ** (exponent - 12))) + deflater.flush()
    return footer + struct.pack("<I4s", len(footer), b"P2PF")


FOOTER_MUTATIONS = [change_field, change_field, change_field, change_encoding, change_length, move_entries]
PIECE_MUTATIONS = [
    damage_piece,
    damage_piece,
    resize_piece,
    swap_pieces,
    replace_piece,
    forge_content,
    claim_more,
]


def mutate_frame(rng: random.Random, frame: bytes) -> bytes:
    kind = rng.random()
    if kind < 0.15:
        return mutate_bytes(rng, frame)
    if kind < 0.2:
        spliced = bytearray(frame)
        splice(rng, spliced)
        return bytes(spliced)
    parts = split(frame)
    if kind < 0.25:
        return forge_footer(rng, parts)
    mutations: Sequence[Callable[[random.Random, Parts], None]] = (
        FOOTER_MUTATIONS
        if kind < 0.5
        else PIECE_MUTATIONS
        if kind < 0.9
        else FOOTER_MUTATIONS + PIECE_MUTATIONS
    )
    for _ in range(rng.choice([1, 1, 1, 2, 3])):
        try:
            rng.choice(mutations)(rng, parts)
        except (TypeError, ValueError, IndexError, AttributeError):  # an earlier one left nothing to work on
            break
    try:
        return join(parts)
    except ValueError:  # nested too deep for msgpack
        return mutate_bytes(rng, frame)


# --- what must come of it -------------------------------------------------------------------------------------------------


def try_frame(rng: random.Random) -> str:
    seed = rng.choice(seeds())
    frame = mutate_frame(rng, seed.frame)
    max_bytes = rng.choice([MAX_BYTES, MAX_BYTES, MAX_BYTES, 12_000])
    if rng.random() < 0.05:
        for _, symbols, scales in read_codes(frame, max_bytes=max_bytes):
            assert symbols.nbytes <= max_bytes and bool(scales.isfinite().all())
        return "looked into"
    decoded = decode_frame(frame, copy_of(seed.base), max_bytes=max_bytes)
    assert decoded.num_bytes <= max_bytes
    contents = [raw_bytes(tensor).numpy().tobytes() for tensor in decoded.tensors.values()]
    assert plain_decoder.checksum_of(contents) == decoded.checksum
    for tensor in decoded.tensors.values():
        if tensor.is_floating_point():
            assert bool((tensor.float() if tensor.itemsize == 1 else tensor).isfinite().all())
    assert decoded.aliases.keys().isdisjoint(decoded.tensors)
    assert set(decoded.aliases.values()) <= decoded.tensors.keys()
    return "decoded, unchanged" if frame == seed.frame else "decoded, correct"


def mutate_packed(rng: random.Random, packed: bytes) -> bytes:
    """Of bytes that are one msgpack array: other bytes, or other fields."""
    if rng.random() < 0.5:
        return mutate_bytes(rng, packed)
    fields = msgpack.unpackb(packed)
    holder, index = rng.choice(places([fields]))
    holder[index] = any_value(rng)
    return bytes(msgpack.packb(fields))


def try_manifest(rng: random.Random) -> str:
    digests = tuple(bytes([index]) * 32 for index in range(3))
    body = Manifest("run", "berlin", Version(3, 50), rng.choice([None, Version(2, 40)]), "ternary+pco", bytes(32),
                    1000, 40_000, 16 << 10, digests).to_bytes()  # fmt: skip
    manifest = Manifest.from_bytes(mutate_packed(rng, body))
    assert Manifest.from_bytes(manifest.to_bytes()) == manifest
    return "a manifest, consistent"


MESSAGES = [Hello(2, "run", bytes(32), bytes(32), 3, 2), Announce(b"body", bytes(64), 3), Want("ab" * 32, (1, 2, 70000)),
            Chunk("cd" * 32, 7, bytes(100)), Gone("ef" * 32), Finished("berlin", 3, bytes(64)),
            Refusal("replayed", "it is old"), CatchUp(Version(3, 40)), CatchUp(None)]  # fmt: skip


def try_message(rng: random.Random) -> str:
    head, *bulk = encode_message(rng.choice(MESSAGES))
    message = decode_message([mutate_packed(rng, head), *bulk, *([b"more"] if rng.random() < 0.05 else [])])
    assert decode_message(encode_message(message)) == message or message.protocol_version != 2
    return "a message, consistent"


def outcome_of(seed: int, index: int) -> str:
    """What comes of one mutation. Raises whatever is not a refusal."""
    rng = random.Random(f"{seed}/{index}")
    attempt = rng.choices([try_frame, try_manifest, try_message], [90, 5, 5])[0]
    try:
        return attempt(rng)
    except RefusedError as error:
        return type(error).__name__


# --- many of them ---------------------------------------------------------------------------------------------------


def peak_bytes() -> int:
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def work(seed: int, first: int, step: int, last: int, state_path: Path) -> None:
    """Every `step`th mutation, with limits that end the process; a line of JSON now and then."""
    torch.set_num_threads(1)
    for good in seeds():
        decode_frame(good.frame, copy_of(good.base), max_bytes=MAX_BYTES)
    bombs(), strange_pieces()
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MAX_ADDRESS_BYTES
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    baseline = peak_bytes()
    with state_path.open("r+b") as file:
        state = mmap.mmap(file.fileno(), 8)
    counts: Counter[str] = Counter()
    reported, slowest, slowest_index = time.monotonic(), 0.0, first

    def report() -> None:
        record = {
            "counts": counts,
            "extra_bytes": peak_bytes() - baseline,
            "slowest": [slowest, slowest_index],
        }
        print(json.dumps(record), flush=True)

    for index in range(first, last, step):
        struct.pack_into("<q", state, 0, index)
        signal.setitimer(signal.ITIMER_REAL, TIME_LIMIT_S)  # whose signal ends the process
        started = time.monotonic()
        counts[outcome_of(seed, index)] += 1
        ended = time.monotonic()
        if ended - started > slowest:
            slowest, slowest_index = ended - started, index
        if peak_bytes() - baseline > MAX_MEMORY_BYTES:
            raise MemoryError(
                f"mutation {index} took {peak_bytes() - baseline} bytes, over {MAX_MEMORY_BYTES}"
            )
        if ended - reported > REPORT_EVERY_S:
            report()
            reported = ended
    signal.setitimer(signal.ITIMER_REAL, 0)
    report()


def run(seed: int, num: int, num_processes: int) -> int:
    """Share the mutations among processes, show their progress, and say what failed; the exit status."""
    started = time.monotonic()
    with tempfile.TemporaryDirectory() as folder:
        workers = []
        for first in range(num_processes):
            state_path = Path(folder) / str(first)
            state_path.write_bytes(struct.pack("<q", -1))
            arguments = [seed, first, num_processes, num, state_path]
            command = [sys.executable, __file__, "--work", *map(str, arguments)]
            workers.append((subprocess.Popen(command, stdout=subprocess.PIPE, text=True), state_path))
        newest = [json.loads('{"counts": {}, "extra_bytes": 0, "slowest": [0, 0]}') for _ in workers]
        status = 0
        running = list(zip(range(num_processes), workers, strict=True))
        while running:
            for place, (worker, state_path) in list(running):
                assert worker.stdout is not None
                if line := worker.stdout.readline():
                    newest[place] = json.loads(line)
                    continue
                running.remove((place, (worker, state_path)))
                if worker.wait() != 0 and status == 0:
                    status = 1
                    (index,) = struct.unpack("<q", state_path.read_bytes())
                    why = (
                        f"no end after {TIME_LIMIT_S} s"
                        if worker.returncode == -signal.SIGALRM
                        else "see above"
                    )
                    again = f"{Path(__file__).name} --seed {seed} --only {index}"
                    print(f"FAILED (status {worker.returncode}: {why}); again: {again}")
                    for _, (other, _) in running:
                        other.terminate()
            show(newest, num, time.monotonic() - started, end="\r" if sys.stdout.isatty() else "\n")
    show(newest, num, time.monotonic() - started, end="\n")
    totals = sum((Counter(record["counts"]) for record in newest), Counter[str]())
    for name, count in totals.most_common():
        print(f"{count:>10,}  {name}")
    slowest, index = max(record["slowest"] for record in newest)
    print(
        f"{max(record['extra_bytes'] for record in newest) / 1e6:>10.1f}  MB at most beyond what good frames take"
    )
    print(f"{slowest:>10.3f}  s at most (mutation {index})")
    if status == 0 and totals.total() != num:
        print(f"FAILED: {totals.total()} of {num} mutations were tried")
        status = 1
    return status


def show(newest: list[dict[str, Any]], num: int, elapsed_s: float, *, end: str) -> None:
    num_done = sum(sum(record["counts"].values()) for record in newest)
    print(f"{num_done:,} of {num:,} mutations, {elapsed_s:.0f} s", end=end, flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.split("\n", 1)[0])
    parser.add_argument("--num", type=int, default=1_000_000, help="how many mutations")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--processes", type=int, default=2)
    parser.add_argument(
        "--only", metavar="INDEX", type=int, help="try this mutation alone, and show its error"
    )
    parser.add_argument("--work", nargs=5, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.work:
        *numbers, state_path = options.work
        work(*map(int, numbers), Path(state_path))
        return 0
    if options.only is not None:
        print(outcome_of(options.seed, options.only))
        return 0
    return run(options.seed, options.num, options.processes)


if __name__ == "__main__":
    sys.exit(main())
