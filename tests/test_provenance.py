"""What a result was computed with, and whether that is still the code of today."""

import ast
import importlib.metadata
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from helpers import ROOT
from loss_options import OPTIONS, option, parse_option
from torch import nn

from cbml import provenance
from cbml.samplers.classes import ClassesConfig

CODE = '''"""What it is."""

import math


class Circle:
    """Round."""

    def area(self, radius):  # of a disc
        """Its content.

        # Not a comment, but not code either.
        """
        text = "# not a comment"

        return text, math.pi * radius**2
'''


@pytest.fixture
def source(tmp_path, monkeypatch):
    """A package of one module; what it returns gives the module another text and tells its hash."""
    package = tmp_path / "package"
    package.mkdir()
    monkeypatch.setattr(provenance, "SOURCE", package)

    def hash_of(text):
        (package / "circle.py").write_text(text)
        return provenance.code_hash(package / "circle.py")

    return hash_of


SAME = {
    "another comment": ("# of a disc", "# of that radius, and no other"),
    "no comment": ("  # of a disc", ""),
    "a comment more": ("        return", "        # The formula of Archimedes.\n        return"),
    "another docstring": ('"""Round."""', '"""A circle.\n\n    As round as can be.\n    """'),
    "no docstring of the module": ('"""What it is."""\n', ""),
    "blank lines": ("\n\n\nclass", "\nclass"),
    "no blank line": ('"\n\n        return', '"\n        return'),
}
OTHER = {
    "a number": ("**2", "**3"),
    "a text that looks like a comment": ("# not a comment", "# no comment"),
    "an indentation": ("        return", "    return"),
    "a line less": ("import math\n", ""),
    "a comment that becomes code": ("  # of a disc", "\n        radius = abs(radius)  # of a disc"),
}


@pytest.mark.parametrize("change", SAME)
def test_a_hash_of_code_does_not_change_with_comments_and_docstrings(source, change):
    assert CODE.replace(*SAME[change]) != CODE
    assert source(CODE.replace(*SAME[change])) == source(CODE)


@pytest.mark.parametrize("change", OTHER)
def test_it_changes_with_code(source, change):
    assert CODE.replace(*OTHER[change]) != CODE
    assert source(CODE.replace(*OTHER[change])) != source(CODE)


def test_a_docstring_beside_code_does_not_hide_it(source):
    line = 'class Failure(Exception): """It failed."""; code = {}\n'
    assert source(line.format(1)) != source(line.format(2))


@pytest.fixture(scope="module")
def recorded():
    """The code that cells of several losses, by its name, are trained by."""

    def code_of(name):
        config = parse_option(name)
        sampler = config.batches or ClassesConfig()  # of the module that the sampler is of
        return provenance.training_code(nn.Sequential(nn.Linear(2, 2)), option(name), sampler)

    return {name: code_of(name) for name in EVERY}


@pytest.fixture
def edit(tmp_path, monkeypatch):
    """Add a line to a file of a copy of this package, whose files then count."""
    ignore = shutil.ignore_patterns("__pycache__")
    package = Path(shutil.copytree(provenance.SOURCE, tmp_path / "cbml", ignore=ignore))
    monkeypatch.setattr(provenance, "SOURCE", package)

    def add(name, line="MENDED = True"):
        with (package / name).open("a") as file:
            file.write(f"\n{line}\n")

    return add


EVERY = ("cbml_log", "mic", "abier", "cbml_clusters")
EDITS = {
    "losses/methods/adversarial.py": ("mic", "abier"),  # a function of it, and an autograd class
    "losses/methods/mic.py": ("mic",),
    "losses/cbml.py": ("cbml_log", "cbml_clusters"),
    "samplers/clusters.py": ("cbml_clusters",),
    "samplers/kmeans.py": ("mic", "cbml_clusters"),
    **dict.fromkeys(("evaluation/embedding.py", "evaluation/metrics.py", "stages/train.py", "data/lists.py"), EVERY),
    **dict.fromkeys(("models/weights.py", "models/heads.py", "training/loop.py", "network.py"), EVERY),
    **dict.fromkeys(("stages/inputs.py", "data/open.py"), EVERY),
    **dict.fromkeys(("stages/draw.py", "report/cell/page.py", "evaluation/similarities.py", "progress.py"), ()),
    **dict.fromkeys(("data/sources/sop.py", "losses/__init__.py", "tracking/store.py", "spec/params.py"), ()),
}


@pytest.mark.parametrize("file", EDITS)
def test_an_edit_makes_those_cells_stale_that_it_takes_part_in(recorded, edit, file):
    edit(file, "# A comment.")
    assert not any(map(provenance.changed, recorded.values()))
    edit(file)
    stale = {name: provenance.changed(code) for name, code in recorded.items()}
    assert stale == {name: [file] if name in EDITS[file] else [] for name in recorded}


SCORES = ("evaluation/similarities.py", "data/images.py", "models/embedding_model.py", "stages/inputs.py", "network.py")


@pytest.mark.parametrize("file", SCORES)
def test_an_edit_of_what_scores_a_cell_is_known(edit, file):
    before = provenance.scoring_code()
    edit("report/cell/page.py")
    edit("samplers/clusters.py")
    assert provenance.changed(before) == []
    edit(file)
    assert provenance.changed(before) == [file]


def test_a_module_that_is_imported_from_now_on_is_hashed(edit):
    edit("helper.py", "RATE = 1")
    edit("training/loop.py", "from cbml.helper import RATE")
    assert "helper.py" in provenance.training_code()


def test_imports_are_followed_as_python_follows_them(tmp_path, monkeypatch):
    files = {
        "__init__.py": "",
        "stage.py": "import os\nfrom cbml.room import Chair as Seat, ANY\nfrom cbml import lamp\nimport cbml.door",
        "room/__init__.py": "from .chair import Chair\nfrom cbml.room.table import Table\nANY = Chair | Table",
        "room/chair.py": "def sit():\n    from ..floor import boards",
        "room/table.py": "",
        "floor.py": "import cbml.errors",
        "lamp/__init__.py": "from cbml.lamp.bulb import light",
        "lamp/bulb.py": "",
        "door.py": "from cbml.stage import Seat",  # a circle ends
        "errors.py": "import cbml.room.table",
    }
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(provenance, "SOURCE", tmp_path)
    names = ("stage", "room.chair", "floor", "lamp", "lamp.bulb", "door")
    assert provenance.closure("cbml.stage") == {f"cbml.{name}" for name in names}


def test_no_package_computes_anything_in_its_own_name():
    """Else what `closure` passes by would be code. `__getattr__` is for users: no module here leans on it."""
    assigned = {}
    for file in provenance.SOURCE.rglob("__init__.py"):
        body = ast.parse(file.read_text()).body
        defined = [
            node.name for node in body if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
        ]
        assert set(defined) <= {"__getattr__"}, file
        targets = [node.targets for node in body if isinstance(node, ast.Assign)]
        assigned[file.parent] = {target.id for each in targets for target in each if isinstance(target, ast.Name)}
    for file in provenance.SOURCE.rglob("*.py"):
        module = ".".join(("cbml", *file.relative_to(provenance.SOURCE).with_suffix("").parts))
        for base, name, _ in provenance._imports(module.removesuffix(".__init__")):
            if provenance._definer(base, name) is None:
                assert name in assigned[provenance.SOURCE.joinpath(*base.split(".")[1:])], (file, base, name)


# Of each stage the packages whose code it runs though it does not depend on them.
NOT_ASKED = {
    "download": (),
    "build_lists": (),
    "train": (),
    "evaluate": (),
    "draw": ("cbml.data",),  # reads lists, images and what evaluation left: those it depends on
    "tabulate": (),
}


def file_of(module):
    return module.removeprefix("cbml.").replace(".", "/") + ".py"


@pytest.mark.parametrize("stage", NOT_ASKED)
def test_all_code_of_a_stage_is_a_dependency_or_hashed(stage):
    """`train` depends on no code: what it hashes is a dependency of `tabulate`, which tells of a change."""
    entry = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"][stage]
    deps = {dep for dep in entry.get("do", entry)["deps"] if dep.startswith("src/")}
    assert all((ROOT / dep).exists() for dep in deps) and bool(deps) == (stage != "train")

    def is_dependency(file):
        return any(f"src/cbml/{file}/".startswith(f"{dep}/") for dep in deps)

    hashed = {"train": provenance.training_code(), "evaluate": provenance.scoring_code()}.get(stage, {})
    needed = provenance.closure(f"cbml.stages.{stage}", neutral=(*provenance.NEUTRAL, *NOT_ASKED[stage]))
    assert needed and not [file for file in map(file_of, needed) if not (is_dependency(file) or file in hashed)]
    if stage == "evaluate":  # whose own code is hashed, too: the lines above hold without these
        assert all(
            map(is_dependency, ("data/open.py", "evaluation/metrics.py", "stages/evaluate.py", "stages/inputs.py"))
        )
    if stage == "tabulate":
        samplers = {file_of(module) for module in sys.modules if module.startswith("cbml.samplers.")}
        every = {*provenance.training_code(*map(option, OPTIONS)), *provenance.scoring_code(), *samplers}
        assert len(every) > 40 and not [file for file in every if not is_dependency(file)]


def test_changed_names_the_files_that_are_not_what_they_were():
    code = provenance.training_code()
    assert provenance.changed(code) == []
    other = code | {"network.py": "0" * 12, "losses/gone.py": "1" * 12}
    assert provenance.changed(other) == ["network.py", "losses/gone.py"]


@pytest.mark.parametrize(
    "name", ["../../pyproject.toml", "/etc/hostname", "losses", "", "a\0b", "../cbml2/x.py", "x" * 300]
)
def test_a_name_that_is_no_file_of_the_package_is_not_read(name):
    """It comes from a run.json, which may be somebody else's."""
    assert provenance.changed({name: "0" * 12}) == [name]
    assert provenance.changed({name: "absent"}) == []


def test_a_file_that_is_not_python_is_another():
    assert provenance.changed({"report/tables/paper_tables.csv": "0" * 12}) == ["report/tables/paper_tables.csv"]


def test_code_that_is_reached_through_a_link_is_hashed_all_the_same(tmp_path):
    (tmp_path / "link").symlink_to(ROOT / "src")
    script = "from cbml.provenance import training_code; print(training_code()['network.py'])"
    done = subprocess.run(
        [sys.executable, "-c", script],
        env=os.environ | {"PYTHONPATH": str(tmp_path / "link")},
        capture_output=True,
        text=True,
        check=True,
    )
    assert done.stdout.strip() == provenance.training_code()["network.py"] != "absent"


def test_a_revision_is_a_commit_and_says_whether_the_code_differs(tmp_path, monkeypatch):
    source = tmp_path / "src" / "cbml"
    source.mkdir(parents=True)
    monkeypatch.setattr(provenance, "SOURCE", source)
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path.parent))
    assert provenance.revision() == "unknown"  # no repository
    git = ["git", "-c", "user.name=x", "-c", "user.email=x@x"]
    for file in (source / "loop.py", tmp_path / "params.yaml"):
        file.write_text("one")
    for words in (["init", "-q"], ["add", "-A"], ["commit", "-qm", "x"]):
        subprocess.run([*git, *words], cwd=tmp_path, check=True)
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert provenance.revision() == commit.stdout[:12]
    (tmp_path / "params.yaml").write_text("two")  # as DVC does before every experiment
    (tmp_path / "dvc.lock").write_text("new")
    assert provenance.revision() == commit.stdout[:12]
    (source / "mine.py").write_text("new")
    assert provenance.revision() == f"{commit.stdout[:12]}-dirty"
    (source / "mine.py").unlink()
    (source / "loop.py").write_text("two")
    assert provenance.revision() == f"{commit.stdout[:12]}-dirty"
    monkeypatch.setenv("PATH", str(tmp_path))  # no git
    assert provenance.revision() == "unknown"


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    """A function that makes a repository of a folder, and another that puts this source into a folder."""
    monkeypatch.setenv("GIT_CEILING_DIRECTORIES", str(tmp_path))

    def repository(folder):
        folder.mkdir(parents=True, exist_ok=True)
        (folder / "README").write_text("x")
        for words in (
            ["init", "-q"],
            ["add", "-A"],
            ["-c", "user.name=x", "-c", "user.email=x@x", "commit", "-qm", "x"],
        ):
            subprocess.run(["git", *words], cwd=folder, check=True)
        words = ["git", "rev-parse", "--short=12", "HEAD"]
        return subprocess.run(words, cwd=folder, check=True, capture_output=True, text=True).stdout.strip()

    def source(folder):
        (folder / "src" / "cbml").mkdir(parents=True)
        (folder / "pipeline").mkdir()
        for file in (folder / "src" / "cbml" / "loop.py", folder / "pipeline" / "train.py"):
            file.write_text("one")
        monkeypatch.setattr(provenance, "SOURCE", folder / "src" / "cbml")

    return repository, source


def test_a_commit_of_another_repository_is_not_that_of_this_source(tmp_path, checkout):
    repository, source = checkout
    repository(tmp_path / "theirs")
    source(tmp_path / "theirs" / "unpacked")
    assert provenance.revision() == "unknown"


@pytest.mark.parametrize("file", ["src/cbml/loop.py", "src/other.py", "pipeline/train.py"])
def test_an_edit_is_seen_in_a_repository_of_several_projects(tmp_path, checkout, file):
    repository, source = checkout
    source(tmp_path / "mono" / "projects" / "cbml")
    commit = repository(tmp_path / "mono")
    (tmp_path / "mono" / "src").mkdir()
    (tmp_path / "mono" / "src" / "theirs.py").write_text("of another project")
    assert provenance.revision() == commit
    (tmp_path / "mono" / "projects" / "cbml" / file).write_text("two")
    assert provenance.revision() == f"{commit}-dirty"


@pytest.mark.parametrize("named", ["theirs/.git", "no-such/.git", ".git"])
def test_a_repository_that_the_environment_names_is_another_matter(tmp_path, checkout, monkeypatch, named):
    """As in a hook, and in `git rebase --exec`."""
    repository, source = checkout
    repository(tmp_path / "theirs")
    source(tmp_path / "own")
    commit = repository(tmp_path / "own")
    monkeypatch.setenv("GIT_DIR", named if named == ".git" else str(tmp_path / named))
    assert provenance.revision() == commit


def test_why_git_does_not_answer_is_said_once(tmp_path, checkout, monkeypatch, capsys):
    repository, source = checkout
    source(tmp_path / "own")
    repository(tmp_path / "own")
    monkeypatch.setenv("GIT_TEST_ASSUME_DIFFERENT_OWNER", "1")
    assert provenance.revision() == provenance.revision() == "unknown"
    (line,) = capsys.readouterr().err.splitlines()
    assert "dubious ownership" in line and "git config --global --add safe.directory" in line


def test_a_package_that_is_not_installed_has_no_version():
    assert provenance.packages(("numpy", "no-such-package")) == {"numpy": importlib.metadata.version("numpy")}
    facts = provenance.versions()
    assert {"python", "platform", "cbml", "torch", "mlflow", "dvc"} <= facts.keys() and all(facts.values())
