"""Pages that stand alone: nothing is loaded, light and dark, narrow and wide."""

import re
from html import escape
from typing import Any

from jinja2 import ChoiceLoader, Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from cbml.report.common.style import RIGHT, WRONG

# Each room has the templates of its own pages, so that a change of one concerns that room alone.
ROOMS = ("common", "cell", "tables", "search")
ENVIRONMENT = Environment(
    loader=ChoiceLoader([PackageLoader("cbml.report", f"{room}/templates") for room in ROOMS]),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)
ENVIRONMENT.globals |= {"right": RIGHT, "wrong": WRONG}


def render(template: str, **context: Any) -> str:
    """A page from its template, `<template>.html`."""
    return ENVIRONMENT.get_template(f"{template}.html").render(context)


def figure(svg: str, name: str, caption: str) -> dict[str, Any]:
    """What the macro `figure` takes: an `<svg>` element, its ids made unique by `name`, which no other figure has."""
    svg = svg[svg.index("<svg") :]
    svg = re.sub(r'\bid="', f'id="{name}-', svg)
    svg = re.sub(r'(url\(|href=")#', rf"\1#{name}-", svg)
    svg = svg.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1)
    return {"picture": Markup(svg), "caption": caption}
