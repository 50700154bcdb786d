"""Stands between a student's notebook and the tests that grade it: nbgrader's kernels here run this first.

It notices what needs no skill: code that rewrites the test cells before they run or replaces what they call, and code
that looks for the answers in files. It is no prison: who runs what others wrote needs an account in which that can do
no harm.
"""

import os
import sys
from pathlib import Path
from types import FunctionType

from IPython import get_ipython
from IPython.core.error import InputRejected

#: Events of Python that start a process or give a file another name.
STARTS = ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn", "os.fork", "os.forkpty", "pty.spawn")
MOVES = ("os.rename", "os.link", "os.symlink")

#: Modules that tests call, those of e3va_lite apart.
TOOLS = ("builtins", "torch", "torch.autograd", "torch.nn", "torch.nn.functional", "torch.nn.init")


def replaced() -> list[str]:
    """Functions and classes that the notebook has put into packages that the tests call, as torch.allclose."""
    names = [name for name in sys.modules if name in TOOLS or name.split(".")[0] == "e3va_lite"]
    owners = {name: sys.modules[name] for name in names}
    if "torch" in owners:
        owners["torch.Tensor"] = owners["torch"].Tensor
    return [
        f"{name}.{key}"
        for name, owner in owners.items()
        for key, value in vars(owner).items()
        if isinstance(value, FunctionType | type) and value.__module__ == "__main__"
    ]


def reject_tampering(shell) -> None:
    """Let no cell run while something is in place that changes cells before they run, or what they call."""
    transform = shell.transform_ast
    inputs = list(shell.input_transformers_post)

    def checked(node):
        if shell.ast_transformers or shell.input_transformers_post != inputs:
            raise InputRejected("this notebook changes its cells before they are run (`ast_transformers`): not graded.")
        if found := replaced():
            raise InputRejected(f"this notebook replaces {found[0]}, which tests may call: not graded.")
        return transform(node)

    shell.transform_ast = checked


def hide_answers(course: Path, desk: Path) -> None:
    """Refuse, from now on, to open a file in which answers may stand, and to start another process.

    Args:
        course: The folder in which nbgrader works: sources, gradebook, and what others have handed in.
        desk: The folder in it where this notebook is graded; what lies there may be read.
    """
    here = Path(__file__).resolve().parent
    root = here.parents[1]
    hidden = tuple(f"{path.resolve()}{os.sep}" for path in (course, here, root / "tests", root / ".git"))
    allowed = f"{desk.resolve()}{os.sep}"

    def refuse(event: str, args: tuple) -> None:
        if event in STARTS:
            raise PermissionError("no other process can be started while a notebook is graded.")
        if event in ("open", "sqlite3.connect", *MOVES):
            for name in args[: 2 if event in MOVES else 1]:
                if isinstance(name, str | bytes | os.PathLike):
                    path = os.path.realpath(os.fsdecode(name)) + os.sep
                    if path.startswith(hidden) and not path.startswith(allowed):
                        raise PermissionError(f"{path[:-1]} cannot be used while a notebook is graded.")

    sys.addaudithook(refuse)


def stand_guard() -> None:
    """In a kernel: cells are always guarded, answers where nbgrader grades, which is autograded/STUDENT/ASSIGNMENT."""
    reject_tampering(get_ipython())
    desk = Path.cwd()
    if desk.parent.parent.name == "autograded":
        hide_answers(desk.parents[2], desk)


if __name__ == "guard":  # run_path in nbgrader_config.py, which keeps these names out of the notebook's
    stand_guard()
