# Copyright 2026 The moleblend_hf authors.
#
# Licensed under the Apache License, Version 2.0 (the "License");
# you may not use this file except in compliance with the License.
# You may obtain a copy of the License at
#
#     http://www.apache.org/licenses/LICENSE-2.0
#
# Unless required by applicable law or agreed to in writing, software
# distributed under the License is distributed on an "AS IS" BASIS,
# WITHOUT WARRANTIES OR CONDITIONS OF ANY KIND, either express or implied.
# See the License for the specific language governing permissions and
# limitations under the License.
"""`moleblend demo`: a checkpoint in the browser, with gradio.

The page works offline and asks nobody but its own server for anything, which it tells the browser to enforce.
"""

from html import escape
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .demo_html import message
from .geometry_view import require_plotly
from .molecule_page import Answer, MoleculePage, read_first

try:
    import gradio as gr
    from starlette.middleware import Middleware
except ImportError:
    gr = None  # type: ignore[assignment]

EXAMPLES = ["CC(=O)Oc1ccccc1C(=O)O", "Cn1c(=O)c2c(ncn2C)n(C)c1=O", "OC(=O)CCCCc1ccc(F)cc1"]
MAX_LETTERS, MAX_FILE = 2_000, "5mb"  # of what is asked about
SECURITY_POLICY = "default-src 'self' 'unsafe-inline' 'unsafe-eval' data: blob:"
CSS = """
.gradio-container {width: 100%; max-width: 1180px !important; margin: 0 auto !important}
.gradio-container .main {padding: 1rem clamp(.6rem, 3vw, 2rem) !important}
h1 {font-size: 1.6rem; font-weight: 600; overflow-wrap: anywhere}
h3 {font-size: 1.1rem; font-weight: 600}
.message {border-left: 4px solid; padding: .5rem .8rem; border-radius: 4px; overflow-wrap: anywhere}
.message.error {border-color: #c0392b; background: #c0392b1a}
.message.note {border-color: #b58900; background: #b589001a}
.picture {background: white; border-radius: 8px}
.picture svg {display: block; margin: auto; max-width: 100%; height: auto}
.table {overflow: auto; max-height: 20rem}
.table table {width: 100%; border-collapse: collapse}
.table caption {text-align: left; padding-bottom: .3rem}
.table th, .table td {text-align: left; padding: .35rem .8rem .35rem 0; border-bottom: 1px solid var(--border-color-primary)}
.cards {display: grid; grid-template-columns: repeat(auto-fit, minmax(140px, 1fr)); gap: .8rem}
.cards figure {border: 1px solid var(--border-color-primary); border-radius: 8px; overflow: hidden}
.cards figcaption {padding: .5rem; font-size: .85rem; overflow-wrap: anywhere}
.cards figcaption span {display: block}
.editor iframe {width: 100%; height: 380px; border: 0; background: white}
.modebar {display: none}
.html-container {padding: 0 !important}
@media (max-width: 600px) {
    .table {font-size: .85rem}
    .table th, .table td {padding-right: .5rem}
}
"""


def build_demo(page: MoleculePage) -> Any:
    """Returns the demo of a checkpoint, a gradio `Blocks`; `launch_demo` serves it."""
    require_gradio()
    editor = editor_html()
    plain: Any = {"apply_default_css": False, "js_on_load": None}

    def of_text(smiles: str) -> dict[Any, Any]:
        if not smiles.strip():
            return shown(None, Answer(message("There is no molecule. Paste a SMILES, draw one or choose a file.")))
        return shown(smiles, page.answer(smiles))

    def of_drawing(smiles: str) -> dict[Any, Any]:
        return of_text(smiles) | {text: smiles}

    def of_file(path: str) -> dict[Any, Any]:
        molecule, note = read_first(path)
        answer = page.answer(molecule)
        return shown(molecule, answer if answer.message else answer._replace(message=note)) | {text: ""}

    def shown(molecule: Any, answer: Answer) -> dict[Any, Any]:
        """Components of the page with what they show."""
        return {
            current: (molecule, answer.graph),
            told: gr.update(value=answer.message, visible=bool(answer.message)),
            results: gr.update(visible=answer.graph is not None),
            picture: answer.picture,
            prediction: answer.prediction,
            geometry: gr.update(value=answer.geometry, visible=answer.geometry is not None),
            geometry_note: answer.geometry_note,
            neighbours: answer.neighbours,
        }

    def of_target(current: tuple[Any, Any], target: int) -> Any:
        molecule, graph = current
        return gr.skip() if graph is None else page.attributed(molecule, graph, target)

    with gr.Blocks(title=page.name, analytics_enabled=False, delete_cache=(3600, 3600)) as demo:
        current = gr.State((None, None))
        gr.HTML(page.heading(), **plain)
        with gr.Row():
            text = gr.Textbox(
                placeholder="SMILES",
                max_length=MAX_LETTERS,
                container=False,
                scale=4,
                min_width=280,
                elem_id="smiles",
            )
            ask = gr.Button("Show", variant="primary", min_width=110, elem_id="ask")
            file = gr.UploadButton("SDF file", file_types=[".sdf", ".mol"], min_width=110, elem_id="file")
        gr.Examples(EXAMPLES, text, label="Examples")
        if editor:
            with gr.Accordion("Draw", open=False, elem_id="draw"):
                gr.HTML(editor, elem_classes="editor")
                drawn = gr.Button("Show the drawing", elem_id="drawn")
        told = gr.HTML(visible=False, elem_id="message", **plain)
        with gr.Column(visible=False) as results:
            prediction = gr.HTML(elem_id="prediction", visible=bool(page.targets), **plain)
            with gr.Row():
                with gr.Column(min_width=300):
                    target = gr.Dropdown(
                        [(name, index) for index, name in enumerate(page.targets)] or [("", 0)],
                        value=0,
                        label="Atoms are coloured by",
                        visible=page.of_molecules and len(page.targets) > 1,
                        elem_id="target",
                    )
                    picture = gr.HTML(elem_id="picture", **plain)
                with gr.Column(min_width=300):
                    geometry = gr.Plot(show_label=False, elem_id="geometry")
                    geometry_note = gr.HTML(**plain)
            if page.neighbours:
                whose = " in the first model" if hasattr(page.model, "members") else ""
                gr.HTML(f"<h3>Nearest by embedding{whose}, of {escape(page.neighbours.report)}</h3>", **plain)
            neighbours = gr.HTML(elem_id="neighbours", visible=page.neighbours is not None, **plain)

        outputs = [current, text, told, results, prediction, picture, geometry, geometry_note, neighbours]
        # One at a time: attributions hang hooks into the model.
        one_by_one: Any = {"concurrency_limit": 1, "concurrency_id": "model", "api_visibility": "private"}
        events = [gr.on([ask.click, text.submit], of_text, text, outputs, **one_by_one)]
        events.append(file.upload(of_file, file, outputs, **one_by_one))
        if editor:
            drawing = "() => document.querySelector('.editor iframe').contentWindow.editor.smiles()"
            events.append(drawn.click(of_drawing, text, outputs, js=drawing, **one_by_one))
        if page.of_molecules:
            for event in (*(event.then for event in events), target.input):
                event(of_target, [current, target], picture, **one_by_one)
    return demo


def launch_demo(demo: Any, **settings: Any) -> None:
    """Serves a demo until it is interrupted; `settings` are those of `Blocks.launch`."""
    demo.launch(
        theme=gr.themes.Default(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
        css=CSS,
        footer_links=[],
        max_file_size=MAX_FILE,
        ssr_mode=False,
        app_kwargs={"middleware": [Middleware(SecurityPolicy)]},
        **settings,
    )


def require_gradio() -> None:
    """Raises an ImportError that says what to install, if gradio or plotly is missing."""
    if gr is None:
        raise ImportError("The demo needs gradio, which is not installed. Run `pip install gradio plotly`.")
    require_plotly()


def editor_html() -> str:
    """Returns a frame with the molecule editor JSME, of which streamlit-jsme brings the files; "" where it is not installed."""
    package = find_spec("streamlit_jsme")
    if package is None or package.origin is None:
        return ""
    folder = Path(package.origin).parent / "jsme"
    gr.set_static_paths([folder])
    page = (
        '<style>body { margin: 0 } [src$="clear.cache.gif"] { visibility: hidden }</style><div id="jsme"></div>'
        '<script>function jsmeOnLoad() { window.editor = new JSApplet.JSME("jsme", "100%", "380px") }</script>'
        f'<script src="gradio_api/file={escape(folder.as_posix())}/jsme.nocache.js"></script>'
    )
    return f'<iframe title="Molecule editor" loading="lazy" srcdoc="{escape(page)}"></iframe>'


class SecurityPolicy:
    """Middleware: a header that lets the browser load from this server alone."""

    def __init__(self, app: Any):
        self.app = app

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        async def send_with_header(event: Any) -> None:
            if event["type"] == "http.response.start":
                event["headers"] = [*event["headers"], (b"content-security-policy", SECURITY_POLICY.encode())]
            await send(event)

        await self.app(scope, receive, send_with_header)


__all__ = ["build_demo", "launch_demo", "require_gradio"]
