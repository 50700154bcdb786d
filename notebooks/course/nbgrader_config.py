"""nbgrader's settings for this course; every command is run in this folder."""

import re
from pathlib import Path

from nbconvert.exporters import HTMLExporter
from nbconvert.filters import strip_ansi
from nbconvert.preprocessors import CSSHTMLHeaderPreprocessor
from nbgrader.preprocessors import ClearHiddenTests, GetGrades, NbGraderPreprocessor
from nbgrader.utils import is_grade

c = get_config()  # noqa: F821, nbgrader defines it

c.CourseDirectory.course_id = "e3va"
c.ClearSolutions.code_stub = {"python": '# YOUR CODE HERE\nraise NotImplementedError("this task has no answer yet")'}
c.ExecutePreprocessor.timeout = 300  # seconds that one cell may take
c.ExecutePreprocessor.startup_timeout = 120
guard = str(Path(__file__).with_name("guard.py").resolve(strict=True))
c.Execute.extra_arguments = [f"--IPKernelApp.exec_lines=import runpy; runpy.run_path({guard!r}, run_name='guard')"]

# What zip_collect reads off the names of downloaded files: STUDENT_..._ASSIGNMENT.ipynb, no underscore in STUDENT.
c.FileNameCollectorPlugin.named_regexp = r".*?(?P<student_id>[^_/\\]+)_(?:[^/\\]*_)?(?P<file_id>\d_[a-z_]+\.ipynb)$"


class ClearTracebacks(NbGraderPreprocessor):
    """Leaves out what a traceback quotes of the test cells: hidden tests stand there, and answers in them.

    What is quoted of the student's own cells stays.
    """

    def preprocess(self, nb, resources):
        tests = {cell.execution_count for cell in nb.cells if is_grade(cell)}

        def quotes_a_test(frame: str) -> bool:
            number = re.search(r"Cell In\s*\[(\d+)\]", strip_ansi(frame))
            return number is not None and int(number[1]) in tests

        for output in (output for cell in nb.cells for output in cell.get("outputs", ())):
            if output.output_type == "error":
                output.traceback = [frame for frame in output.traceback if not quotes_a_test(frame)]
        return nb, resources


c.GenerateFeedback.preprocessors = [GetGrades, ClearHiddenTests, ClearTracebacks, CSSHTMLHeaderPreprocessor]


class FeedbackPage(HTMLExporter):
    """The list at the head of nbgrader's page calls every test "Test cell": here each has its name."""

    def from_notebook_node(self, nb, resources=None, **keywords):
        page, resources = super().from_notebook_node(nb, resources, **keywords)
        return re.sub(r'(<a href="#(\w+)">)Test cell</a>', r"\1\2</a>", page), resources


c.GenerateFeedback.exporter_class = FeedbackPage
