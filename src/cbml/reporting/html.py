"""Pages that stand alone: nothing is loaded, light and dark, narrow and wide."""

import base64
import re
from html import escape
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

ENVIRONMENT = Environment(
    loader=PackageLoader("cbml.reporting"),
    autoescape=True,
    undefined=StrictUndefined,
    trim_blocks=True,
    lstrip_blocks=True,
)


def render(template: str, **context: Any) -> str:
    """A page from its template, `templates/<template>.html`."""
    return ENVIRONMENT.get_template(f"{template}.html").render(context)


def figure(file: Path, caption: str) -> dict[str, Any]:
    """What the macro `figure` takes for a picture: a file is put into the page."""
    if file.suffix == ".svg":
        return {"picture": svg(file.read_text(), file.stem, caption), "caption": caption}
    data = base64.b64encode(file.read_bytes()).decode()
    with Image.open(file) as image:
        size = f'width="{image.width}" height="{image.height}"'  # else what follows jumps when the picture appears
    source = f"data:image/jpeg;base64,{data}"
    return {
        "picture": Markup(f'<img src="{source}" alt="{escape(caption)}" {size} loading="lazy">'),
        "caption": caption,
    }


def svg(text: str, name: str, caption: str) -> Markup:
    """An `<svg>` element as part of a page; `name`, which no other figure of the page has, makes its ids unique."""
    text = text[text.index("<svg") :]
    text = re.sub(r'\bid="', f'id="{name}-', text)
    text = re.sub(r'(url\(|href=")#', rf"\1#{name}-", text)
    return Markup(text.replace("<svg", f'<svg role="img" aria-label="{escape(caption)}"', 1))
