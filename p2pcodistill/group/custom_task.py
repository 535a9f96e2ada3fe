"""The user's own task: found by its name, and checked against what the loop asks of a task before anything else happens."""

from __future__ import annotations

import importlib
import inspect
from typing import Any

from p2pcodistill.errors import ConfigError


def find_task_class(path: str, protocol: type) -> Any:
    """The class that `package.module:Class` names, which can be called and has the methods of `protocol`.

    The module may lie in the folder in which the command was given, or wherever Python finds it. Raises ConfigError: one
    line that says what is missing.
    """
    module_name, _, name = path.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise ConfigError(
            f"task.task {path!r}: cannot import {module_name!r} ({error}): start the node in its folder, install it, or set "
            "PYTHONPATH"
        ) from None
    except Exception as error:  # whatever the user's code stumbles over
        why = f"{type(error).__name__}: {error}".splitlines()[0]
        raise ConfigError(
            f"task.task {path!r}: {module_name!r} cannot be imported ({why}): mend it"
        ) from None
    try:
        found = getattr(module, name)
    except AttributeError:
        raise ConfigError(f"task.task {path!r}: {module_name!r} has no {name!r}") from None
    if not isinstance(found, type):
        raise ConfigError(f"task.task {path!r}: {name!r} is no class")
    _require_parameters(path, name, found, ["spec"], ["rank", "num_ranks", "device"])
    for method, wanted in _methods_of(protocol).items():
        own = getattr(found, method, None)
        parameters = list(inspect.signature(wanted).parameters)
        if not callable(own):
            raise ConfigError(f"task.task {path!r}: {name!r} has no method {method}({', '.join(parameters)})")
        _require_parameters(path, f"{name}.{method}", own, parameters, [])
    return found


def _methods_of(protocol: type) -> dict[str, Any]:
    """The methods that `protocol` and its bases declare."""
    return {
        name: value
        for base in reversed(protocol.__mro__)
        for name, value in vars(base).items()
        if inspect.isfunction(value) and not name.startswith("_")
    }


def _require_parameters(path: str, name: str, function: Any, positional: list[str], named: list[str]) -> None:
    try:
        inspect.signature(function).bind(*positional, **dict.fromkeys(named))
    except (TypeError, ValueError):
        wanted = ", ".join([*positional, "*", *named] if named else positional)
        raise ConfigError(f"task.task {path!r}: {name!r} does not take ({wanted})") from None
