import json
import os
from pathlib import Path

if "PYTEST_XDIST_WORKER" in os.environ:  # tests run side by side: a thread each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import pytest
import torch


def pytest_xdist_auto_num_workers(config) -> int:
    """Two workers; evidence measures, and so runs alone."""
    return 0 if config.option.markexpr == "evidence" else 2


@pytest.fixture(scope="session")
def device() -> torch.device:
    """The machine's CUDA device where there is one: the same tests run there too."""
    return torch.device("cuda" if torch.cuda.is_available() else "cpu")


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture(scope="session")
def real_data() -> str:
    """The folder of real images that E3VA_REAL_DATA names; tests that want it are skipped without."""
    folder = os.environ.get("E3VA_REAL_DATA")
    if not folder:
        pytest.skip("E3VA_REAL_DATA does not name a folder of real images")
    return folder


def pytest_addoption(parser) -> None:
    parser.addoption("--results", default=None, help="folder into which the evidence writes what it measured")


@pytest.fixture
def results(request):
    """``results(file, key, value)`` keeps a measurement in FOLDER/file.json, if --results names a folder."""

    def keep(name: str, key: str, value: object) -> None:
        if folder := request.config.getoption("--results"):
            path = Path(folder) / f"{name}.json"
            held = json.loads(path.read_text()) if path.exists() else {}
            path.write_text(json.dumps({**held, key: value}, indent=2) + "\n")

    return keep


@pytest.fixture(scope="module")
def one_thread():
    """Sums are split up by threads: what is to be equal bit for bit in two processes needs as many in both."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
