"""Pages: complete, self-contained, sortable, fit for a phone; and what DVC draws of the same cells."""

import json
import os
import re
import shutil
import warnings
from functools import partial
from html.parser import HTMLParser

import pytest
import yaml
from finished_cells import TEST, cells, finish, pictures, write_cell_page, write_images
from helpers import ROOT, tiny_params

from cbml.report.cell import page as cell_page
from cbml.report.common.numbers import NO_NMI
from cbml.report.tables import rows as tables
from cbml.report.tables.page import index_page, strip_part, tables_page
from cbml.report.tables.tuning import worth
from cbml.stages.records import neighbours_of
from cbml.workspace import Workspace

DEVICE = "a <CPU> & \"co\" 'x'"


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


def finish_all(tree, several, **facts):
    """Finish cells, each in a tree of its own, the first one's Recall@1 50 %, each next one's 1 % more."""
    trees = [Workspace(tree / str(i)) for i in range(len(several))]
    return tables.with_variants(
        [finish(own, cell, 50.0 + i, **facts) for i, (own, cell) in enumerate(zip(trees, several, strict=True))],
        ROOT / "conf",
    )


def write_tables_page(path, evaluated, table, *retrieved):
    path.parent.mkdir(parents=True, exist_ok=True)
    gains = worth(tables.collect(evaluated, ROOT / "conf"))
    path.write_text(tables_page(table, evaluated, "glyphs", TEST, gains, path.parent, *retrieved))
    return path


def table_of(evaluated, *, with_published=False):
    return tables.summarise(tables.collect(evaluated, ROOT / "conf"), with_published=with_published)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return tmp_path_factory.mktemp("pages")


@pytest.fixture(scope="module")
def evaluated(folder):
    """Eight cells, published figures for half of them."""
    losses = {name: {"type": "cbml", "form": "log"} for name in ("cbml_log", "cbml_2")}
    return finish_all(folder, cells(loss=losses, embedding_dim=[64, 16], seed=[0, 1]), device=DEVICE)


@pytest.fixture(scope="module")
def pages(folder, evaluated):
    """The page of their tables, that of the first cell with pictures of every kind, and that over all tables."""
    table = table_of(evaluated, with_published=True)
    table["versus_best"], table["versus_best_low"] = -1.25, -2.5
    table["versus_best_high"] = [0.5] + [-0.5] * (len(table) - 1)
    workspace = Workspace(folder, folder)
    write_images(workspace)
    found = partial(neighbours_of, queries=40, images=40)
    report = workspace.report("glyphs") / "index.html"
    page = write_tables_page(report, evaluated, table, pictures(workspace), found)
    cell = write_cell_page(evaluated[0], workspace)
    reports = {"glyphs": tables.headline(table), "cub200": tables.headline(table) | {"best_cell": "a<b>&c", "cells": 7}}
    strip = strip_part(table, evaluated, "glyphs", pictures(workspace), found)
    workspace.index.write_text(index_page(reports, {"glyphs": strip, "cub200": ""}))
    return {"tables": page, "cell": cell, "index": workspace.index}


@pytest.fixture(params=["tables", "cell"])
def path(request, pages):
    return pages[request.param]


def test_the_page_of_tables_holds_every_row_and_leads_to_every_cell(pages, evaluated):
    page = Page(pages["tables"])
    rows = [attributes["class"] for attributes in page.all("tr") if attributes.get("class")]
    # Two methods × two sizes, twice; and the paper's six rows for ResNet18 with embeddings of 64.
    assert sorted(rows) == ["best_on_test"] * 4 + ["final"] * 4 + ["published"] * 6
    files = {pages["tables"].with_name(f"tables.{name}") for name in ("csv", "tex", "md")}
    links = [attributes["href"].partition("#") for attributes in page.all("a")]
    assert {(pages["tables"].parent / link).resolve() for link, _, _ in links} == {
        *(one.page / "index.html" for one in evaluated),
        *files,
        pages["index"],
    }
    back = {((pages["tables"].parent / link).parent / back).resolve() for link, _, back in links if "/pages/" in link}
    assert back == {pages["tables"]}
    named = re.findall(r'<th scope="row"><span><a href="([^#]+)#[^"]+">(\w+)</a>', page.html)
    firsts = {(pages["tables"].parent / link).resolve().parent.name: method for link, method in named}
    assert len(named) == 8 and firsts == {one.cell.name: one.cell.loss for one in evaluated if one.cell.seed == 0}
    assert "50.5 ± 0.7" in page.text  # seeds at 50 and 51 %
    assert "paper 61.3 (-10.8)" in page.text
    assert page.text.count("-1.2 [-2.5, -0.5]") == 13 and page.text.count("+0.5], within noise") == 1
    assert page.text.count("dvc exp run -S dataset=glyphs") == 8 and "seed=[0,1]" in page.text
    assert len(re.findall(r'<button type="button" class="copy">', page.html)) == 8
    assert f"device: {DEVICE}" in page.text
    assert "1,140 images of 20 classes" in page.text and "not comparable with this part" in page.text
    assert all(tables.PROTOCOLS[name] in page.text for name in rows)


def test_what_the_table_does_not_have_is_not_shown(evaluated, tmp_path):
    page = Page(write_tables_page(tmp_path / "index.html", evaluated, table_of(evaluated)))
    assert "R@1 untrained" in page.text
    assert not re.search(r"against the best|paper \d|comparable with|other code", page.text, re.IGNORECASE)
    assert len(page.all("svg")) == 2  # curves and similarities, not the paper


def test_a_picture_shows_what_tuning_was_worth(tmp_path):
    losses = [{"a": {"type": "cbml"} | own} for own in ({}, {"tuned": "4 trials", "margin": 0.2})]
    evaluated = finish_all(tmp_path, [cell for loss in losses for cell in cells(loss=loss, seed=[0, 1, 2])])
    page = Page(write_tables_page(tmp_path / "page" / "index.html", evaluated, table_of(evaluated)))
    assert "What tuning was worth: resnet18, tiny, " in page.text and "each loss tuned: 4 trials" in page.text
    assert len(page.all("svg")) == 3


def test_both_variants_of_a_method_are_rows_and_named_in_the_charts(tmp_path):
    several = [*cells(loss={"a": {"type": "cbml", "margin": 0.1}}), *cells(loss={"a": {"type": "cbml", "margin": 0.2}})]
    evaluated = finish_all(tmp_path, several)
    page = Page(write_tables_page(tmp_path / "page" / "index.html", evaluated, table_of(evaluated)))
    names = re.findall(r'<th scope="row"><span><a [^>]+>(.*)</a><small>resnet18 · \w+</small></span></th>', page.html)
    assert sorted(names) == ["a (margin=0.1)"] * 2 + ["a (margin=0.2)"] * 2
    links = [attributes["href"] for attributes in page.all("a") if "/pages/" in attributes["href"]]
    assert len(links) == 8 and len(set(links)) == 2
    curves, similarities = re.findall(r"<svg.*?</svg>", page.html, re.DOTALL)
    assert all(f">a (margin={margin})<" in curves and f"margin={margin}" in similarities for margin in (0.1, 0.2))


@pytest.fixture(scope="module")
def long_names(folder):
    """The page of three cells that differ in much, with a published figure for each."""
    tiny, several = tiny_params()["recipe"], cells(embedding_dim=[64])
    for margin, lr in ((0.2, 0.01), (0.3, 0.02)):
        recipe = tiny | {"lr": lr, "select_by": "map_at_r"}
        several += cells(loss={"cbml_log": {"type": "cbml", "margin": margin}}, recipe=recipe, embedding_dim=[64])
    evaluated = finish_all(folder / "long", several)
    assert max(len(one.variant) for one in evaluated) > 90
    table = table_of(evaluated, with_published=True)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # of Matplotlib, if a chart has no room for its lines
        return write_tables_page(folder / "long" / "index.html", evaluated, table)


def test_long_names_are_wrapped_in_charts(long_names):
    texts = re.findall(r"<text[^>]*>(.*?)</text>", long_names.read_text(), re.DOTALL)
    lines = [re.sub(r"<[^>]*>", "", text).strip() for text in texts]
    assert max(map(len, lines)) <= 40 and sum("recipe.lr=0.01" in line for line in lines) == 3


def test_cells_that_other_code_trained_are_announced_above_the_tables(evaluated, tmp_path):
    other = finish_all(tmp_path, cells(), code={"losses/<b>.py": "0" * 12})
    page = Page(write_tables_page(tmp_path / "page" / "index.html", other, table_of(other)))
    warning = page.html.partition("<table>")[0]
    assert (
        "<strong>Trained by other code than today&#x27;s</strong> (no longer there: src/cbml/losses/&lt;b&gt;.py)"
        in warning
    )
    assert "<code>dvc repro -f -s train@resnet18-cbml_log-16-0-glyphs &amp;&amp; dvc repro</code>" in warning


def test_the_page_over_all_tables_leads_to_each(pages):
    page = Page(pages["index"])
    links = [attributes["href"] for attributes in page.all("a")]
    assert links == ["glyphs/index.html", "cub200/index.html", "glyphs/index.html"]  # and over the strip
    rows = re.sub(r"\s*\n\s*", "|", page.text)
    assert "cub200|56.5|10.0|7|a<b>&c|" in rows and "glyphs|56.5|10.0|4|resnet18-" in rows and not page.all("b")


def test_the_page_over_all_tables_shows_what_the_best_methods_of_each_retrieve(pages):
    page = Page(pages["index"])
    strip = page.html.partition('<div id="strip-glyphs">')[2].partition("</div>\n</main>")[0]
    names = ["cbml_2, resnet18, 16", "cbml_2, resnet18, 64", "cbml_log, resnet18, 16"]  # best first
    assert re.findall(r"<span>(\w+, resnet18, \d+) <strong>", strip) == names
    assert strip.count('class="tile "') == 6 and len(re.findall('class="tile (right|wrong)"', strip)) == 6 * 3 * 3
    assert page.html.count("data:image/jpeg;base64,") == 1 and "strip-cub200" not in page.html


@pytest.mark.parametrize("name", ["tables", "cell", "index"])
def test_every_page_has_one_main_part_after_its_links_upwards(pages, name):
    tags = [tag for tag, _ in Page(pages[name]).tags if tag in ("nav", "main", "h1")]
    assert tags == (["main", "h1"] if name == "index" else ["nav", "main", "h1"])


@pytest.mark.parametrize("name", ["tables", "cell", "index"])
def test_nothing_is_loaded(pages, name):
    page = Page(pages[name])
    for tag, attributes in page.tags:
        for name in ("src", "href", "xlink:href", "srcset", "poster", "data"):
            value = attributes.get(name, "")
            own = ":" not in value or value.startswith("http://here:5000/#/experiments/")
            assert re.match(r"data:|#|$", value) or (tag == "a" and own), (tag, name, value[:80])
    assert not re.search(r"@import|url\((?!#|data:)", page.html)


def test_ids_are_unique_and_what_refers_to_them_finds_them(path):
    page = Page(path)
    assert page.ids() and len(page.ids()) == len(set(page.ids()))
    assert set(re.findall(r'(?:url\(|href=")#([^)"]+)', page.html)) <= set(page.ids())


def test_pictures_have_words(path, pages):
    page = Page(path)
    tiles = [attributes for attributes in page.all("span") if "tile" in attributes.get("class", "").split()]
    assert tiles and all(tile["role"] == "img" and tile["title"] for tile in tiles)
    assert {"Class 2", "Laysan <Albatross>"} <= {tile["title"].partition(",")[0] for tile in tiles}
    for tile in tiles:
        assert tile["class"].removeprefix("tile").strip() == "".join(
            re.findall(r", (right|wrong), 0\.\d{3}$", tile["title"])
        )
    for svg in page.all("svg"):
        assert svg["role"] == "img" and svg["aria-label"]
    assert len(page.all("svg")) == (4 if path == pages["cell"] else 3)
    assert len(page.all("figcaption")) == len(page.all("figure")) == len(page.all("svg"))
    assert page.html.count("data:image/jpeg;base64,") == 1  # all of them


def test_every_column_can_be_sorted_by_keyboard(path):
    page = Page(path)
    columns = [attributes for attributes in page.all("th") if attributes.get("scope") == "col"]
    assert columns and all(attributes["aria-sort"] == "none" for attributes in columns)
    in_headers = re.findall(r'<th scope="col"[^>]*><button type="button">', page.html)
    assert len(in_headers) == len(columns)


def test_names_are_text_not_html(path, pages):
    page = Page(path)
    assert (DEVICE if path == pages["tables"] else "Laysan <Albatross>") in page.text
    assert not page.all("cpu") and not page.all("albatross") and "&amp;lt;" not in page.html
    assert "Laysan <Albatross>" in page.text


def test_a_cells_page_says_what_its_files_say(pages):
    text = Page(pages["cell"]).text
    assert "resnet18-cbml_log-64-0" in text and "embeddings of 64" in text
    assert "50.0" in text and "53.0" in text  # R@1, final and best on test
    assert "3 queries have no other image" in text
    cells_of_rows = re.sub(r"\s*\n\s*", "|", text)
    assert "Laysan <Albatross>|25.0|9|Crow|" in cells_of_rows
    assert "None|–|1|" in cells_of_rows  # a class named None, without an answer
    assert "margin: 0.1" in text and '"fingerprint": "0123"' in text  # cell.yaml, run.json


def test_pages_without_nmi_say_so(tmp_path, pages):
    evaluated = finish_all(tmp_path, cells())[:1]
    file = evaluated[0].folder / "metrics.json"
    file.write_text(file.read_text().replace(', "nmi": 50.0', ""))
    write_images(workspace := Workspace(tmp_path))
    cell = write_cell_page(evaluated[0], workspace)
    report = write_tables_page(tmp_path / "page" / "index.html", evaluated, table_of(evaluated))
    for path, with_nmi in ((cell, pages["cell"]), (report, pages["tables"])):
        assert NO_NMI in Page(path).text and NO_NMI not in Page(with_nmi).text


def test_of_many_classes_the_worst_are_shown_which_is_said(tmp_path, monkeypatch):
    monkeypatch.setattr(cell_page, "CLASSES", 2)
    (one,) = finish_all(tmp_path, cells())
    write_images(workspace := Workspace(tmp_path, tmp_path))
    text = Page(write_cell_page(one, workspace)).text
    assert "Crow" in text and "CAPITAL" not in text
    assert "The worst 2 of 3 classes; all are in" in " ".join(text.split())


def test_many_methods_are_each_named_and_the_best_twelve_shown(tmp_path):
    losses = [f"loss_{i}" for i in range(13)]
    evaluated = finish_all(tmp_path, cells(loss={name: {"type": "cbml"} for name in losses}))
    write_images(workspace := Workspace(tmp_path, tmp_path))
    retrieved = pictures(workspace), partial(neighbours_of, queries=40, images=40)
    path = tmp_path / "page" / "index.html"
    html = write_tables_page(path, evaluated, table_of(evaluated), *retrieved).read_text()
    assert re.findall(r"<span>(loss_\d+) <strong>", html) == losses[:0:-1]
    assert re.findall(r"<option.*>(loss_\d+), seed 0</option>", html) == 2 * losses[:0:-1]
    assert "What each of the best 12 methods retrieves" in html
    charts = re.findall(r"<svg.*?</svg>", html, re.DOTALL)
    named = [{name for name in losses if f">{name}<" in svg} for svg in charts]
    assert named == [set(losses), set(losses) - {"loss_0"}]  # loss_0 has the lowest Recall@1
    assert "the best 12 by Recall@1" in html
    html = write_tables_page(tmp_path / "page" / "index.html", evaluated[1:], table_of(evaluated[1:])).read_text()
    assert "the best 12 by Recall@1" not in html


def test_dvc_plots_name_columns_that_the_files_have(evaluated):
    stage = yaml.safe_load((ROOT / "dvc.yaml").read_text())["stages"]["tabulate"]
    columns = {"curves": tables.curves(evaluated), "similarities": tables.similarities(evaluated, 0.02)}
    (picture, *plots) = stage["plots"]
    assert picture == "reports/${item.dataset}/curves.svg" and len(plots) == len(columns)
    for plot in plots:
        ((path, properties),) = plot.items()
        name = re.fullmatch(r"reports/\$\{item\.dataset\}/(\w+)\.csv", path)[1]
        template = json.loads((ROOT / ".dvc/plots" / f"{properties['template']}.json").read_text())
        made = {step["as"] for step in template["transform"]}
        fields = set(re.findall(r'"field": "(\w+)"', json.dumps(template)))
        known = {*columns[name], "rev"}
        assert {properties["x"], properties["y"], *fields - made} <= known
        assert {name for step in template["transform"] for name in re.findall(r"datum\.(\w+)", str(step))} <= known


@pytest.fixture(scope="module")
def browser():
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install 'cbml[browser]')")
    chromium = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if chromium is None:
        pytest.skip("Chromium is not installed")
    arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox does not run as root
    with api.sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium, args=arguments)
        yield browser
        browser.close()


@pytest.mark.parametrize("width", [390, 1400])
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("name", ["tables", "cell", "index"])
def test_in_a_browser(pages, name, browser, width, scheme):
    page = browser.new_page(viewport={"width": width, "height": 800}, color_scheme=scheme)
    errors, requests = [], []
    page.on("pageerror", lambda error: errors.append(error))
    page.on("request", lambda request: requests.append(request.url))
    page.goto(pages[name].resolve().as_uri())
    assert page.evaluate("document.documentElement.scrollWidth <= innerWidth")

    for box in page.locator(".box:has(table)").all():
        if width == 1400:  # the last column is not cut
            assert box.evaluate("box => box.scrollWidth <= box.clientWidth")
        for recall in box.get_by_role("button", name="R@1", exact=True).all():
            assert recall.evaluate("button => button.getBoundingClientRect().right") < width

    # The name of a row stays in view beside its figures, and leaves room for them.
    parts = """[...document.querySelectorAll(".box")].filter(box => box.scrollWidth > box.clientWidth).flatMap(
        box => [...box.querySelectorAll("th[scope=row]")].map(name => name.offsetWidth / box.clientWidth))"""
    assert all(part < 0.5 for part in page.evaluate(parts))

    def brightness(name):  # of the page's ground, and of a chart's text
        return page.evaluate(f"getComputedStyle(document.body).{name}.match(/\\d+/g).map(Number)[0]")

    assert (brightness("backgroundColor") < brightness("color")) == (scheme == "dark")

    if name != "index":
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
    if name == "tables":
        before = body.locator("tr:visible").count()
        assert page.locator("tr.best_on_test:visible").count() == 0
        page.locator("input[value=best_on_test]").check()
        assert body.locator("tr:visible").count() == before + 2
        page.locator("summary").first.click()
        command = page.get_by_text("dvc exp run").first
        assert command.is_visible()
        page.locator("button.copy").first.click()
        page.evaluate("document.querySelector('h1').contentEditable = true")
        page.locator("h1").press("Control+V")
        assert page.locator("h1").inner_text().endswith(command.inner_text())
    assert not errors and all(url.startswith(("file:", "data:")) for url in requests)
    page.close()


def test_two_cells_are_compared(pages, evaluated, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 800})
    page.goto(pages["tables"].resolve().as_uri())
    compared, (first, second) = page.locator("#compare"), page.locator("#compare select").all()

    def choose(one, other):  # the cells of `finish` answer the first 20, 20, 21, 21, 22, 22, 22, 23 of 40 rightly
        for select, index in ((first, one), (second, other)):
            cell = evaluated[index].cell
            select.select_option(label=f"{cell.loss}, {cell.backbone}, {cell.embedding_dim}, seed {cell.seed}")
        return compared.locator("b").all_inner_texts()

    def shown(number):
        """Queries that one of the two alone answers rightly, and whether each cell's nearest neighbour is right."""
        return [
            (query.locator(".name").inner_text().strip(), query.locator(".row:visible .tile:first-child").evaluate_all(
                "tiles => tiles.sort((a, b) => a.getBoundingClientRect().top - b.getBoundingClientRect().top)"
                ".map(tile => tile.classList[1])"
            ))
            for query in compared.locator(".queries").nth(number).locator(".query:visible").all()
        ]  # fmt: skip

    assert choose(0, 7) == ["20", "0", "3", "17", "0.250"]
    assert shown(0) == [] and shown(1) == [("Class 5", ["wrong", "right"])]
    row = compared.locator("tbody tr")
    assert row.all_inner_texts() == ["Class 5\t0.0\t75.0\t+75.0\t1.000\t4"]
    assert choose(7, 0) == ["20", "3", "0", "17", "0.250"]
    assert shown(0) == [("Class 5", ["right", "wrong"])] and shown(1) == []
    assert row.all_inner_texts() == ["Class 5\t75.0\t0.0\t-75.0\t1.000\t4"]
    assert choose(3, 3)[1:3] == ["0", "0"] and shown(0) == shown(1) == [] and row.count() == 0
    page.close()


def test_the_way_back_from_a_page_that_is_kept_elsewhere(pages, browser, tmp_path):
    kept = tmp_path / "kept.html"
    kept.write_text(pages["cell"].read_text())
    page = browser.new_page()
    page.goto(f"{kept.as_uri()}#{os.path.relpath(pages['tables'], tmp_path)}")
    links = page.locator("nav a").evaluate_all("links => links.map(link => link.href)")
    assert links == [f"{pages['index'].resolve().as_uri()}#all", pages["tables"].resolve().as_uri()]
    page.goto(pages["cell"].as_uri())
    page.locator("nav a").last.click()
    assert page.locator("h1").inner_text() == "Recall@K on glyphs"
    page.close()


def test_the_link_to_mlflow_follows_the_address_of_its_ui(tmp_path, browser):
    (one,) = finish_all(tmp_path, cells(), run_id="abc")
    write_images(workspace := Workspace(tmp_path, tmp_path))
    address = "http://here:5000/#/experiments/7/runs/abc?workflowType=machine_learning"
    page = browser.new_page()
    page.goto(write_cell_page(one, workspace, run_address=address).as_uri())
    link = page.get_by_role("link", name="it is here")
    assert link.get_attribute("href") == address
    page.locator("input").fill("http://127.0.0.1:5001/")
    assert link.get_attribute("href") == address.replace("here:5000", "127.0.0.1:5001")
    page.close()


def test_of_one_dataset_the_page_over_all_is_that_datasets(pages, browser):
    others = pages["index"].read_text()
    try:
        pages["index"].write_text(index_page({"glyphs": {}}, {}))
        page = browser.new_page()
        page.goto(pages["index"].resolve().as_uri())
        page.get_by_role("heading", name="Recall@K on glyphs").wait_for()
        page.locator("nav a").click()
        page.get_by_role("heading", name="Recall@K, by dataset").wait_for()
        page.close()
    finally:
        pages["index"].write_text(others)


def test_long_names_stay_inside_their_charts(long_names, browser):
    page = browser.new_page(viewport={"width": 1400, "height": 800})
    page.goto(long_names.resolve().as_uri())
    outside = page.evaluate("""[...document.querySelectorAll("svg")].flatMap(svg => {
        const all = svg.getBoundingClientRect();
        return [...svg.querySelectorAll("text")].filter(text => {
            const own = text.getBoundingClientRect();
            return own.left < all.left - 2 || own.right > all.right + 2 || own.top < all.top - 2;
        }).map(text => text.textContent);
    })""")
    assert page.locator("svg").count() == 3 and outside == []
    page.close()
