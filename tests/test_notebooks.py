"""The walkthrough: committed outputs are those of a clean run, every notebook runs, and a browser can run one.

To run all notebooks again and keep their outputs:
``TQDM_DISABLE=1 jupyter nbconvert --to notebook --execute --inplace notebooks/0*.ipynb``. The test in a browser needs
Playwright and Chromium (``pip install playwright && playwright install chromium``, or the system's own Chromium).
"""

import contextlib
import copy
import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from importlib.util import find_spec
from pathlib import Path

import nbformat
import pytest

NOTEBOOKS = Path(__file__).parents[1] / "notebooks"
WALKTHROUGH = sorted(NOTEBOOKS.glob("0*.ipynb"))
MAX_OUTPUT, MAX_ALL = 200_000, 8_000_000  # bytes
MAX_SECONDS = 180  # each; together 12 minutes
INTERACTIVE = {name: NOTEBOOKS / f"{name}.ipynb" for name in ("04_proofs", "07_memory_and_time")}
START = NOTEBOOKS / "00_start_here.ipynb"
GUESS = re.compile(r"^my_guess = None  # \S", re.M)
# A term of the glossary, where it is written otherwise in a sentence.
WRITTEN = {"link": r"\blinks?\b", "tap": r"\btaps?\b", "neck": r"\b[Nn]eck", "W-MSA and SW-MSA": r"\bW/SW-MSA"}
WRITTEN |= {"shifted window": r"\bshifted\b", "stochastic depth": r"stochastic depth", "Cascade Mask R-CNN": r"Cascade"}
IN_BROWSER = NOTEBOOKS / "05_low_rank.ipynb"  # figures, a slider, and soon over
ON_A_MACHINE = re.compile(r"/home/|/root/|/tmp/|/usr/|/opt/|/Users/|[A-Z]:\\\\|site-packages|object at 0x")

each = pytest.mark.parametrize("path", WALKTHROUGH, ids=lambda path: path.stem)


def read(path):
    return nbformat.read(path, as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def text(notebook):
    return "\n".join(cell.source for cell in notebook.cells)


def prose(notebook):
    return "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")


def test_there_are_ten_in_order():
    assert [path.name[:2] for path in WALKTHROUGH] == [f"{number:02}" for number in range(10)]


@each
def test_outputs_are_those_of_a_run_from_top_to_bottom(path):
    notebook = read(path)
    nbformat.validate(notebook)
    assert notebook.metadata.kernelspec.name == "python3"
    assert [cell.execution_count for cell in code(notebook)] == list(range(1, len(code(notebook)) + 1))
    for cell in code(notebook):
        for output in cell.outputs:
            assert output.output_type != "error" and output.get("name") != "stderr", cell.source
            assert len(json.dumps(output)) <= MAX_OUTPUT, cell.source
    assert not ON_A_MACHINE.search(json.dumps(notebook))


def test_all_together_are_small():
    assert sum(path.stat().st_size for path in NOTEBOOKS.rglob("*.ipynb")) <= MAX_ALL


@each
def test_a_notebook_opens_and_closes_like_the_others(path):
    notebook = read(path)
    assert "After this notebook you can\n" in notebook.cells[0].source
    assert "e3va_lite.__version__" in code(notebook)[0].source
    last = notebook.cells[-1].source
    assert "## What was shown" in last and re.findall(r"^(\d)\. ", last.split("## Questions")[1], re.M) == [
        "1",
        "2",
        "3",
    ]


@each
def test_every_question_has_an_answer_to_unfold(path):
    """With its difficulty and the minutes that it takes; and a prediction has its measurement, folded, too."""
    notebook = read(path)
    answers = re.findall(
        r"<summary>Answer \((easy|medium|hard), (\d+) minutes\)</summary>\n\n +\S", notebook.cells[-1].source
    )
    assert len(answers) == 3 and all(0 < int(minutes) <= 15 for _, minutes in answers)
    assert text(notebook).count("<details>") == text(notebook).count("</details>")
    waiting = False
    for cell in code(notebook):
        asks = GUESS.search(cell.source) is not None
        assert not (asks and waiting), "a prediction is asked for, and the one before was never answered"
        if "reveal(my_guess" in cell.source:
            assert waiting, cell.source
            (result,) = (output for output in cell.outputs if output.output_type == "execute_result")
            assert result.data["text/html"].startswith("<details><summary>")
            waiting = False
        waiting |= asks
    assert not waiting


@each
def test_every_picture_has_a_description(path):
    for cell in code(read(path)):
        for output in cell.outputs:
            for kind in {"image/png", "image/jpeg"} & output.get("data", {}).keys():
                assert len(output.metadata.get(kind, {}).get("alt", "")) > 40, cell.source


def test_terms_of_the_glossary_are_linked_where_they_appear_first():
    terms = re.findall(r"^#### (.+)$", prose(read(START)), re.M)
    assert len(terms) == 10
    later = [cell.source for path in WALKTHROUGH[1:] for cell in read(path).cells if cell.cell_type == "markdown"]
    for term in terms:
        first = next(
            source for source in later if re.search(WRITTEN.get(term, term), re.sub(r"\]\(.*?\)", "]", source))
        )
        assert f"({START.name}#{term.replace(' ', '-')})" in first, (term, first[:200])


@each
def test_links_lead_somewhere(path):
    targets = re.findall(r"\]\((?!https?:)([^)#]+)\)", prose(read(path)))
    assert not [target for target in targets if not (path.parent / target).exists()]


def test_every_equation_figure_and_table_of_the_paper_has_its_cell():
    everything = "\n".join(text(read(path)) for path in WALKTHROUGH)
    assert {int(number) for number in re.findall(r"\\tag\{(\d+)\}", everything)} == set(range(1, 13))
    for number in range(1, 6):
        assert f"diagrams.figure{number}(" in everything
    for number in range(1, 7):
        assert re.search(rf"Tables? ([1-6] and )?{number}\b", everything)


def shape(notebook):
    """What the cells gave, without numbers: their kinds, and the words of texts."""
    found = []
    for cell in code(notebook):
        kinds = []
        for output in cell.outputs:
            if output.output_type == "stream":
                words = re.sub(r"[\d.,+%e-]*\d[\d.,+%e-]*|\s+|nan", " ", output.text).split()
                kinds += [word for word in words if word.isalpha()]
            else:
                kinds.append(sorted(output.data))
        found.append(kinds)
    return found


@pytest.mark.slow
@each
def test_a_notebook_runs(path):
    """From top to bottom, in time, and with the outputs that are committed, as far as machines agree."""
    nbclient = pytest.importorskip("nbclient")
    committed = read(path)
    notebook = copy.deepcopy(committed)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    start = time.monotonic()
    nbclient.NotebookClient(
        notebook, timeout=MAX_SECONDS, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOKS)}}
    ).execute(env={**os.environ, "TQDM_DISABLE": "1"})
    assert time.monotonic() - start < MAX_SECONDS
    assert shape(notebook) == shape(committed)


@pytest.fixture
def lab(tmp_path):
    """JupyterLab on a folder with one notebook without outputs; its address."""
    if shutil.which("jupyter-lab") is None:
        pytest.skip('no JupyterLab: pip install -e ".[notebooks]"')
    settings = tmp_path / "settings" / "@jupyterlab" / "notebook-extension" / "tracker.jupyterlab-settings"
    settings.parent.mkdir(parents=True)
    settings.write_text('{"windowingMode": "none"}')  # all cells are in the page, not only those on the screen
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    options = [
        "--allow-root",
        "--no-browser",
        f"--port={port}",
        "--IdentityProvider.token=",
        f"--ServerApp.root_dir={tmp_path}",
    ]
    server = subprocess.Popen(
        [sys.executable, "-m", "jupyter", "lab", *options],
        env={**os.environ, "JUPYTERLAB_SETTINGS_DIR": str(tmp_path / "settings")},
        stderr=subprocess.DEVNULL,
    )
    address = f"http://127.0.0.1:{port}"
    try:
        deadline = time.monotonic() + 60
        while time.monotonic() < deadline:
            with contextlib.suppress(OSError), urllib.request.urlopen(f"{address}/api"):
                break
            time.sleep(0.5)
        yield address
    finally:
        server.terminate()
        server.wait()


@pytest.fixture
def page():
    """A page of a browser without a screen: Playwright's own, or one that the system has."""
    playwright = pytest.importorskip("playwright.sync_api", reason="no Playwright: pip install playwright")
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    with playwright.sync_playwright() as p:
        if found is None and not Path(p.chromium.executable_path).exists():
            pytest.skip("no browser: playwright install chromium, or apt-get install chromium")
        options = ["--no-sandbox", "--disable-gpu", "--disable-background-networking"]
        browser = p.chromium.launch(executable_path=found, args=options)
        yield browser.new_page(viewport={"width": 1400, "height": 1000})
        browser.close()


@pytest.mark.slow
def test_run_all_in_a_browser(page, lab, tmp_path):
    """In a real JupyterLab: no error, and figures and sliders are on the page."""
    notebook = read(IN_BROWSER)
    for cell in code(notebook):
        cell.outputs, cell.execution_count = [], None
    nbformat.write(notebook, tmp_path / IN_BROWSER.name)
    cells = len(code(notebook))
    page.goto(f"{lab}/lab/tree/{IN_BROWSER.name}?reset")
    page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=60_000)  # the kernel, in the status bar
    page.locator(".jp-CodeCell").nth(cells - 1).wait_for(state="attached")
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text(re.compile("^Run All( Cells)?$")).click()
    done = f"""() => {{
        const prompts = [...document.querySelectorAll(".jp-CodeCell .jp-InputPrompt")].map(x => x.textContent);
        return prompts.length === {cells} && prompts.every((text, i) => text === `[${{i + 1}}]:`);
    }}"""
    page.wait_for_function(done, timeout=1000 * MAX_SECONDS)
    page.wait_for_selector(".widget-slider", timeout=10_000)
    if picture := os.environ.get("SCREENSHOT"):
        page.locator(".widget-slider").first.scroll_into_view_if_needed()
        page.screenshot(path=picture)
    errors = page.locator('[data-mime-type="application/vnd.jupyter.error"], [data-mime-type*="stderr"]')
    assert errors.count() == 0
    figures = sum("image/png" in output.get("data", {}) for cell in code(read(IN_BROWSER)) for output in cell.outputs)
    assert page.locator(".jp-OutputArea-output img").count() >= figures > 0


def in_figure(page, title, number=0):
    """An interactive figure of that title: a locator, and a function that says what its drawings are now."""
    figure = page.locator(".figure").filter(has=page.get_by_role("heading", name=title)).nth(number)
    figure.wait_for(timeout=10_000)
    return figure, lambda: figure.locator("svg").evaluate_all("all => all.map(svg => svg.innerHTML).join()")


def play_film(page, number=0):
    """The slider of the film moves by keys, and the picture with it; so does the button."""
    figure, drawn = in_figure(page, "One training step", number)
    first, slider = drawn(), figure.get_by_role("slider", name="Moment of the training step")
    slider.focus()
    for _ in range(30):
        page.keyboard.press("ArrowRight")
    assert slider.get_attribute("aria-valuetext") == "Forward pass: the backbone, moment 31 of 130"
    assert figure.get_by_text("running: stage 3, block 2").count() == 3  # all methods
    second = drawn()
    assert second != first
    page.keyboard.press("End")
    assert figure.get_by_text("the optimiser").count() >= 3 and drawn() not in (first, second)
    figure.get_by_role("button", name="Play or pause").click()
    page.wait_for_timeout(800)
    assert 1 <= int(slider.input_value()) < 30


def explore_paths(page):
    """Picks and switches change the picture, and what is said of it."""
    figure, drawn = in_figure(page, "The gradient's paths")
    seen = {drawn()}

    def look():
        seen.add(drawn())
        return figure.locator(".verdict").text_content(), figure.locator(".box.lit").count()

    figure.get_by_role("radio", name="adapter (inside)").check()
    figure.get_by_role("checkbox", name="freeze").check()
    # Sixteen adapters, the halves above the first of them, three reductions, four norms and the loss.
    assert look() == ("All that is trained gets its whole gradient.", 16 + 15 + 3 + 4 + 1)
    figure.get_by_label("Part of the network").select_option("a4b2.1")
    assert look()[1] == 5  # the two adapters of the last block, the MLP between them, norm and loss
    figure.get_by_role("checkbox", name="detach").check()
    assert "but not the loss's" in look()[0]
    figure.get_by_role("radio", name="e3va").check()
    assert look()[0] == "All that is trained gets its whole gradient."
    assert len(seen) == 5


PLAY = {"07_memory_and_time": play_film, "04_proofs": explore_paths}


@pytest.mark.slow
@pytest.mark.parametrize("name", INTERACTIVE)
def test_an_interactive_figure_plays_in_an_exported_page(page, tmp_path, name):
    """A file opened from the disk: no kernel, no server, and nothing from the network for the figure."""
    exporter = pytest.importorskip("nbconvert").HTMLExporter()
    file = tmp_path / f"{name}.html"
    file.write_text(exporter.from_filename(str(INTERACTIVE[name]))[0], encoding="utf-8")
    page.context.set_offline(True)
    errors = []
    page.on("pageerror", lambda error: errors.append(str(error)))
    page.goto(file.as_uri(), wait_until="commit")
    PLAY[name](page)
    assert not [error for error in errors if "require" not in error and "MathJax" not in error]


@pytest.mark.slow
def test_interactive_figures_play_in_jupyterlab(page, lab, tmp_path):
    """Drawn by a running kernel, from data of a committed notebook; as a widget, too, where there is anywidget."""
    notebook = nbformat.v4.new_notebook(metadata=read(IN_BROWSER).metadata)
    figures = ("from e3va_lite.analysis.interactive import Interactive", "import json")
    for name, figure in (("07_memory_and_time", "film_strip"), ("04_proofs", "path_explorer")):
        (tmp_path / f"{figure}.json").write_text(json.dumps(data_of(INTERACTIVE[name])))
        shown = f"Interactive('{figure}', json.load(open('{figure}.json')), '')"
        notebook.cells.append(nbformat.v4.new_code_cell("\n".join((*figures, shown))))
    if widget := find_spec("anywidget"):
        notebook.cells.append(nbformat.v4.new_code_cell(f"({notebook.cells[0].source.splitlines()[-1]}).widget()"))
    nbformat.write(notebook, tmp_path / "figures.ipynb")
    page.goto(f"{lab}/lab/tree/figures.ipynb?reset")
    page.get_by_text(re.compile(r"\| Idle$")).wait_for(timeout=60_000)
    page.get_by_role("menuitem", name="Run", exact=True).click()
    page.get_by_text(re.compile("^Run All( Cells)?$")).click()
    page.locator(".figure").nth(len(notebook.cells) - 1).wait_for(timeout=60_000)
    play_film(page)
    explore_paths(page)
    if widget:
        play_film(page, number=1)


def data_of(path):
    """The data of a notebook's interactive figure."""
    outputs = [output for cell in code(read(path)) for output in cell.outputs if "text/html" in output.get("data", {})]
    found = [re.search(r"^const state = (.*);$", output.data["text/html"], re.M) for output in outputs]
    return json.loads(next(filter(None, found))[1].replace("<\\/", "</"))["data"]
