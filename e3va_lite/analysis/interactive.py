"""Interactive figures: data computed here, drawn by a script in the reader's browser.

A figure is an ES module beside this file with a default export ``{render({model, el})}``, the form of anywidget. It
needs neither a kernel nor a network: its data travel with it, in the notebook and in the page that ``jupyter nbconvert
--to html`` makes of it. (nbconvert shows a widget where it has one, and loads widgets from the network: therefore a
figure is a piece of HTML first, and a widget where one is asked for.)
"""

import json
import uuid
from pathlib import Path

FRONT_END = Path(__file__).parent


class Interactive:
    """An interactive figure; a notebook shows it.

    Args:
        name: Of the script and the style sheet in this folder, without suffix. Every figure's begin with those called
            ``network``, which draw the network; scripts are joined, and therefore import nothing.
        data: What is drawn, as plain numbers and texts.
        summary: What it shows, in a sentence, for readers without scripts.
    """

    def __init__(self, name: str, data: dict, summary: str) -> None:
        self.name, self.data, self.summary = name, data, summary

    def __repr__(self) -> str:
        return self.summary

    def script(self) -> str:
        """The module that draws the figure."""
        return self._joined("js")

    def style(self) -> str:
        """Its style sheet, which the script puts into a shadow root: it and the page's leave each other alone."""
        return self._joined("css")

    def _joined(self, suffix: str) -> str:
        return "\n".join((FRONT_END / f"{name}.{suffix}").read_text("utf-8") for name in ("network", self.name))

    def _repr_html_(self) -> str:
        """The figure as a part of a page, with its script: it plays wherever scripts may run."""
        place = f"figure-{uuid.uuid4().hex}"
        state = json.dumps({"data": self.data, "style": self.style()}, separators=(",", ":")).replace("</", "<\\/")
        return (
            f'<div class="{place}"><p>{self.summary} <em>(An interactive figure: run the cell, or trust the notebook, '
            "to see it.)</em></p></div>\n"
            f'<script type="module">\n{self.script()}\n'
            f"const state = {state};\n"
            f'for (const el of document.getElementsByClassName("{place}"))\n'
            "  if (!el.shadowRoot) figure.render({ model: { get: (key) => state[key] }, el });\n"
            "</script>"
        )

    def widget(self) -> object:
        """The same figure as an anywidget, for layouts of ipywidgets; unlike the figure itself it needs a kernel.

        Raises:
            ImportError: Without anywidget, which ``pip install "e3va_lite[notebooks]"`` brings.
        """
        import anywidget
        import traitlets

        class Figure(anywidget.AnyWidget):
            _esm = self.script()
            data = traitlets.Dict(self.data).tag(sync=True)
            style = traitlets.Unicode(self.style()).tag(sync=True)

        return Figure()
