"""Strict, frozen models of what a user writes, and one clear line for everything that is wrong in it.

Unknown keys are errors that name the key and the nearest valid one. The models themselves are in `config`, `task_configs`
and `simulation/scenario.py`.
"""

from __future__ import annotations

import difflib
import json
import tomllib
import typing
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, Tag, ValidationError
from pydantic_core import PydanticCustomError

from p2pcodistill.errors import ConfigError, UserError
from p2pcodistill.identity import check_site_name

MAX_CONFIG_FILE_BYTES = 1 << 20
_MAX_SHOWN_CHARS = 80


class StrictModel(BaseModel):
    """Base of every configuration model: frozen, no unknown keys, no silent conversions."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True, use_attribute_docstrings=True)


def accepted_by(check: Callable[[str], object]) -> BeforeValidator:
    """Refuses the text that `check` does, in its words; what is no text is the model's to refuse."""

    def validate(value: object) -> object:
        try:
            if isinstance(value, str):
                check(value)
        except UserError as error:
            raise PydanticCustomError("user_error", "{why}", {"why": str(error)}) from None
        return value

    return BeforeValidator(validate)


SiteName = Annotated[str, accepted_by(check_site_name)]
PositiveInt = Annotated[int, Field(ge=1)]
NonNegativeInt = Annotated[int, Field(ge=0)]
PositiveFloat = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegativeFloat = Annotated[float, Field(ge=0, allow_inf_nan=False)]


Model = TypeVar("Model", bound=StrictModel)


def load_toml(path: Path) -> dict[str, Any]:
    """The table in the TOML file `path`. Raises ConfigError that names the file."""
    try:
        with path.open("rb") as file:
            raw = file.read(MAX_CONFIG_FILE_BYTES + 1)
    except FileNotFoundError:
        raise ConfigError(f"no such file: {path}") from None
    except OSError as error:
        raise ConfigError(f"cannot read {path}: {error.strerror}") from None
    if len(raw) > MAX_CONFIG_FILE_BYTES:
        raise ConfigError(
            f"{path} is larger than {MAX_CONFIG_FILE_BYTES >> 20} MiB: not a configuration file"
        )
    try:
        return _parse_toml(raw.decode(), source=str(path))
    except UnicodeDecodeError:
        raise ConfigError(f"cannot read {path}: it is not UTF-8 text") from None
    except tomllib.TOMLDecodeError as error:
        raise ConfigError(f"{path} is not valid TOML: {error}") from None


def _parse_toml(text: str, *, source: str) -> dict[str, Any]:
    """Raises TOMLDecodeError, and ConfigError for TOML beyond what Python's parser can take."""
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError:
        raise
    except (RecursionError, ValueError) as error:
        raise _excessive(source, error) from None


def _excessive(source: str, error: RecursionError | ValueError) -> ConfigError:
    match error:
        case RecursionError():
            why = "its values are nested too deeply"
        case UnicodeEncodeError():
            why = "it is not Unicode text"
        case _:  # of Python's own limit on converting between text and integers
            why = "it holds a number with too many digits"
    return ConfigError(f"{source}: {why}")


def parse_model(model: type[Model], table: Mapping[str, Any], *, source: str) -> Model:
    """`table` as a `model`. Raises ConfigError: one line that names `source`, the key and what to write instead."""
    try:
        document = json.dumps(table, default=str, ensure_ascii=False).encode()
    except (RecursionError, ValueError) as error:
        raise _excessive(source, error) from None
    try:
        # Through JSON, so that strict mode takes arrays for tuples and strings for paths, and nothing else.
        return model.model_validate_json(document)
    except ValidationError as error:
        # A misspelt key is also a missing one: name the misspelling.
        first, *others = sorted(error.errors(include_url=False), key=lambda e: e["type"] != "extra_forbidden")
        if first["type"] == "json_invalid":  # it is valid, but pydantic takes fewer levels than `json`
            raise _excessive(source, RecursionError()) from None
        more = f" (and {len(others)} more)" if others else ""
        raise ConfigError(f"{source}: {_describe(model, first)}{more}") from None
    except UserError as error:
        raise ConfigError(f"{source}: {error}") from None


def _describe(model: type[StrictModel], error: Any) -> str:
    location = tuple(error["loc"])
    if error["type"] == "union_tag_invalid":  # of the models that are told apart by their name
        wrong, names = str(error["ctx"]["tag"]), str(error["ctx"]["expected_tags"])
        return (
            f"{'.'.join(map(str, (*location, 'name')))}: there is no {_shorten(wrong)!r}; use one of {names}"
        )
    keys, _ = _keys_of(model, location)
    key = ".".join(keys)
    if error["type"] == "extra_forbidden":
        _, valid = _keys_of(model, location[:-1])
        near = difflib.get_close_matches(str(location[-1]), valid, n=1, cutoff=0.5)
        hint = f"did you mean {near[0]!r}?" if near else f"valid keys are {', '.join(valid)}"
        return f"unknown key {key!r}: {hint}"
    if error["type"] == "missing":
        return f"the key {key!r} is missing"
    message = str(error["msg"]).removeprefix("Value error, ")
    given = error.get("input")
    # This package's own messages show what was given where that helps.
    is_shown = isinstance(given, str | int | float | bool) and error["type"] != "user_error"
    shown = f", got {_shorten(repr(given))}" if is_shown else ""
    return f"{key}: {message[:1].lower()}{message[1:]}{shown}"


def _shorten(text: str) -> str:
    return text if len(text) <= _MAX_SHOWN_CHARS else f"{text[: _MAX_SHOWN_CHARS - 3]}..."


def _keys_of(model: type[BaseModel], location: Sequence[str | int]) -> tuple[list[str], list[str]]:
    """The keys of `location` as a user writes them, and the valid ones of the (nested) model that it leads to.

    Where models are told apart by their name, a location also has that name, which is no key.
    """
    keys: list[str] = []
    current: Any = model
    models: dict[str, type[BaseModel]] = {}
    for part in location:
        if part in models and "" not in models:
            current, models = models[str(part)], {}
            continue
        keys.append(str(part))
        if isinstance(part, str) and part in getattr(current, "model_fields", {}):
            models = _models_in(current.model_fields[part].annotation)
            current = models.get("")
    return keys, list(getattr(current, "model_fields", {}))


def _models_in(annotation: Any) -> dict[str, type[BaseModel]]:
    """The models that `annotation` allows, by the tag that tells them apart ("" where there is none)."""
    if isinstance(annotation, type) and issubclass(annotation, BaseModel):
        return {"": annotation}
    found: dict[str, type[BaseModel]] = {}
    arguments = typing.get_args(annotation)
    tag = next((part.tag for part in arguments if isinstance(part, Tag)), None)
    for argument in arguments:
        for own, model in _models_in(argument).items():
            found.setdefault(tag or own, model)
    return found


def override(table: dict[str, Any], assignments: Sequence[str]) -> dict[str, Any]:
    """`table` with each `dotted.key=value` of the command line's `--set` applied; values are TOML, else plain text.

    `table` stays as it is, and the result shares with it what is the same. Raises ConfigError for an assignment that has
    no `=`, that leads into something that is not a table or whose value is beyond what a configuration can hold.
    """
    result = dict(table)
    for assignment in assignments:
        key, equals, text = assignment.partition("=")
        if not equals or not key.strip():
            raise ConfigError(f"--set takes KEY=VALUE, got {assignment!r}")
        try:
            value = _parse_toml(f"value = {text}", source=f"--set {key.strip()}")["value"]
        except tomllib.TOMLDecodeError:
            value = text
        *parents, last = key.strip().split(".")
        current = result
        for parent in parents:
            inner = current.get(parent, {})
            if not isinstance(inner, dict):
                raise ConfigError(f"--set {key}: {parent!r} is not a table")
            current[parent] = dict(inner)
            current = current[parent]
        current[last] = value
    return result
