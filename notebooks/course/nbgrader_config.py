"""nbgrader's settings for this course; every command is run in this folder."""

c = get_config()  # noqa: F821, nbgrader defines it

c.CourseDirectory.course_id = "e3va"
c.ExecutePreprocessor.timeout = 300  # seconds that one cell may take
c.ExecutePreprocessor.startup_timeout = 120

# What zip_collect reads off the names of downloaded files: STUDENT_..._ASSIGNMENT.ipynb, no underscore in STUDENT.
c.FileNameCollectorPlugin.named_regexp = r".*?(?P<student_id>[^_/\\]+)_(?:[^/\\]*_)?(?P<file_id>\d_[a-z_]+\.ipynb)$"
