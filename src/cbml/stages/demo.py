"""Trained models in a browser: an image's nearest neighbours in a gallery, by one model or by two side by side."""

import os
import threading
from pathlib import Path
from typing import Any

from PIL import Image

from cbml.data.images import decode
from cbml.errors import UserError
from cbml.progress import message
from cbml.report.common.thumbnails import thumbnail
from cbml.stages.embed import Embedded, embed_images, find_files, load_model
from cbml.tracking.model import known_models
from cbml.trained import Trained
from cbml.workspace import Workspace

SIDE = 192  # of a thumbnail, in pixels
EXAMPLES = 10
MOST = 24  # neighbours
NONE = "none"  # in place of a second model
ABOUT = """
# Nearest neighbours of an image
Drop an image, or click on an example. Below are the {count:,} gallery images' nearest, by cosine similarity.
"""

# Labels beside pictures and not on them, no empty height; on a phone, two in a row, and five examples.
CSS = """
.grid-wrap { padding-top: 2.2rem !important; min-height: 0 !important; max-height: none !important }
.caption-label { left: 0 !important; max-width: 100% !important }
@media (max-width: 640px) {
  .grid-container { grid-template-columns: repeat(2, minmax(0, 1fr)) !important }
  .examples .grid-container { grid-template-columns: repeat(5, minmax(0, 1fr)) !important }
}
"""

Shown = list[tuple[Image.Image, str]]  # pictures with their captions


class Search:
    """A gallery and the models that it is searched by. A model is loaded, and embeds the gallery, on its first search.

    Raises:
        UserError: a folder has no images.
    """

    def __init__(self, gallery: list[Path], workspace: Workspace):
        self.files, self.workspace = find_files(gallery), workspace
        self._folders = len({file.parent for file in self.files}) > 1
        self._models: dict[str, tuple[Trained, Embedded]] = {}
        self._lock = threading.Lock()  # the computer is one

    def prepare(self, name: str) -> tuple[Trained, Embedded]:
        """A model, and the gallery as it embeds it.

        Raises:
            UserError: there is no such model, or an image of the gallery cannot be read.
        """
        if name not in self._models:
            model = load_model(name, self.workspace)
            message(f"{name}: embeds the gallery, {len(self.files):,} images")
            self._models[name] = model, embed_images(model, self.files)
        return self._models[name]

    def nearest(self, name: str, image: Path, k: int) -> Shown:
        """The `k` images of the gallery most similar to an image, which is not found for itself.

        Raises:
            UserError: see `prepare`; the image cannot be read.
        """
        with self._lock:
            model, gallery = self.prepare(name)
            (found,) = embed_images(model, [image]).nearest(k, gallery)
        # A caption has room for one name: of several folders, those of classes, the folder's.
        return [
            (thumbnail(file, SIDE), f"{value:.3f} {(file.parent if self._folders else file).name}")
            for file, value in found
        ]

    def examples(self) -> list[Path]:
        """Some of the gallery, evenly spread."""
        return self.files[:: max(1, len(self.files) // EXAMPLES)][:EXAMPLES]


def build(search: Search, first: str, second: str | None, others: list[str]) -> Any:
    """The page, a `gradio.Blocks`.

    Args:
        first, second: the models that are chosen when it opens.
        others: that can be chosen, too.

    Raises:
        UserError: Gradio is not installed.
    """
    os.environ.setdefault("GRADIO_ANALYTICS_ENABLED", "False")
    try:
        import gradio as gr
    except ModuleNotFoundError as error:
        raise UserError(f"{error}; pip install 'cbml[demo]'") from None

    names = list(dict.fromkeys([first, *([second] if second else []), *others]))
    files = search.examples()

    def find(image: str | None, example: str | None, first: str, second: str, k: int) -> list[Any]:
        """What both models find for an example of the gallery, or for an image that was dropped."""
        query = example or image
        try:
            found = [search.nearest(name, Path(query), k) if query and name != NONE else [] for name in (first, second)]
        except UserError as error:
            raise gr.Error(str(error)) from None
        return [gr.Gallery(found[0], label=first), gr.Gallery(found[1], label=second, visible=second != NONE)]

    def choose(event: gr.SelectData) -> tuple[Image.Image, str]:
        file = files[event.index]
        return decode(file), str(file)

    with gr.Blocks(title="Nearest neighbours") as page:
        gr.Markdown(ABOUT.format(count=len(search.files)))
        example = gr.State(None)
        with gr.Row():
            image = gr.Image(label="Query", type="filepath", format="png", sources=["upload", "clipboard"], height=300)
            with gr.Column():
                models = [
                    gr.Dropdown(names, value=first, label="Model"),
                    gr.Dropdown([NONE, *names], value=second or NONE, label="Second model"),
                ]
                k = gr.Slider(1, MOST, value=8, step=1, label="Neighbours")
        examples = gr.Gallery(
            [thumbnail(file, SIDE // 2) for file in files],
            label="Examples",
            elem_classes="examples",
            columns=EXAMPLES,
            height="auto",
            allow_preview=False,
            interactive=False,
        )
        with gr.Row():
            results = [
                gr.Gallery(label=label, columns=4, height="auto", visible=label != NONE, interactive=False)
                for label in (first, second or NONE)
            ]
        ask = {"fn": find, "inputs": [image, example, *models, k], "outputs": results}
        hidden = {"api_visibility": "private"}
        image.input(lambda: None, outputs=example, **hidden).then(**ask, api_name="find")
        examples.select(choose, outputs=[image, example], **hidden).then(**ask, **hidden)
        for control in (*models, k):
            control.change(**ask, **hidden)
    return page


def serve(
    model: str, gallery: list[Path], workspace: Workspace, *, second: str | None = None, host: str, port: int
) -> None:
    """Show the page at an address of this machine until Ctrl-C.

    Args:
        model, second: see `load_model`; others of the store can be chosen on the page.
        gallery: files, and folders that are searched for them.

    Raises:
        UserError: there is no such model, an image cannot be read, Gradio is not installed, or the port is in use.
    """
    search = Search(gallery, workspace)
    for name in filter(None, (model, second)):
        search.prepare(name)
    page = build(search, model, second, known_models(workspace))
    import gradio as gr

    fonts = gr.themes.Default(font="system-ui", font_mono="monospace")  # else they are fetched
    looks = {"theme": fonts, "css": CSS, "footer_links": []}
    try:
        page.launch(server_name=host, server_port=port, share=False, quiet=True, prevent_thread_lock=True, **looks)
    except OSError:
        raise UserError(f"port {port} is in use; another one: --port {port + 1}") from None
    print(f"http://{host}:{port}\nCtrl-C ends it.", flush=True)
    page.block_thread()
