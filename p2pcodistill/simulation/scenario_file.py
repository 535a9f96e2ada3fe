"""Reading scenario files, of which one can be a variant of another: `extends = "../private_data.toml"`.

The variant says only what differs. Its tables are laid over those of the other file, key by key; arms with a name that
the other file has are laid over that arm, others come after. Any other list takes the place of the one that was there. Of
several files, `extends = ["../private_data.toml", "sizes.toml"]`, each is laid over those before it; such a file need not
be a scenario by itself.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from p2pcodistill.errors import ConfigError
from p2pcodistill.strict import load_toml

_KEY = "extends"


def load_scenario_table(path: Path) -> dict[str, Any]:
    """The table of the scenario file `path`, laid over those of the files that it extends, if any.

    Raises ConfigError for files that cannot be read, that extend each other, or a key `extends` that names no files.
    """
    return _load(path, ())


def _load(path: Path, variants: tuple[Path, ...]) -> dict[str, Any]:
    table = load_toml(path)
    if _KEY not in table:
        return table
    given = table.pop(_KEY)
    others = given if isinstance(given, list) else [given]
    if not others or not all(isinstance(other, str) and other for other in others):
        raise ConfigError(
            f'{path}: {_KEY} is the path of a scenario file, such as "../pair.toml", or a list of paths, not {given!r}'
        )
    variants = (*variants, path.resolve())
    merged: dict[str, Any] = {}
    for other in others:
        base = path.parent / other
        if base.resolve() in variants:
            raise ConfigError(f"{path}: {_KEY} leads back to {base}: remove it from one of the files")
        try:
            merged = _lay_over(merged, _load(base, variants))
        except ConfigError as error:
            raise ConfigError(f"{path} extends {other}: {error}") from None
    return _lay_over(merged, table)


def _lay_over(base: dict[str, Any], variant: dict[str, Any]) -> dict[str, Any]:
    merged = dict(base)
    for key, value in variant.items():
        below = base.get(key)
        if isinstance(below, dict) and isinstance(value, dict):
            merged[key] = _lay_over(below, value)
        elif key == "arms" and isinstance(below, list) and isinstance(value, list):
            merged[key] = _lay_arms_over(below, value)
        else:
            merged[key] = value
    return merged


def _lay_arms_over(base: list[Any], variant: list[Any]) -> list[Any]:
    names = [_name_of(arm) for arm in base]
    merged = list(base)
    for arm in variant:
        name = _name_of(arm)
        if name is not None and name in names:
            index = names.index(name)
            merged[index] = _lay_over(merged[index], arm)
        else:  # also what is no arm at all: to be refused with all else that is wrong
            merged.append(arm)
    return merged


def _name_of(arm: Any) -> str | None:
    name = arm.get("name") if isinstance(arm, dict) else None
    return name if isinstance(name, str) else None
