"""nbgrader's settings for this course; every command is run in this folder."""

c = get_config()  # noqa: F821, nbgrader defines it

c.CourseDirectory.course_id = "e3va"
c.ExecutePreprocessor.timeout = 300  # seconds that one cell may take
c.ExecutePreprocessor.startup_timeout = 120
