"""Pages that need nothing else: templates filled in, with everything that comes from outside escaped."""

from __future__ import annotations

from importlib import resources
from typing import Any

import jinja2


def render(template: str, **values: Any) -> str:
    """The page that `template`, a file beside this one, makes of `values`. All that it names have to be there."""
    return _environment().get_template(template).render(**values)


def _environment() -> jinja2.Environment:
    return jinja2.Environment(
        loader=jinja2.FunctionLoader(_read),
        autoescape=True,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )


def _read(name: str) -> str:
    return resources.files("p2pcodistill.report").joinpath(name).read_text(encoding="utf-8")
