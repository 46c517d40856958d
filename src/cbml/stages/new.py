"""The files of a new loss, method, sampler, dataset or backbone: those of docs/extend.md under another name."""

import re
from pathlib import Path

from cbml.errors import UserError
from cbml.files import write_text

# The section of each kind in docs/extend.md, and what its example is called there.
KINDS = {
    "loss": ("A loss", "mine"),
    "method": ("A method", "decoded"),
    "sampler": ("A sampler", "uniform"),
    "dataset": ("A dataset", "digits"),
    "backbone": ("A backbone", "small"),
}
BLOCK = re.compile(r"^<!-- (file|edit): ([^\n]+?) -->\n```\w*\n(.*?)^```$", re.MULTILINE | re.DOTALL)
HUNK = re.compile(r"((?:^[ -].*\n)+)((?:^\+.*\n)+)", re.MULTILINE)


def new(kind: str, name: str, root: Path) -> list[str]:
    """Write the files of the example of that kind, and make its edits, called `name`.

    Args:
        root: of the checkout.

    Returns:
        What was written, and what is to be edited by hand, in lines.

    Raises:
        UserError: `name` is no name for a module, or a file is there already.
    """
    title, example = KINDS[kind]
    if not re.fullmatch("[a-z][a-z0-9_]*", name):
        raise UserError(f"{name}: no name for a {kind}; allowed: small letters, digits and _, a letter first")
    guide = (root / "docs" / "extend.md").read_text(encoding="utf-8")
    section = re.split("^## ", guide, flags=re.MULTILINE)
    blocks = BLOCK.findall(next(part for part in section if part.startswith(f"{title}\n")))
    blocks = [(verb, root / renamed(path, example, name), renamed(text, example, name)) for verb, path, text in blocks]
    files = {file: text for verb, file, text in blocks if verb == "file" and file.stem == name}  # the page has more
    if there := [str(file.relative_to(root)) for file in files if file.exists()]:
        raise UserError(f"{', '.join(there)}: exists; choose another name")
    lines = []
    for file, text in files.items():
        write_text(file, text)
        lines.append(f"wrote {file.relative_to(root)}")
    for file, text in ((file, text) for verb, file, text in blocks if verb == "edit"):
        content = edited(file.read_text(encoding="utf-8"), text)
        if content:
            write_text(file, content)
        place = file.relative_to(root)
        lines.append(f"edited {place}" if content else f"edit {place} by hand, which was changed before:\n{text}")
    return lines


def renamed(text: str, example: str, name: str) -> str:
    """The text with the example's name replaced: of modules, types and classes, not as a word of a sentence."""
    text = re.sub(rf"(?<![a-z] )\b{example}\b", name, text)
    return re.sub(rf"\b{example.title()}(?=Config\b|\b)", name.title().replace("_", ""), text)


def edited(content: str, diff: str) -> str | None:
    """The content of a file after a diff, of which lines of context are kept; None if it does not fit."""
    for old, added in HUNK.findall(diff):
        lines = old.splitlines()
        kept = [line[1:] for line in lines if line[0] == " "]
        before = "\n".join(line[1:] for line in lines)
        if content.count(before) != 1:
            return None
        content = content.replace(before, "\n".join([*kept, *(line[1:] for line in added.splitlines())]))
    return content
