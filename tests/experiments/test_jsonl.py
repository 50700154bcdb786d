from e3va_lite.experiments.jsonl import append_line, read_lines


def test_lines_are_added_and_read(tmp_path):
    path = tmp_path / "new" / "runs.jsonl"
    assert read_lines(path) == []
    for number in range(3):
        append_line(path, {"number": number})
    assert read_lines(path) == [{"number": number} for number in range(3)]
    assert path.read_text().endswith("\n")


def test_a_line_that_was_cut_off_spoils_no_other(tmp_path):
    path = tmp_path / "runs.jsonl"
    append_line(path, {"number": 0})
    with path.open("a") as file:
        file.write('{"number": 1, "sco')
    append_line(path, {"number": 2})
    assert read_lines(path) == [{"number": 0}, {"number": 2}]
