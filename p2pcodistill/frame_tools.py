"""Looking into frames, and turning a stored chain of them into a safetensors file: `p2pcodistill frame`.

Files are only ever read. A store may belong to a running node: nothing in it is locked, mended or removed, and the chain
that is found is the one that was there at that moment. Signatures are not verified, since these are files of one's own disk;
contents are, by the hashes in the manifests and the checksums in the frames.
"""

from __future__ import annotations

import hashlib
import json
import mmap
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TextIO

import msgpack
import torch
from safetensors import SafetensorError
from safetensors.torch import save_file
from torch import Tensor

from p2pcodistill.checkpoint.chain import shortest_chain
from p2pcodistill.checkpoint.decoder import decode_frame, read_codes
from p2pcodistill.checkpoint.entries import TensorEntry
from p2pcodistill.checkpoint.frames import FrameHeader, read_header
from p2pcodistill.checkpoint.manifest import MAX_MANIFEST_BYTES, Manifest, Version, digest_chunk
from p2pcodistill.checkpoint.quantize import ALPHABETS, BLOCK_ELEMENTS, Alphabet
from p2pcodistill.checkpoint.reference import Reference
from p2pcodistill.checkpoint.snapshot import dtype_name, hash_schema
from p2pcodistill.errors import MalformedError, RefusedError, UserError

_SPARE_BYTES = 1 << 30
_MAX_RATIO = 64
_MAX_ATTEMPTS = 3  # at a store from which a running node removes what is superseded


# --- inspect -----------------------------------------------------------------------------------------------------------


def inspect(path: Path, *, as_json: bool, max_bytes: int | None, stream: TextIO) -> int:
    """Print what the frame in `path` says of itself, and what its tensors cost. Raises UserError, OSError."""
    view = _map(path)
    with _named(path):
        description = _describe(view, _default_cap(len(view)) if max_bytes is None else max_bytes)
    if as_json:
        print(json.dumps(description, indent=2), file=stream)
    else:
        _print_description(description, stream)
    return 0


def _describe(view: memoryview, max_bytes: int) -> dict[str, Any]:
    header = read_header(view, max_bytes=max_bytes)
    zero_shares = {
        entry.name: _share_of_zeros(symbols, ALPHABETS[entry.encoding], entry.num_elements)
        for entry, symbols, _ in read_codes(view, max_bytes=max_bytes)
    }
    sizes = _share_out(header)
    joined = {entry.name for bundle in header.bundles if len(bundle.members) > 1 for entry in bundle.members}
    tensors = [
        {
            "name": entry.name,
            "shape": list(entry.shape),
            "dtype": dtype_name(entry.dtype),
            "wire_dtype": dtype_name(entry.wire_dtype),
            "encoding": entry.encoding,
            "num_bytes": sizes[entry.name],
            "is_joined": entry.name in joined,
            "ratio_vs_fp16": _ratio(_num_fp16_bytes(entry), sizes[entry.name]),
            "share_of_zero_codes": zero_shares.get(entry.name),
        }
        for entry in header.entries
    ]
    num_fp16_bytes = sum(_num_fp16_bytes(entry) for entry in header.entries)
    return {
        "format_version": header.version,
        "kind": header.kind,
        "step": header.step,
        "checksum": _hex(header.checksum),
        "base": None if header.base is None else {"step": header.base[0], "checksum": _hex(header.base[1])},
        "schema_hash": _schema_hash(header).hex(),
        "num_tensors": len(header.entries),
        "num_elements": sum(entry.num_elements for entry in header.entries),
        "num_bytes": len(view),
        "num_fp16_bytes": num_fp16_bytes,
        "ratio_vs_fp16": _ratio(num_fp16_bytes, len(view)),
        "tensors": tensors,
        "tied": header.aliases,
    }


def _print_description(description: dict[str, Any], stream: TextIO) -> None:
    base = description["base"]
    facts = {
        "kind": description["kind"],
        "step": description["step"],
        "checksum": description["checksum"],
        "base": None if base is None else f"step {base['step']}, checksum {base['checksum']}",
        "schema": description["schema_hash"],
        "format": description["format_version"],
    }
    for name, value in facts.items():
        if value is not None:
            print(f"{name:<9} {value}", file=stream)
    rows = [("tensor", "shape", "dtype", "encoding", "bytes", "ratio", "zeros")]
    for tensor in description["tensors"]:
        narrowed = tensor["wire_dtype"] != tensor["dtype"]
        rows.append((
            _printable(tensor["name"]),
            "x".join(map(str, tensor["shape"])) or "scalar",
            f"{tensor['dtype']} as {tensor['wire_dtype']}" if narrowed else tensor["dtype"],
            tensor["encoding"],
            f"{'~' if tensor['is_joined'] else ''}{tensor['num_bytes']:,}",
            _shown(tensor["ratio_vs_fp16"], ".2f"),
            _shown(tensor["share_of_zero_codes"], ".1%"),
        ))  # fmt: skip
    total = f"{description['num_tensors']} tensors", f"{description['num_elements']:,}", "", ""
    rows.append((*total, f"{description['num_bytes']:,}", _shown(description["ratio_vs_fp16"], ".2f"), ""))
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    print(file=stream)
    for row in rows:
        cells = [
            cell.ljust(width) if column < 4 else cell.rjust(width)
            for column, (cell, width) in enumerate(zip(row, widths, strict=True))
        ]
        print("  ".join(cells).rstrip(), file=stream)
    if any(tensor["is_joined"] for tensor in description["tensors"]):
        print(
            "~ joined with others: its share, by elements, of the bytes that they take together", file=stream
        )
    for name, target in description["tied"].items():
        print(f"{_printable(name)} is tied to {_printable(target)}", file=stream)


def _share_out(header: FrameHeader) -> dict[str, int]:
    """Bytes of each tensor; those of joined ones shared out by their elements."""
    sizes: dict[str, int] = {}
    for bundle in header.bundles:
        num_left_bytes = bundle.whole.num_wire_bytes
        num_left_elements = sum(entry.num_elements for entry in bundle.members)
        for entry in bundle.members:
            sizes[entry.name] = num_left_bytes * entry.num_elements // max(num_left_elements, 1)
            num_left_bytes -= sizes[entry.name]
            num_left_elements -= entry.num_elements
    return sizes


def _share_of_zeros(symbols: Tensor, alphabet: Alphabet, num_elements: int) -> float:
    """Of the codes of a tensor; what its last block is filled up with does not count."""
    num_digits = alphabet.num_digits
    digits = torch.stack(
        [
            torch.arange(alphabet.num_symbols) // alphabet.base**place % alphabet.base
            for place in range(num_digits)
        ],
        dim=1,
    )
    is_zero = torch.zeros((256, num_digits), dtype=torch.bool)
    is_zero[: alphabet.num_symbols] = digits == alphabet.num_levels
    num_whole = num_elements // BLOCK_ELEMENTS * alphabet.block_symbols
    counts = torch.bincount(symbols[:num_whole], minlength=256)
    num_zeros = int((counts * is_zero.sum(1)).sum())
    rest = is_zero[symbols[num_whole:].long()].view(-1)[: num_elements % BLOCK_ELEMENTS]
    return (num_zeros + int(rest.sum())) / num_elements


def _num_fp16_bytes(entry: TensorEntry) -> int:
    if entry.dtype.is_complex:
        return 4 * entry.num_elements
    return entry.num_elements * (2 if entry.dtype.is_floating_point else entry.dtype.itemsize)


def _schema_hash(header: FrameHeader) -> bytes:
    specs = ((entry.name, dtype_name(entry.dtype), entry.shape) for entry in header.entries)
    return hash_schema(specs, header.aliases)


def _ratio(num_fp16_bytes: int, num_bytes: int) -> float | None:
    return num_fp16_bytes / num_bytes if num_bytes else None


def _shown(value: float | None, layout: str) -> str:
    return "-" if value is None else format(value, layout)


def _printable(name: str) -> str:
    return name if name.isprintable() else ascii(name)


def _hex(checksum: int) -> str:
    return f"{checksum:016x}"


# --- decode ------------------------------------------------------------------------------------------------------------


def decode(
    paths: Sequence[Path], out: Path, *, origin: str | None, max_bytes: int | None, stream: TextIO
) -> int:
    """Write the checkpoint that the frames in `paths` lead to, as a safetensors file with the origin's dtypes.

    `paths` are the files of one chain in any order, or one folder: a site's run folder or its store, of which the newest
    checkpoint of `origin` is taken. Of names that are tied the file has one, and the others in its metadata, as safetensors'
    `load_model` wants it. Raises UserError, OSError.
    """
    if out.exists() and not out.is_file():
        raise UserError(f"{out} is there, and is no file")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} to write to")
    metadata: dict[str, str] = {}
    if any(path.is_dir() for path in paths):
        if len(paths) > 1:
            raise UserError("give the files of one chain, or one folder")
        reference, version = _decode_store(paths[0], origin, max_bytes)
        metadata |= {"origin": str(origin), "incarnation": str(version.incarnation)}
    else:
        if origin is not None:
            raise UserError("--origin goes with a folder: frames do not say who made them")
        reference = _decode_chain(_in_order(paths), max_bytes)
    metadata |= {"step": str(reference.step), "schema_hash": reference.schema_hash.hex()}
    metadata = reference.aliases | metadata
    tensors = {name: tensor.to(reference.dtypes[name]) for name, tensor in reference.tensors.items()}
    _save(tensors, metadata, out)
    num_bytes = sum(tensor.nbytes for tensor in tensors.values())
    print(f"step {reference.step}: {len(tensors)} tensors, {num_bytes:,} bytes, in {out}", file=stream)
    return 0


def _save(tensors: dict[str, Tensor], metadata: dict[str, str], out: Path) -> None:
    staged = out.with_name(out.name + ".part")
    try:
        save_file(tensors, staged, metadata=metadata)
        staged.replace(out)
    except KeyError as error:
        raise UserError(f"cannot write {out}: a safetensors file has no dtype for {error}") from None
    except SafetensorError as error:
        raise UserError(f"cannot write {out}: {error}") from None
    finally:
        staged.unlink(missing_ok=True)


def _in_order(paths: Sequence[Path]) -> list[Path]:
    """The files of a chain, its keyframe first. Raises UserError unless they make exactly one chain."""
    headers: dict[Path, FrameHeader] = {}
    for path in paths:
        if path in headers:
            raise UserError(f"{path} is given twice")
        with _named(path):
            headers[path] = read_header(_map(path), max_bytes=2**63)
    keyframes = [path for path, header in headers.items() if header.base is None]
    if len(keyframes) != 1:
        listed = ", ".join(map(str, keyframes)) or "none"
        raise UserError(f"a chain starts with one keyframe; of these files {listed} are keyframes")
    ordered = keyframes
    while len(ordered) < len(headers):
        last = headers[ordered[-1]]
        following = [
            path
            for path, header in headers.items()
            if header.base == (last.step, last.checksum) and path not in ordered
        ]
        if not following:
            left = next(path for path in headers if path not in ordered)
            base = headers[left].base
            where = f"step {base[0]}, checksum {_hex(base[1])}" if base else "nothing"
            raise UserError(f"{left} is a delta frame of {where}, which none of the other files leads to")
        if len(following) > 1:
            raise UserError(f"{following[0]} and {following[1]} both follow {ordered[-1]}: give one of them")
        ordered.append(following[0])
    return ordered


def _decode_chain(paths: Sequence[Path], max_bytes: int | None) -> Reference:
    cap = _default_cap(sum(path.stat().st_size for path in paths)) if max_bytes is None else max_bytes
    reference: Reference | None = None
    for path in paths:
        with _named(path):
            reference = decode_frame(_map(path), reference, max_bytes=cap)
    assert reference is not None
    return reference


# --- stores ------------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class _Stored:
    """A frame in a store."""

    manifest: Manifest
    path: Path

    @property
    def version(self) -> Version:
        return self.manifest.version

    @property
    def base(self) -> Version | None:
        return self.manifest.base

    @property
    def num_bytes(self) -> int:
        return self.manifest.num_bytes


def _decode_store(folder: Path, origin: str | None, max_bytes: int | None) -> tuple[Reference, Version]:
    store = folder / "store" if (folder / "store").is_dir() else folder
    if not (store / "manifests").is_dir():
        raise UserError(f"{folder} is neither a site's run folder nor its store")
    for attempt in range(_MAX_ATTEMPTS):
        try:
            chain = _find_chain(store, origin)
            return _decode_chain([stored.path for stored in chain], max_bytes), chain[-1].version
        except FileNotFoundError:
            if attempt + 1 == _MAX_ATTEMPTS:
                raise
    raise AssertionError("the loop ends by returning or raising")


def _find_chain(store: Path, origin: str | None) -> list[_Stored]:
    """The frames that lead to the newest checkpoint of `origin`, as they should be, oldest first."""
    frames = _list_store(store)
    own = [stored for stored in frames if stored.manifest.origin == origin]
    if not own:
        held = ", ".join(sorted({stored.manifest.origin for stored in frames})) or "nobody"
        asked = f"{store} has no frames of {origin}," if origin else f"say whose with --origin: {store} has"
        raise UserError(f"{asked} {'but ' if origin else 'frames '}of {held}")
    chain = shortest_chain(own)
    if not chain:
        raise UserError(f"{store} holds no keyframe of {origin}: nothing leads to its frames")
    for stored in chain:
        _check_content(stored)
    return chain


def _list_store(store: Path) -> list[_Stored]:
    """The frames that are there in whole."""
    found = []
    for path in sorted((store / "manifests").glob("*.manifest")):
        frame = store / "frames" / f"{path.stem}.frame"
        try:
            manifest = _read_manifest(path)
        except (FileNotFoundError, RefusedError):  # removed just now, or half-written before a crash
            continue
        if frame.exists():
            found.append(_Stored(manifest, frame))
    return found


def _read_manifest(path: Path) -> Manifest:
    with path.open("rb") as file:
        raw = file.read(MAX_MANIFEST_BYTES + 1024)
    try:
        body, _ = msgpack.unpackb(raw, use_list=False, max_array_len=2, max_map_len=0, max_ext_len=0)
    except (ValueError, TypeError, msgpack.UnpackException):
        raise MalformedError(f"{path} is not a stored manifest") from None
    if type(body) is not bytes or hashlib.sha256(body).hexdigest() != path.stem:
        raise MalformedError(f"{path} is not the manifest that its name says")
    return Manifest.from_bytes(body)


def _check_content(stored: _Stored) -> None:
    manifest, view = stored.manifest, _map(stored.path)
    ranges = [manifest.chunk_range(index) for index in range(manifest.num_chunks)]
    digests = [digest_chunk(view[offset : offset + length]) for offset, length in ranges]
    if len(view) != manifest.num_bytes or tuple(digests) != manifest.chunk_digests:
        raise UserError(f"{stored.path} is damaged: it is not what its manifest says")


# --- files -------------------------------------------------------------------------------------------------------------


def _default_cap(num_file_bytes: int) -> int:
    """More than any sensible frames of that size decode to, and less than what a forged one could claim."""
    return _SPARE_BYTES + _MAX_RATIO * num_file_bytes


def _map(path: Path) -> memoryview:
    """The bytes of a file; unmapped when nothing refers to them any more (the traceback of an error may for a while)."""
    with path.open("rb") as file:
        if not path.stat().st_size:
            raise UserError(f"{path} is empty")
        return memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ))


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Say which file it was that is refused."""
    try:
        yield
    except RefusedError as error:
        hint = " (see --max-bytes)" if error.reason == "oversized" else ""
        raise UserError(f"{path}: {error}{hint}") from None
