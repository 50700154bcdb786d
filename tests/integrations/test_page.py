"""The page of this folder says what happens."""

import re
from pathlib import Path

PAGE = Path(__file__).with_name("README.md")


def test_the_python_of_the_page_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (code,) = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)
    exec(code, names := {})
    (said,) = re.findall(r"^# (e3va on .*) \.\.\.$", code, re.M)
    assert capsys.readouterr().out.startswith(said)
    assert {path.name for path in Path("night").iterdir()} == {
        "e3va_config.json", "e3va_adapters.safetensors", "e3va_rest.safetensors"
    }  # fmt: skip
    assert [tuple(m.shape) for m in names["maps"]] == [(1, 16, 24, 96), (1, 8, 12, 192), (1, 4, 6, 384), (1, 2, 3, 768)]


def test_every_example_is_on_the_page():
    page = PAGE.read_text(encoding="utf-8")
    examples = {path.name for path in PAGE.parent.glob("test_*.py")} - {Path(__file__).name}
    assert examples == set(re.findall(r"\]\((test_\w+\.py)\)", page))
