"""What a site remembers of itself and of others besides frames: `site.json` in the store's folder."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path

from p2pcodistill.checkpoint.durable import write_durably
from p2pcodistill.checkpoint.manifest import DIGEST_BYTES
from p2pcodistill.errors import RunFolderError

_FORMAT_VERSION = 1


class SiteRecord:
    """The site's incarnation, and the schema hash pinned for each origin; whatever is saved is durable."""

    def __init__(self, path: Path) -> None:
        """Read `path`, if it is there. Raises RunFolderError when it is damaged, OSError."""
        self._path = path
        self._incarnation, self._pins = _read(path)

    @property
    def incarnation(self) -> int:
        """The incarnation saved last; 0 when none was yet."""
        return self._incarnation

    def save_incarnation(self, incarnation: int) -> None:
        """Remember it. Raises ValueError if it is below the saved one, OSError."""
        if incarnation < self._incarnation:
            raise ValueError(f"incarnation {incarnation} is below the saved {self._incarnation}")
        self._write(incarnation, self._pins)
        self._incarnation = incarnation

    def pinned_schema(self, origin: str) -> bytes | None:
        """The schema hash pinned last for `origin`'s frames; None before the first was."""
        return self._pins.get(origin)

    def pin_schema(self, origin: str, schema_hash: bytes) -> None:
        """Remember the pin in place of any other of `origin`. Raises OSError."""
        if self._pins.get(origin) == schema_hash:
            return
        pins = self._pins | {origin: schema_hash}
        self._write(self._incarnation, pins)
        self._pins = pins

    def _write(self, incarnation: int, pins: Mapping[str, bytes]) -> None:
        record = {
            "format_version": _FORMAT_VERSION,
            "incarnation": incarnation,
            "pinned_schemas": {origin: schema_hash.hex() for origin, schema_hash in sorted(pins.items())},
        }
        write_durably(self._path, (json.dumps(record, indent=2) + "\n").encode())


def _read(path: Path) -> tuple[int, dict[str, bytes]]:
    try:
        record = json.loads(path.read_bytes())
        incarnation = record["incarnation"]
        pins = {origin: bytes.fromhex(text) for origin, text in record["pinned_schemas"].items()}
        if (
            record["format_version"] != _FORMAT_VERSION
            or type(incarnation) is not int
            or incarnation < 0
            or any(len(pin) != DIGEST_BYTES for pin in pins.values())
        ):
            raise ValueError("its values are not what this version writes")
    except FileNotFoundError:
        return 0, {}
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise RunFolderError(
            f"{path} is damaged or was written by another version ({type(error).__name__}: {error}): "
            "remove it to come back as a new incarnation, with no schema pinned"
        ) from None
    return incarnation, pins
