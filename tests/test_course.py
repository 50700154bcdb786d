"""The course's autograder, graded: right answers get all points, wrong ones lose what they should, and are told why.

Most tests run a source notebook's code cells in this process, in order, with other answers in its solution cells; the
last ones hand notebooks to nbgrader itself.
"""

import contextlib
import functools
import importlib
import io
import json
import re
import shutil
from pathlib import Path

import nbformat
import pytest

from e3va_lite.analysis import fit_on_gpu
from tests.course_answers import Wrong

COURSE = Path(__file__).parent.parent / "notebooks" / "course"
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
    assert {cell: number for cell, (number, _) in lost(assignment, stubs(assignment)).items()} == points(assignment)


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


def generated(assignment: str, folder: Path) -> dict:
    """What nbgrader makes of a source, without its gradebook."""
    from nbgrader.converters import GenerateAssignment
    from nbgrader.coursedir import CourseDirectory
    from nbgrader.preprocessors import SaveCells
    from traitlets.config import Config

    config = Config()
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
    from traitlets.config import PyFileConfigLoader

    root = tmp_path_factory.mktemp("course")
    shutil.copytree(COURSE / "source", root / "source")
    config = PyFileConfigLoader("nbgrader_config.py", str(COURSE)).load_config()
    config.CourseDirectory.root = str(root)
    api = NbGraderAPI(CourseDirectory(config=config), config=config)
    for assignment in ASSIGNMENTS:
        result = api.generate_assignment(assignment)
        assert result["success"], result["log"]
    return api


def handed_in(api, student: str, assignment: str, answers: dict[str, str]) -> tuple[dict[str, float], str]:
    """A student fills in the release, nbgrader grades it: the points of every grade cell, and the graded notebook."""
    root = Path(api.coursedir.root)
    notebook = nbformat.read(root / "release" / assignment / f"{assignment}.ipynb", as_version=4)
    for cell in notebook.cells:
        cell.source = answers.get(cell.metadata.get("nbgrader", {}).get("grade_id"), cell.source)
    folder = root / "submitted" / student / assignment
    folder.mkdir(parents=True)
    nbformat.write(notebook, folder / f"{assignment}.ipynb")
    result = api.autograde(assignment, student)
    assert result["success"], result["log"]
    with api.gradebook as book:
        submission = book.find_submission_notebook(assignment, assignment, student)
        scores = {grade.name: grade.auto_score for grade in submission.grades}
    return scores, (root / "autograded" / student / assignment / f"{assignment}.ipynb").read_text()


@pytest.mark.slow
@pytest.mark.parametrize("assignment", ASSIGNMENTS)
def test_nbgrader_gives_the_reference_solution_full_marks(nbgrader, assignment):
    reference = {about(cell)["grade_id"]: cell.source for cell in cells(assignment) if about(cell)["solution"]}
    scores, _ = handed_in(nbgrader, "right", assignment, reference)
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
