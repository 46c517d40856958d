"""README and docs: commands are parsed and composed, snippets run, links lead somewhere, figures are measured."""

import ast
import itertools
import json
import os
import re
import runpy
import shutil
import subprocess
import sys
from argparse import ArgumentParser
from dataclasses import dataclass

import pytest
import torch
import yaml
from composed import compose, words_of
from dvc.cli import parse_args
from helpers import ROOT, environment
from torch.nn.functional import normalize

from cbml.workspace import Workspace

PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
LINKED = [*PAGES, *sorted(ROOT.glob("reports/reference/*/README.md")), *sorted(ROOT.glob(".github/**/*.md"))]
KINDS = {"sh", "python", "text", "yaml", "diff", "mermaid", "math", "bibtex"}
EXTEND = ROOT / "docs" / "extend.md"


@dataclass(frozen=True)
class Block:
    """A fenced block, its language, and the comment above it: `not run: WHY`, `file: PATH` or `edit: PATH`."""

    page: str
    line: int
    language: str
    text: str
    verb: str
    value: str

    def __str__(self):
        return f"{self.page}:{self.line}"


def blocks_of(page):
    found = re.finditer(
        r"(?:^<!-- (not run|file|edit): ([^\n]+?) -->\n)?^```(\w*)\n(.*?)^```$",
        text := page.read_text(),
        re.MULTILINE | re.DOTALL,
    )
    for match in found:
        verb, value, language, body = match.groups()
        line = text[: match.start(3)].count("\n") + 1
        yield Block(page.relative_to(ROOT).as_posix(), line, language, body, verb or "", value or "")


BLOCKS = [block for page in PAGES for block in blocks_of(page)]
PRESETS = [
    Block(file.relative_to(ROOT).as_posix(), 1, "sh", f"{command}\n", "", "")
    for file in sorted((ROOT / "conf" / "paper").glob("*.yaml"))
    for command in re.findall("^# +(dvc exp run .*)", file.read_text(), re.MULTILINE)
]
SHELL = [block for block in BLOCKS if block.language == "sh"] + PRESETS
COMMANDS = [
    pytest.param(command, id=f"{block}: {command[:50]}")
    for block in SHELL
    if block.page != "docs/extend.md"
    for command in map(str.strip, block.text.splitlines())
    if command
]


class Parsed(BaseException):
    """A script's arguments are fine, and it does nothing more."""


def parse_only(monkeypatch, module, arguments):
    parse = ArgumentParser.parse_args

    def stop(self, *args, **kwargs):
        parse(self, *args, **kwargs)
        raise Parsed

    monkeypatch.setattr(ArgumentParser, "parse_args", stop)
    monkeypatch.setattr(sys, "argv", [module, *arguments])
    monkeypatch.syspath_prepend(ROOT)
    with pytest.raises(Parsed):
        runpy.run_module(module, run_name="__main__")


def check_dvc(words, folder):
    parse_args(words[1:])  # ends the test where an option is unknown
    if words[1:3] == ["exp", "run"]:
        for workspace in compose(words, folder, ROOT / "conf"):
            assert workspace.cells(*workspace.params().dataset)
    cells = Workspace(ROOT, ROOT).cells("glyphs")
    known = {f"train@{cell.name}-glyphs" for cell in cells} | {"download@folder", "download", "train"}
    assert {word for word in words[2:] if re.match(r"(train|download)\b", word)} <= known


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_is_one_that_is_there(command, tmp_path, monkeypatch):
    """Without running it: DVC and the scripts take its options, Hydra composes its settings, make has its target."""
    monkeypatch.chdir(ROOT)
    words = words_of(command.replace(" | grep", " && grep"))
    if words[0] == "dvc":
        check_dvc(words, tmp_path)
    elif words[:2] == ["python", "-m"]:
        parse_only(monkeypatch, words[2], words[3:])
    elif words[0] == "make":
        subprocess.run(["make", "--dry-run", *words[1:]], cwd=ROOT, check=True, capture_output=True)
    elif words[0] == "python":
        assert (ROOT / words[1]).is_file()


@pytest.mark.parametrize("block", SHELL, ids=str)
def test_what_is_not_checked_says_why(block):
    checked = ("dvc", "make", "python")
    other = [line for line in block.text.splitlines() if line.strip() and line.split()[0] not in checked]
    assert block.verb == "not run" or not other


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_is_of_a_kind_that_is_checked(block):
    assert block.language in KINDS
    if block.language in ("yaml", "diff"):
        assert block.verb in ("file", "edit")


SNIPPETS = [block for block in BLOCKS if block.language == "python" and not block.verb]


@pytest.mark.parametrize("block", SNIPPETS, ids=str)
def test_a_snippet_runs(block):
    generator = torch.Generator().manual_seed(0)
    embeddings = normalize(torch.randn(32, 16, generator=generator), dim=1).requires_grad_()
    exec(block.text, {"embeddings": embeddings, "labels": torch.arange(8).repeat_interleave(4)})


@pytest.mark.slow
def test_what_the_page_on_extending_shows_can_be_built(tmp_path):
    """Its files and edits in a copy of the source; its commands composed there, and of each cell a step computed."""
    for name in ("src", "conf", "params.yaml"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        copy = shutil.copytree if (ROOT / name).is_dir() else shutil.copy
        copy(ROOT / name, tmp_path / name)
    blocks = list(blocks_of(EXTEND))
    for block in blocks:
        file = tmp_path / block.value
        if block.verb == "file":
            assert not file.exists()
            file.write_text(block.text)
        elif block.verb == "edit":
            text = file.read_text()
            for old, new in hunks(block.text):
                assert text.count(old) == 1, f"{block}: {old!r} is not in {block.value}, or is there twice"
                text = text.replace(old, new)
            file.write_text(text)
    shown = [line for block in blocks if block.language == "sh" for line in block.text.splitlines()]
    lines = [line for line in shown if line.startswith("dvc exp run")]
    lines += [
        "dvc exp run -S loss=decoded -S 'embedding_dim=[64]'",
        "dvc exp run -S 'backbone=[small,mobilenetv3_small_100]' -S loss=cbml_log",
    ]
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "composed.py", json.dumps(lines)],
        cwd=tmp_path,
        env=environment() | {"PYTHONPATH": os.pathsep.join([str(tmp_path / "src"), str(tmp_path)])},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    trained = [line for line in done.stdout.splitlines() if line.startswith("TRAINED")]
    assert len(trained) == 9
    for wanted in ("-mine-", "-decoded-", "-proxy_anchor-", " digits ", " Small ", " MobileNetV3 ", " Sequential"):
        assert any(wanted in line for line in trained), wanted


def hunks(diff):
    """What is replaced by what: lines of context are kept before those that are added, lines with a minus are not."""
    for old, new in re.findall(r"((?:^[ -].*\n)+)((?:^\+.*\n)+)", diff, re.MULTILINE):
        kept = [line[1:] for line in old.splitlines() if line[0] == " "]
        added = [line[1:] for line in new.splitlines()]
        yield "\n".join(line[1:] for line in old.splitlines()), "\n".join([*kept, *added])


def slug(heading):
    """What GitHub calls a heading's anchor."""
    return re.sub(r"[^\w\- ]", "", heading.strip().lower()).replace(" ", "-")


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_somewhere(page):
    text = re.sub(r"^```.*?^```$", "", page.read_text(), flags=re.MULTILINE | re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"\w+:", link):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), link
        if anchor:
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            assert anchor in map(slug, headings), link


def test_every_page_is_in_the_readme():
    text = (ROOT / "README.md").read_text()
    for page in (ROOT / "docs").glob("*.md"):
        assert f"docs/{page.name}" in text


def test_every_option_is_described():
    text = "".join(page.read_text() for page in PAGES)
    for file in (ROOT / "conf").glob("*/*.yaml"):
        assert file.parent.name == "base" or f"`{file.stem}`" in text, file


CATALOGUE = [
    (name.strip("`"), constants)
    for name, *_, constants in (
        [cell.strip() for cell in line.strip("|").split(" | ")]
        for line in (ROOT / "docs" / "losses.md").read_text().splitlines()
        if re.match(r"\| `\w+` \|.*\|.*\|.*\|$", line)
    )
    if (ROOT / "conf" / "loss" / f"{name.strip('`')}.yaml").is_file() and "`" in constants
]


@pytest.fixture(scope="module")
def losses(tmp_path_factory):
    """The parameters of every loss, as Hydra composes them."""
    folder = tmp_path_factory.mktemp("losses")
    names = ",".join(file.stem for file in (ROOT / "conf" / "loss").glob("*.yaml"))
    next(compose(["-S", f"loss=[{names}]", "-S", "embedding_dim=[432]"], folder, ROOT / "conf"))
    return yaml.safe_load((folder / "params.yaml").read_text())["loss"]


@pytest.mark.parametrize(("name", "constants"), CATALOGUE)
def test_constants_of_the_catalogue_are_those_of_the_options(losses, name, constants):
    shown = re.findall(r"`(\w+)` ([^`,|]+)", constants)
    assert shown
    for parameter, value in shown:
        expected = losses[name][parameter]
        values = expected if isinstance(expected, list) else [expected]
        text = " ".join(f"{each:g}" if isinstance(each, int | float) else each for each in values)
        assert re.match(rf"{re.escape(text)}(?![\w.])", value), (parameter, value, text)


def test_figures_are_those_of_the_reference():
    readme, reference = (ROOT / "README.md").read_text(), ROOT / "reports" / "reference"
    figures = re.findall(r"\d+\.\d ± \d+\.\d", readme)
    tables = (reference / "cub200" / "frozen.md").read_text()
    assert len(figures) == 17 and all(figure in tables for figure in figures)
    rows = [line.split() for line in readme.splitlines() if line.startswith("| resnet18")]
    known = [line.split() for line in (reference / "glyphs" / "tables.md").read_text().splitlines()]
    assert len(rows) == 3 and all(row in known for row in rows)


def test_messages_that_are_explained_are_there():
    """Their first column, between the dots, is what some string of the source says; commands and DVC's are others'."""
    trees = [ast.parse(file.read_text()) for file in (ROOT / "src").rglob("*.py")]
    said = "\n".join(
        node.value
        for tree in trees
        for node in ast.walk(tree)
        if isinstance(node, ast.Constant) and isinstance(node.value, str)
    )
    rows = re.findall(r"^\| (`.*?) \| ", (ROOT / "docs" / "faults.md").read_text(), re.MULTILINE)
    ours = [row for row in rows if not re.search(r"dvc |DVC\)|PyTorch\)|command not found|No module", row)]
    pieces = [piece.strip() for row in ours for text in re.findall("`(.+?)`", row) for piece in text.split("…")]
    assert len(ours) > 20
    assert [piece for piece in pieces if len(piece) > 11 and piece not in said] == []


def test_a_preset_opens_with_its_command():
    for file in (ROOT / "conf" / "paper").glob("*.yaml"):
        comment = "".join(itertools.takewhile(lambda line: line.startswith("#"), file.read_text().splitlines(True)))
        assert f"dvc exp run -S +paper={file.stem}" in comment, file
