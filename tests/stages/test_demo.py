"""The demo: what it finds, and in a browser that a click and an upload show neighbours by one model and by two."""

import os
import shutil
import sys
from pathlib import Path

import pytest
from finished_cells import finish

from cbml.errors import UserError
from cbml.stages import demo
from cbml.stages.hand_over import hand_over
from cbml.tracking.model import known_models

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture
def other(untrained):
    """Another model."""
    return shutil.copytree(untrained, "other")


def test_a_search_finds_what_the_model_finds_and_embeds_the_gallery_once(untrained, workspace, pictures, capsys):
    search = demo.Search(pictures, workspace)
    shutil.copy(pictures[5], "new.png")
    found = search.nearest(str(untrained), Path("new.png"), 3)
    name = pictures[5].parent.name
    assert found[0][1] == f"1.000 {name}" and found[0][0].size == (demo.SIDE, demo.SIDE)
    values = [float(caption.split()[0]) for _, caption in found]
    assert len(found) == 3 and values == sorted(values, reverse=True)
    assert search.nearest(str(untrained), pictures[5], 3)[0][1] != found[0][1]  # an example is not found for itself
    assert capsys.readouterr().err.count("embeds the gallery") == 1
    examples = search.examples()
    assert len(examples) == demo.EXAMPLES and examples[0] == pictures[0] and set(examples) <= set(pictures)


def test_the_models_of_the_store_can_be_chosen(untrained, workspace):
    assert known_models(workspace) == []
    (cell,) = workspace.cells("glyphs")
    one = finish(workspace, cell)
    hand_over(workspace, cell, one.folder, untrained)
    assert known_models(workspace) == [one.record["key"]]


def test_without_gradio_it_says_what_to_install(untrained, workspace, pictures, monkeypatch):
    monkeypatch.setitem(sys.modules, "gradio", None)
    with pytest.raises(UserError, match=r"pip install 'cbml\[demo\]'"):
        demo.build(demo.Search(pictures, workspace), str(untrained), None, [])


@pytest.fixture
def served(untrained, other, workspace, pictures):
    pytest.importorskip("gradio", reason="Gradio is not installed (pip install 'cbml[demo]')")
    page = demo.build(demo.Search(pictures, workspace), str(untrained), None, [str(other)])
    _, address, _ = page.launch(server_name="127.0.0.1", share=False, quiet=True, prevent_thread_lock=True)
    yield address
    page.close()


def test_in_a_browser_a_click_and_an_upload_show_neighbours(served, pictures):
    api = pytest.importorskip("playwright.sync_api", reason="Playwright is not installed (pip install 'cbml[browser]')")
    if CHROMIUM is None:
        pytest.skip("Chromium is not installed")
    shutil.copy(pictures[5], "new.png")
    Path("broken.png").write_bytes(b"no image")
    with api.sync_playwright() as playwright:
        arguments = ["--no-sandbox"] if os.geteuid() == 0 else []  # its sandbox does not run as root
        browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
        page = browser.new_page(viewport={"width": 1400, "height": 1200})
        page.set_default_timeout(120_000)
        requests = []
        page.on("request", lambda request: requests.append(request.url))
        page.goto(served)
        captions = page.locator(".caption-label")
        page.get_by_role("button", name="Thumbnail 1 of").first.click()
        captions.first.wait_for()
        assert captions.count() == 8 and not captions.first.inner_text().startswith("1.000")
        page.get_by_label("Remove Image").click()
        page.locator("input[type=file]").first.set_input_files("new.png")
        name = f"1.000 {pictures[5].parent.name}"
        page.get_by_text(name).wait_for()
        page.get_by_label("Second model").click()
        page.get_by_role("option", name="other").click()
        page.get_by_text(name).nth(1).wait_for()
        assert captions.count() == 16
        assert all(url.startswith((served, "data:", "blob:")) for url in requests), requests
        browser.close()
