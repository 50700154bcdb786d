"""The course's autograder, graded: right answers get all points, wrong ones lose what they should, and are told why.

Most tests run a source notebook's code cells in this process, in order, with other answers in its solution cells; the
last ones hand notebooks to nbgrader itself.
"""

import ast
import contextlib
import functools
import html
import importlib
import io
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from pathlib import Path

import nbformat
import pytest

from e3va_lite.analysis import fit_on_gpu
from tests.course_answers import Wrong

ROOT = Path(__file__).parent.parent
COURSE = ROOT / "notebooks" / "course"
ASSIGNMENTS = sorted(path.name for path in (COURSE / "source").iterdir() if path.is_dir())
ANSWERS = {name: importlib.import_module(f"tests.course_answers.a{name}") for name in ASSIGNMENTS}

pytestmark = pytest.mark.filterwarnings("ignore:Object of type")  # nbgrader's use of sqlalchemy


@functools.cache
def cells(assignment: str, folder: str = "source") -> list[nbformat.NotebookNode]:
    """The code cells of an assignment's notebook."""
    path = COURSE / folder / assignment / f"{assignment}.ipynb"
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def about(cell: nbformat.NotebookNode) -> dict:
    """What nbgrader knows of a cell; nothing of one that only shows something."""
    return cell.metadata.get("nbgrader", {"grade": False, "solution": False, "grade_id": cell.id})


def points(assignment: str) -> dict[str, int]:
    """Grade cell -> what it gives."""
    return {about(cell)["grade_id"]: about(cell)["points"] for cell in cells(assignment) if about(cell)["grade"]}


def solutions(assignment: str) -> list[str]:
    return [about(cell)["grade_id"] for cell in cells(assignment) if about(cell)["solution"]]


def lost(assignment: str, answers: dict[str, str], look: bool = False) -> dict[str, tuple[int, str]]:
    """Run the notebook with these answers: grade cell that fails -> points lost, and what is said.

    Cells that only show something are left out, unless ``look`` is set.
    """
    assert answers.keys() <= set(solutions(assignment))
    names = {"__name__": "__main__"}
    failures = {}
    for cell in cells(assignment):
        if "nbgrader" not in cell.metadata and not look:
            continue
        name = about(cell)["grade_id"]
        code = compile(answers.get(name, cell.source), f"<{name}>", "exec")
        try:
            with contextlib.redirect_stdout(io.StringIO()):
                exec(code, names)
        except Exception as error:
            if about(cell)["grade"]:
                failures[name] = (about(cell)["points"], f"{type(error).__name__}: {error}")
            elif not about(cell)["solution"]:
                raise
    return failures


def stubs(assignment: str) -> dict[str, str]:
    """What a student finds in the solution cells."""
    return {about(cell)["grade_id"]: cell.source for cell in cells(assignment, "release") if about(cell)["solution"]}


@pytest.fixture(autouse=True)
def _quick_dry_runs(monkeypatch):
    """Dry runs of Swin-L take seconds: those of the last assignment were done once."""

    def dry_peak(recipe, size, batch):
        options = ",".join(f"{key}={str(value).lower()}" for key, value in recipe.options.items())
        method = f"{recipe.method}:{options}" if options else recipe.method
        return ANSWERS["5_fit"].PEAKS[method][batch - 1] * 2**20

    monkeypatch.setattr(fit_on_gpu, "dry_peak", dry_peak)


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_the_reference_solution_gets_full_marks(assignment):
    assert lost(assignment, {}, look=True) == {}


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_an_empty_submission_gets_nothing(assignment):
    failures = lost(assignment, stubs(assignment))
    assert {cell: number for cell, (number, _) in failures.items()} == points(assignment)
    assert not [said for _, said in failures.values() if "no answer yet" not in said]


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_answers_that_do_nothing_get_nothing(assignment):
    assert ANSWERS[assignment].IDLE.keys() == set(solutions(assignment))
    failures = lost(assignment, ANSWERS[assignment].IDLE)
    assert {cell: number for cell, (number, _) in failures.items()} == points(assignment)


@pytest.mark.slow
@pytest.mark.parametrize(("assignment", "way"), [(name, way) for name in ASSIGNMENTS for way in ANSWERS[name].CORRECT])
def test_another_right_way_gets_full_marks(assignment, way):
    assert lost(assignment, ANSWERS[assignment].CORRECT[way]) == {}


@pytest.mark.slow
@pytest.mark.parametrize(
    ("assignment", "wrong"),
    [pytest.param(name, wrong, id=f"{name}-{wrong.mistake}") for name in ASSIGNMENTS for wrong in ANSWERS[name].WRONG],
)
def test_a_wrong_answer_loses_what_it_should_and_is_told_why(assignment, wrong: Wrong):
    failures = lost(assignment, {wrong.cell: wrong.code})
    assert {cell: number for cell, (number, _) in failures.items()} == {
        cell: number for cell, (number, _) in wrong.loses.items()
    }, failures
    for cell, (_, fragment) in wrong.loses.items():
        assert fragment in failures[cell][1]


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_tests_raise_and_do_not_assert(assignment):
    """An assertion can be taken out of a program by a switch; a ``raise`` cannot."""
    for cell in cells(assignment):
        assert not [node for node in ast.walk(ast.parse(cell.source)) if isinstance(node, ast.Assert)]


def test_there_are_enough_answers():
    for name in ASSIGNMENTS:
        assert len(ANSWERS[name].CORRECT) >= 5
        written = {cell for way in ANSWERS[name].CORRECT.values() for cell in way}
        assert written == set(solutions(name)), "a solution cell that no other way writes"
        covered = {cell for wrong in ANSWERS[name].WRONG for cell in wrong.loses}
        assert covered == points(name).keys(), "a grade cell that no wrong answer fails"
    assert sum(len(ANSWERS[name].WRONG) for name in ASSIGNMENTS) >= 25


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_the_release_is_what_the_source_gives(assignment, tmp_path):
    release = COURSE / "release" / assignment / f"{assignment}.ipynb"
    assert generated(assignment, tmp_path) == json.loads(release.read_text())


def test_the_times_to_choose_from_are_the_committed_ones():
    (cell,) = (cell for cell in cells("5_fit") if about(cell)["grade_id"] == "measured")
    exec(cell.source, names := {})
    rows = json.loads((COURSE.parents[1] / "data" / "results" / "price-swin-l.json").read_text())["rows"]
    measured = {row["method"].replace("e3va:memory=compress", "e3va"): row for row in rows}
    for row in names["ROWS"]:
        assert row["peak"] == round(measured[row["method"]]["peak"] / fit_on_gpu.MIB)
        assert row["time"] == round(measured[row["method"]]["of_full"]["step"], 2)


@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_the_head_of_an_assignment_says_what_it_is_worth(assignment):
    notebook = nbformat.read(COURSE / "source" / assignment / f"{assignment}.ipynb", as_version=4)
    head = notebook.cells[0].source
    total = sum(points(assignment).values())
    assert "you can" in head and re.search(rf"\*\*{total} points, about \d+ minutes", head)
    assert not any(cell.get("outputs") for cell in notebook.cells)
    tasks = [
        int(number) for cell in notebook.cells for number in re.findall(r"## Task.*\((\d+) points?\)", cell.source)
    ]
    assert sum(tasks) == total
    page = (COURSE / "README.md").read_text()
    assert re.search(rf"\| `{assignment}` \|.*\| {total} \|", page)


def settings() -> dict:
    """What nbgrader reads in the course's folder."""
    from traitlets.config import PyFileConfigLoader

    return PyFileConfigLoader("nbgrader_config.py", str(COURSE)).load_config()


def generated(assignment: str, folder: Path) -> dict:
    """What nbgrader makes of a source, without its gradebook."""
    from nbgrader.converters import GenerateAssignment
    from nbgrader.coursedir import CourseDirectory
    from nbgrader.preprocessors import SaveCells

    config = settings()
    config.CourseDirectory.root = str(folder)
    config.CourseDirectory.source_directory = str(COURSE / "source")
    config.CourseDirectory.assignment_id = assignment
    config.GenerateAssignment.no_database = True
    converter = GenerateAssignment(coursedir=CourseDirectory(config=config), config=config)
    converter.preprocessors = [step for step in converter.preprocessors if step is not SaveCells]
    converter.start()
    return json.loads((folder / "release" / assignment / f"{assignment}.ipynb").read_text())


@pytest.fixture(scope="module")
def nbgrader(tmp_path_factory):
    """nbgrader in a folder of its own, with the course's settings; its release has been generated."""
    from nbgrader.apps import NbGraderAPI
    from nbgrader.coursedir import CourseDirectory

    root = tmp_path_factory.mktemp("course")
    shutil.copytree(COURSE / "source", root / "source")
    config = settings()
    config.CourseDirectory.root = str(root)
    api = NbGraderAPI(CourseDirectory(config=config), config=config)
    for assignment in ASSIGNMENTS:
        result = api.generate_assignment(assignment)
        assert result["success"], result["log"]
    return api


def handed_in(
    api, student: str, assignment: str, answers: dict[str, str], sources: bool = False
) -> tuple[dict[str, float], str]:
    """A student fills in the release, nbgrader grades it: the points of every grade cell, and the graded notebook.

    While it is graded the sources are not there, unless ``sources`` is set: grading does not need them.
    """
    root = Path(api.coursedir.root)
    notebook = nbformat.read(root / "release" / assignment / f"{assignment}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = answers.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
    folder = root / "submitted" / student / assignment
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / f"{assignment}.ipynb")
    away = root / "source" if sources else root / "nowhere"
    (root / "source").rename(away)
    try:
        result = api.autograde(assignment, student)
    finally:
        away.rename(root / "source")
    assert result["success"], result["log"]
    with api.gradebook as book:
        submission = book.find_submission_notebook(assignment, assignment, student)
        scores = {grade.name: grade.auto_score for grade in submission.grades}
    return scores, (root / "autograded" / student / assignment / f"{assignment}.ipynb").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_nbgrader_gives_the_reference_solution_full_marks(nbgrader, assignment):
    reference = {about(cell)["grade_id"]: cell.source for cell in cells(assignment) if about(cell)["solution"]}
    scores, _ = handed_in(nbgrader, "ada", assignment, reference)  # whose leaks the last task of 4_find_the_leak names
    assert scores == points(assignment)


@pytest.mark.slow
def test_nbgrader_takes_the_points_of_wrong_answers_and_says_why(nbgrader):
    """One mistake in three of the tasks, and one task left out."""
    planted = {wrong.mistake: wrong for wrong in ANSWERS["1_adapter"].WRONG}
    mistakes = [planted[name] for name in ("missing skip", "W formed", "both factors zero")]
    answers = {about(cell)["grade_id"]: cell.source for cell in cells("1_adapter") if about(cell)["solution"]}
    answers |= {wrong.cell: wrong.code for wrong in mistakes}
    del answers["projection_parameters"]
    scores, graded = handed_in(nbgrader, "wrong", "1_adapter", answers)
    expected = points("1_adapter") | {"count_projection": 0}
    for cell, (number, fragment) in (item for wrong in mistakes for item in wrong.loses.items()):
        expected[cell] -= number
        assert fragment in graded
    assert scores == expected
    page = feedback(nbgrader, "wrong", "1_adapter")
    for fragment in (fragment for wrong in mistakes for _, fragment in wrong.loses.values()):
        assert fragment in page


WITHOUT_ASSERTIONS = """
import ast


class WithoutAssertions(ast.NodeTransformer):
    def visit_Assert(self, node):
        return ast.Pass()


get_ipython().ast_transformers.append(WithoutAssertions())
"""

FROM_THE_SOURCE = """
import json
from pathlib import Path

for cell in json.loads(Path("../../../source/{name}/{name}.ipynb").read_text())["cells"]:
    if cell["metadata"].get("nbgrader", {{}}).get("solution"):
        exec("".join(cell["source"]))
"""


@pytest.mark.slow
@pytest.mark.parametrize("answer", [WITHOUT_ASSERTIONS, WITHOUT_ASSERTIONS.replace("Assert", "Raise")])
def test_who_rewrites_the_test_cells_gets_nothing(nbgrader, answer):
    """Every answer does nothing; the first one sees to it that this is not noticed."""
    answers = dict(ANSWERS["1_adapter"].IDLE)
    answers["adapter"] = answer + answers["adapter"]
    scores, graded = handed_in(nbgrader, f"rewriter{len(answer)}", "1_adapter", answers)
    assert scores == dict.fromkeys(points("1_adapter"), 0)
    assert "this notebook changes its cells before they are run" in graded


@pytest.mark.slow
def test_who_looks_for_the_sources_finds_none(nbgrader):
    answers = dict.fromkeys(solutions("1_adapter"), "pass")
    answers["adapter"] = FROM_THE_SOURCE.format(name="1_adapter")
    scores, graded = handed_in(nbgrader, "reader", "1_adapter", answers, sources=True)
    assert scores == dict.fromkeys(points("1_adapter"), 0)
    assert "cannot be used while a notebook is graded" in graded


@pytest.mark.slow
def test_leaks_are_those_of_who_hands_in_and_feedback_does_not_say_them(nbgrader):
    """Somebody hands in what was right for ada, and names two of the suspects wrongly."""
    answers = {about(cell)["grade_id"]: cell.source for cell in cells("4_find_the_leak") if about(cell)["solution"]}
    answers["found"] = ANSWERS["4_find_the_leak"].named(B="flags", entered=4)
    scores, _ = handed_in(nbgrader, "grace", "4_find_the_leak", answers)
    lost = ("name_B", "entered_stage", "leak_1", "leak_2", "leak_3")
    assert scores == points("4_find_the_leak") | dict.fromkeys(lost, 0)
    page = feedback(nbgrader, "grace", "4_find_the_leak")
    assert "the leaks of 'ada' were handed in by 'grace'" in page
    assert "two passes in train mode differ" in page


def feedback(api, student: str, assignment: str) -> str:
    """The text of a student's page, in which no line of a hidden test may stand, and every test has its name."""
    result = api.generate_feedback(assignment, student)
    assert result["success"], result["log"]
    page = (Path(api.coursedir.root) / "feedback" / student / assignment / f"{assignment}.html").read_text()
    assert "Test cell" not in page
    for name in points(assignment):
        assert f'<a href="#{name}">{name}</a>' in page
    text = html.unescape(re.sub(r"<[^>]+>", "", page))
    seen = "\n".join(cell.source for cell in cells(assignment, "release"))
    for cell in cells(assignment):
        for hidden in re.findall(r"### BEGIN HIDDEN TESTS\n(.*?)### END HIDDEN TESTS", cell.source, re.S):
            lines = {line.strip() for line in hidden.splitlines() if line.strip() not in seen}
            assert not [line for line in lines if line in text]
    return text


def errors_in_a_guarded_shell(folder: Path, cells: list[str]) -> list[str]:
    """What cells raise, or "", in a shell like a kernel's that starts as nbgrader's do."""
    start = settings().Execute.extra_arguments[0].removeprefix("--IPKernelApp.exec_lines=")
    program = f"""
import json
from IPython.core.interactiveshell import InteractiveShell
shell = InteractiveShell.instance()
shell.run_cell({start!r})
ran = [shell.run_cell(code) for code in {cells!r}]
print(json.dumps([str(done.error_before_exec or done.error_in_exec or "") for done in ran]))
"""
    environment = os.environ | {"PYTHONPATH": str(ROOT), "IPYTHONDIR": str(folder / "ipython")}
    done = subprocess.run(
        [sys.executable, "-c", program], cwd=folder, env=environment, capture_output=True, text=True, check=True
    )
    return json.loads(done.stdout.splitlines()[-1])


def test_while_a_notebook_is_graded_no_answers_can_be_read(tmp_path):
    desk = tmp_path / "autograded" / "ada" / "1_adapter"
    for path, text in ((desk / "own.txt", "mine"), (tmp_path / "source" / "solution.txt", "theirs")):
        path.parent.mkdir(parents=True)
        path.write_text(text)
    read = "import pathlib; pathlib.Path({!r}).read_text()".format
    expected = {
        "os = Path = refuse = replaced = None; import torch, e3va_lite; e3va_lite.trace": "",
        read("own.txt"): "",
        read("../../../source/solution.txt"): "solution.txt cannot be used",
        read(str(COURSE / "source" / "1_adapter" / "1_adapter.ipynb")): "1_adapter.ipynb cannot be used",
        "import tests.course_answers": "cannot be used",
        "import os; os.link('../../../source/solution.txt', 'solution.txt')": "solution.txt cannot be used",
        "import sqlite3; sqlite3.connect('../../../gradebook.db')": "gradebook.db cannot be used",
        "os.system('cat ../../../source/solution.txt')": "no other process",
        "!cat ../../../source/solution.txt": "no other process",
        "import subprocess; subprocess.run(['cat', '../../../source/solution.txt'])": "no other process",
        "hide_answers": "name 'hide_answers' is not defined",
    }
    errors = errors_in_a_guarded_shell(desk, list(expected))
    for (code, part), error in zip(expected.items(), errors, strict=True):
        assert part in error if part else not error, (code, error)


@pytest.mark.parametrize(
    ("code", "objection"),
    [
        (WITHOUT_ASSERTIONS, "changes its cells before they are run"),
        ("get_ipython().input_transformers_post.append(lambda lines: [])", "changes its cells before they are run"),
        ("import torch; torch.allclose = lambda *args, **options: True", "replaces torch.allclose"),
        ("import torch; torch.Tensor.equal = lambda *args: True", "replaces torch.Tensor.equal"),
        ("import e3va_lite; e3va_lite.assert_isolated = lambda *args, **options: None", "replaces e3va_lite.assert"),
    ],
)
def test_a_notebook_that_tampers_with_its_tests_is_not_run_on(tmp_path, code, objection):
    first, second, third = errors_in_a_guarded_shell(tmp_path, [code, "1 + 1", "assert False"])
    assert not first and objection in second and objection in third


def commands(heading: str) -> list[str]:
    """The commands of the instructor's page in the first block under a heading."""
    section = (COURSE / "README.md").read_text().split(f"\n## {heading}\n")[1]
    return re.search(r"```\n(.*?)```", section, re.S)[1].splitlines()


@pytest.mark.slow
def test_the_first_command_works_on_a_fresh_clone(tmp_path):
    """There the release exists and the gradebook does not; grading needs both."""
    from nbgrader.api import Gradebook

    for name in ("README.md", "nbgrader_config.py", "guard.py"):
        shutil.copy(COURSE / name, tmp_path)
    for name in ("source", "release"):
        shutil.copytree(COURSE / name, tmp_path / name)
    for command in commands("Release"):
        program = [sys.executable, "-m", *command.split()]
        done = subprocess.run(program, cwd=tmp_path, capture_output=True, text=True, check=True)
        assert "Skipping existing" not in done.stderr
    with Gradebook(f"sqlite:///{tmp_path / 'gradebook.db'}") as book:
        assert book.find_notebook("1_adapter", "1_adapter").max_score == sum(points("1_adapter").values())


@pytest.mark.skipif(not (ROOT / ".git").exists(), reason="what is handed out is made of a commit")
def test_what_students_are_given_has_no_answers_and_everything_else(tmp_path):
    (command,) = commands("What students get")
    archive = tmp_path / "students.zip"
    subprocess.run(re.sub(r"--output=\S+", f"--output={archive}", command), shell=True, cwd=ROOT, check=True)
    with zipfile.ZipFile(archive) as handed_out:
        names = {name.removeprefix("e3va/") for name in handed_out.namelist()}
        for name in handed_out.namelist():
            if name.endswith((".ipynb", ".py", ".md")):
                text = handed_out.read(name)
                assert b"BEGIN SOLUTION" not in text and b"BEGIN HIDDEN TESTS" not in text, name
    assert not [name for name in names if name.startswith(("tests", "notebooks/course/source"))]
    assert {f"notebooks/course/release/{name}/{name}.ipynb" for name in ASSIGNMENTS} < names
    assert {"pyproject.toml", "e3va_lite/__init__.py", "notebooks/03_the_highway.ipynb"} < names
    assert any(name.startswith("data/results/") for name in names)
