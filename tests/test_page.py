"""Pages: complete, self-contained, sortable, fit for a phone; and the same tables for a paper and for DVC."""

import contextlib
import json
import re
import shutil
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import yaml
from cbml.reporting.curves import CURVES, SIMILARITIES, curves, similarities
from cbml.reporting.index import write_index
from cbml.reporting.page import write_cell_page
from conftest import ROOT, tiny_params
from PIL import Image

from cbml.config import load_params
from cbml.errors import UserError
from cbml.figures.style import chart, save_svg
from cbml.reporting import tables
from cbml.reporting.latex import to_latex

ODD = "cbml_<b>&\"log'"
RUN = {
    "finished": "2026-02-03T04:05:06",
    "device": "a <CPU>",
    "train_seconds": 90.0,
    "data_seconds": 0.9,
    "versions": {"python": "3.11"},
}
TEST = {"images": 1140, "classes": 20}


class Page(HTMLParser):
    """The start tags of a page with their attributes, and its text."""

    def __init__(self, path):
        super().__init__()
        self.tags, self.text = [], ""
        self.html = path.read_text()
        self.feed(self.html)

    def handle_starttag(self, tag, attributes):
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data):
        self.text += data

    def all(self, tag):
        return [attributes for name, attributes in self.tags if name == tag]

    def ids(self):
        return [attributes["id"] for _, attributes in self.tags if "id" in attributes]


def evaluate(cell, recall):
    """Write what the evaluation of a cell leaves behind, without pictures."""
    folder = Path("evaluations", cell.dataset, cell.name)
    folder.mkdir(parents=True)
    validations = pd.DataFrame({"iteration": [0, 2, 4, 6], "recall_at_1": [0.1, recall - 0.1, recall + 0.03, recall]})
    validations.to_csv(folder / "validations.csv", index=False)
    scores = {f"recall_at_{k}": recall + 0.02 * i for i, k in enumerate((1, 2, 4, 8))}
    scores |= {"r_precision": recall / 2, "map_at_r": recall / 4, "nmi": 0.5}
    metrics = {
        "final": scores | {"iteration": 6, "queries_without_answer": 3},
        "best_on_test": scores | {"iteration": 4, "recall_at_1": recall + 0.03},
        "untrained": {"iteration": 0.0, "recall_at_1": 0.1},
    }
    (folder / "metrics.json").write_text(json.dumps(metrics))
    bins = np.linspace(-0.9, 0.9, 10)
    rows = [
        pd.DataFrame({"split": split, "pair": pair, "similarity": bins, "density": 0.5})
        for split in ("train", "test")
        for pair in ("positive", "negative")
    ]
    pd.concat(rows).to_csv(folder / "similarities.csv", index=False)
    return folder


def make_cells(*, losses, **axes):
    """Evaluations of these cells in the working directory, the first one's Recall@1 50 %, each next one's 1 % more."""
    options = {name: {"type": "cbml", "form": "log"} for name in losses}
    Path("params.yaml").write_text(yaml.safe_dump(tiny_params(loss=options, **axes), sort_keys=False))
    params = load_params()
    cells = params.cells("glyphs")
    for i, cell in enumerate(cells):
        evaluate(cell, 0.5 + 0.01 * i)
    return cells, tables.summarise(tables.collect(cells), with_published=True)


@pytest.fixture
def table_set(tmp_path, monkeypatch):
    """Eight cells, published figures for half of them, and their table."""
    monkeypatch.chdir(tmp_path)
    return make_cells(losses=["cbml_log", ODD], embedding_dim=[64, 16], seed=[0, 1])


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """The pages of such a table set and of its first cell, with pictures of every kind."""
    with contextlib.chdir(tmp_path_factory.mktemp("pages")):
        cells, table = make_cells(losses=["cbml_log", ODD], embedding_dim=[64, 16], seed=[0, 1])
        table["versus_best"], table["versus_best_low"], table["versus_best_high"] = -1.25, -2.5, 0.5
        table["within_noise"] = [True] + [False] * (len(table) - 1)
        index = Path("reports/index.html").absolute()
        write_index(index, table, cells, dataset="glyphs", test=TEST, runs=[RUN])

        folder = Path("evaluations", "glyphs", cells[0].name).absolute()
        for name in ("training", "similarities"):  # two charts with the same ids
            with chart(2, 2) as (figure, axis):
                axis.plot([0, 1], [0, 1], marker="o")
                save_svg(figure, folder / f"{name}.svg")
        for name in ("gallery.jpg", "failures.jpg", "embedding_map.png"):
            Image.new("RGB", (900, 300), "red").save(folder / name)
        (folder / "cell.yaml").write_text("a: <b>\n")
        classes = "class,images,recall_at_1,confused_with\nLaysan <Albatross>,9,0.25,Crow\nNone,1,,\n"
        (folder / "classes.csv").write_text(classes)
        write_cell_page(folder, cells[0])
    return {"index": index, "cell": folder / "index.html"}


@pytest.fixture(params=["index", "cell"])
def path(request, pages):
    return pages[request.param]


def test_the_index_holds_every_row_and_leads_to_every_cell(pages):
    page = Page(pages["index"])
    rows = [attributes["class"] for attributes in page.all("tr") if attributes.get("class")]
    # Two methods × two sizes, twice; and the paper's six rows for ResNet18 with embeddings of 64.
    assert sorted(rows) == ["best_on_test"] * 4 + ["final"] * 4 + ["published"] * 6
    links = {(pages["index"].parent / attributes["href"]).resolve().parent for attributes in page.all("a")}
    evaluations = pages["cell"].parent.parent
    assert len(links) == 8 and links == set(evaluations.iterdir())
    assert pages["cell"].parent in links
    assert "50.5 ± 0.7" in page.text  # seeds at 50 and 51 %
    assert "paper 61.3 (-10.8)" in page.text
    assert page.text.count("-1.2 [-2.5, +0.5]") == 14 and page.text.count("within noise") == 1
    assert page.text.count("dvc exp run -S dataset=glyphs") == 8 and "seed=[0,1]" in page.text
    assert "device: a <CPU>" in page.text
    assert "1,140 images of 20 classes" in page.text and "not comparable with this part" in page.text
    assert all(tables.PROTOCOLS[name] in page.text for name in rows)


def test_what_the_table_does_not_have_is_not_shown(table_set):
    cells, table = table_set
    ours = table[table.protocol != "published"].drop(columns=table.filter(regex="paper|difference").columns)
    write_index(Path("index.html"), ours, cells, dataset="glyphs", test=TEST, runs=[RUN])
    page = Page(Path("index.html"))
    assert "R@1 untrained" in page.text
    assert not re.search(r"Against the best|paper \d|comparable with", page.text)
    assert len(page.all("svg")) == 2  # curves and similarities, not the paper


def test_nothing_is_loaded(path):
    page = Page(path)
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data"):
            value = attributes.get(name, "")
            assert re.match(r"data:|#|$", value) or (tag == "a" and ":" not in value), (tag, name, value[:80])
    assert not re.search(r"@import|url\((?!#)", page.html)


def test_ids_are_unique_and_what_refers_to_them_finds_them(path):
    page = Page(path)
    assert page.ids() and len(page.ids()) == len(set(page.ids()))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page.html)) <= set(page.ids())


def test_pictures_have_words(path):
    page = Page(path)
    for image in page.all("img"):
        assert image["alt"] and image["loading"] == "lazy" and image["width"] and image["height"]
    for svg in page.all("svg"):
        assert svg["role"] == "img" and svg["aria-label"]
    assert len(page.all("img")) == (3 if path.parent.name != "reports" else 0)
    assert page.all("svg")


def test_every_column_can_be_sorted_by_keyboard(path):
    page = Page(path)
    columns = [attributes for attributes in page.all("th") if attributes["scope"] == "col"]
    assert columns and all(attributes["aria-sort"] == "none" for attributes in columns)
    in_headers = re.findall(r'<th scope="col"[^>]*><button type="button">', page.html)
    assert len(in_headers) == len(columns)


def test_names_are_text_not_html(path):
    page = Page(path)
    name = ODD if path.parent.name == "reports" else "Laysan <Albatross>"
    assert name in page.text
    assert not page.all("b") and not page.all("albatross")


def test_a_cells_page_says_what_its_files_say(pages):
    text = Page(pages["cell"]).text
    assert "resnet18-cbml_log-64-0" in text and "embeddings of 64" in text
    assert "50.0" in text and "53.0" in text  # R@1, final and best on test
    assert "3 queries have no other image" in text
    assert "Laysan <Albatross>925.0Crow" in text
    assert "None1–" in text  # a class named None, without an answer


def test_a_cells_page_needs_its_metrics_alone(table_set):
    cells, _ = table_set
    folder = Path("evaluations", "glyphs", cells[0].name)
    for file in folder.glob("*.csv"):
        file.unlink()
    write_cell_page(folder, cells[0])
    page = Page(folder / "index.html")
    assert not page.all("figure") and "Classes" not in page.text
    (folder / "metrics.json").unlink()
    with pytest.raises(UserError, match="evaluate writes it"):
        write_cell_page(folder, cells[0])


def test_many_methods_are_each_named_and_the_best_twelve_distributions_shown(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    losses = [f"loss_{i}" for i in range(13)]
    cells, table = make_cells(losses=losses, embedding_dim=[16])
    write_index(Path("index.html"), table, cells, dataset="glyphs", test=TEST, runs=[RUN])
    charts = re.findall(r"<svg.*?</svg>", Path("index.html").read_text(), re.DOTALL)
    named = [{name for name in losses if f">{name}<" in svg} for svg in charts]
    assert named == [set(losses), set(losses) - {"loss_0"}]  # loss_0 has the lowest Recall@1


def test_curves_and_similarities_gather_the_cells_files(table_set):
    cells, _ = table_set
    Path("evaluations", "glyphs", cells[1].name, "validations.csv").unlink()
    Path("evaluations", "glyphs", cells[1].name, "similarities.csv").unlink()
    rows = curves(cells)
    assert list(rows) == CURVES and len(rows) == 4 * 7
    assert list(rows.iloc[2]) == ["resnet18-cbml_log-64-0", "resnet18", "cbml_log", 64, 0, 4, 53.0]
    densities = similarities(cells, 0.02)
    assert list(densities) == SIMILARITIES and len(densities) == 40 * 7
    assert list(curves([])) == CURVES and list(similarities([], 0.02)) == SIMILARITIES


def test_latex_has_a_tabular_a_size_with_the_papers_figures(table_set):
    _, table = table_set
    text = to_latex(table, "glyphs", TEST)
    assert text.count(r"\begin{tabular}") == text.count(r"\end{tabular}") == 2
    first, second = text.split("% Recall@K")[1:]
    assert "glyphs in percent, embeddings of 64; test list: 1,140 images" in first.splitlines()[0]
    for tabular in (first, second):
        columns = len(re.search(r"\\begin\{tabular\}\{(\w+)\}", tabular)[1])
        lines = [line for line in tabular.splitlines() if line.endswith(r"\\")]
        assert {len(re.findall(r"(?<!\\)&", line)) for line in lines} == {columns - 1}
    assert r"resnet18 & cbml\_log & final & 2 & 50.5 $\pm$ 0.7 & 61.3 &" in first
    assert "paper" not in second
    assert r"cbml\_<b>\&" in text


def test_dvc_plots_name_columns_that_the_files_have():
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["tabulate"]
    columns = {"curves": CURVES, "similarities": SIMILARITIES}
    for plot in stage["plots"]:
        ((path, properties),) = plot.items()
        template = json.loads((ROOT / ".dvc/plots" / f"{properties['template']}.json").read_text())
        made = {step["as"] for step in template["transform"]}
        fields = set(re.findall(r'"field": "(\w+)"', json.dumps(template)))
        known = {*columns[Path(path).stem], "rev"}
        assert {properties["x"], properties["y"], *fields - made} <= known
        assert {name for step in template["transform"] for name in re.findall(r"datum\.(\w+)", str(step))} <= known


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (requirements-extra.txt)")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium)
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [360, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_in_a_browser(path, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(path.resolve().as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    def brightness(name):  # of the page's ground, and of a chart's text
        return page.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)[0]")

    assert (brightness("backgroundColor") < brightness("color")) == (scheme == "dark")

    header = page.locator("th", has=page.get_by_role("button", name="R@1", exact=True)).first
    column = header.evaluate("header => header.cellIndex")
    body = page.locator("table", has=header).first.locator("tbody")

    def shown():
        texts = body.locator("tr").evaluate_all(f"rows => rows.map(row => row.cells[{column}].textContent)")
        return [float(number[0]) for number in (re.match(r"[\d.]+", text) for text in texts) if number]

    header.get_by_role("button").click()
    assert header.get_attribute("aria-sort") == "descending" and shown() == sorted(shown(), reverse=True)
    header.get_by_role("button").press("Enter")
    assert header.get_attribute("aria-sort") == "ascending" and shown() == sorted(shown())
    if (box := page.locator("input[value=best_on_test]")).count():
        before = body.locator("tr:visible").count()
        box.uncheck()
        assert body.locator("tr:visible").count() == before - 2
    assert not errors and all(url.startswith(("file:", "data:")) for url in requests)
    page.close()
