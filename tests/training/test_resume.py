"""What was computed is saved before anything that can fail, and a run goes on wherever its result stays the same."""

import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
import time
from itertools import islice
from pathlib import Path

import pytest
import torch

from e3va_lite import InputError
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.training import checkpoint, engine, run_folder, runs, trained_model
from e3va_lite.training.sampling import StepSampler

from .test_runs import same_ending

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"min_size": 64, "max_size": 64, "fpn_channels": 16, "batch": 2, "steps": 6, "warmup": 2}


@pytest.fixture(scope="module")
def scenes(tmp_path_factory):
    root = tmp_path_factory.mktemp("scenes") / "voc"
    write_scenes(root, "voc", train=5, val=2, seed=0, size=64)
    return root


def small(**changes):
    return load_recipe("shapes", SMALL | changes)


@pytest.fixture(scope="module")
def whole(one_thread, scenes, tmp_path_factory):
    """A run that nothing happened to."""
    folder = tmp_path_factory.mktemp("runs") / "whole"
    runs.train(scenes, small(), folder, CPU)
    return folder


def interrupted(scenes, folder, step, recipe=None, number=signal.SIGINT, **options):
    """A run whose process gets a signal while it computes that step."""
    backward = engine.Training.backward

    def asked(self, batches):
        losses = backward(self, batches)
        if self.step + 1 == step:
            os.kill(os.getpid(), number)
        return losses

    with pytest.MonkeyPatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(engine.Training, "backward", asked)
        runs.train(scenes, recipe or small(), folder, CPU, **options)
    return folder


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped_ends_its_step_and_goes_on_there(number, scenes, whole, tmp_path, capsys):
    handlers = signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)
    folder = interrupted(scenes, tmp_path / "run", 3, number=number)
    assert (signal.getsignal(signal.SIGINT), signal.getsignal(signal.SIGTERM)) == handlers
    assert "the state after step 3 is saved: go on with --resume" in capsys.readouterr().err
    assert trained_model.open_run(folder).step == 3
    runs.train(scenes, small(), folder, CPU, resume=True)
    assert "resuming at step 3 of 6" in capsys.readouterr().err
    same_ending(folder, whole)
    assert json.loads((folder / run_folder.RESULT).read_text())["bit_exact"] is True


def test_ctrl_c_from_a_terminal_also_reaches_the_image_readers(scenes, tmp_path):
    command = [sys.executable, "-m", "e3va_lite", "train", "voc", "--recipe", "shapes", "--root", str(scenes)]
    for key, value in (SMALL | {"steps": 100000, "workers": 2}).items():
        command += ["--set", f"{key}={value}"]
    process = subprocess.Popen(
        [*command, "--out", str(tmp_path / "run")], stderr=subprocess.PIPE, text=True, start_new_session=True
    )
    losses = tmp_path / "run" / runs.LOSSES
    while process.poll() is None and (not losses.is_file() or len(losses.read_text().splitlines()) < 4):
        time.sleep(0.1)
    os.killpg(process.pid, signal.SIGINT)  # as a terminal does
    error = process.communicate(timeout=60)[1]
    assert process.returncode == 130 and "Traceback" not in error and "go on with --resume" in error, error
    assert trained_model.open_run(tmp_path / "run").step >= 3


def test_a_signal_in_an_evaluation_stops_at_once_and_nothing_is_lost(scenes, whole, tmp_path, monkeypatch):
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr(runs, "evaluate", lambda *_: os.kill(os.getpid(), signal.SIGTERM))
        runs.train(scenes, small(), tmp_path / "run", CPU)
    assert trained_model.open_run(tmp_path / "run").step == 6
    runs.train(scenes, small(), tmp_path / "run", CPU, resume=True)
    same_ending(tmp_path / "run", whole)


@pytest.mark.parametrize(("split", "saved"), [("val", 6), ("train", 2)])
def test_an_image_that_cannot_be_read_costs_nothing_that_was_computed(split, saved, scenes, whole, tmp_path):
    root = shutil.copytree(scenes, tmp_path / "scenes")
    fifth = list(islice(StepSampler(5, 1, 1, 0), 5))[-1][0][1]  # with batches of two, the third step sees it first
    name = (root / f"ImageSets/Main/{split}.txt").read_text().split()[fifth if split == "train" else -1]
    image = root / f"JPEGImages/{name}.jpg"
    content = image.read_bytes()
    image.write_bytes(content[: len(content) // 2])
    with pytest.raises(InputError, match=name):
        runs.train(root, small(), tmp_path / "run", CPU)
    assert trained_model.open_run(tmp_path / "run").step == saved
    image.write_bytes(content)
    runs.train(root, small(), tmp_path / "run", CPU, resume=True)
    same_ending(tmp_path / "run", whole)


def test_a_checkpoint_is_written_by_time_too(scenes, tmp_path, monkeypatch):
    saved = []
    monkeypatch.setattr(runs, "SAVE_SECONDS", 0)
    monkeypatch.setattr(checkpoint, "write", lambda path, tensors, about: saved.append((path.name, about["step"])))
    runs.train(scenes, small(steps=2), tmp_path / "run", CPU)
    assert [step for name, step in saved if name == trained_model.LAST] == [1, 2]


def test_what_does_not_change_the_result_may_be_another(scenes, whole, tmp_path):
    folder = interrupted(scenes, tmp_path / "run", 2)
    runs.train(scenes, small(workers=1, save_every=1, eval_every=4), folder, CPU, resume=True)
    result = json.loads((folder / run_folder.RESULT).read_text())
    assert [e["step"] for e in result["evaluations"]] == [4, 6] and result["bit_exact"]
    a, b = (checkpoint.read(f / trained_model.LAST)[0] for f in (folder, whole))
    assert all(torch.equal(a[key], b[key]) for key in a)


def test_the_weights_file_may_have_moved_but_not_changed(scenes, tmp_path):
    from e3va_lite.backbones.swin import PRETRAINED

    here = str(shutil.copy(PRETRAINED / "swin_nano.safetensors", tmp_path / "here.safetensors"))
    folder = interrupted(scenes, tmp_path / "run", 2, small(weights=here))
    moved = str(Path(here).rename(tmp_path / "there.safetensors"))
    runs.train(scenes, small(weights=moved, steps=6), folder, CPU, resume=True)
    assert trained_model.open_run(folder).recipe.weights == moved
    folder = interrupted(scenes, tmp_path / "other", 2, small(pretrained=False))
    with pytest.raises(InputError, match=r"the data, weights or processes .* have changed \(weights "):
        runs.train(scenes, small(pretrained=False, weights=moved), folder, CPU, resume=True)


def test_a_change_on_purpose_is_allowed_and_written_into_the_run(scenes, whole, tmp_path, capsys):
    folder = interrupted(scenes, tmp_path / "run", 3)
    with pytest.raises(InputError, match=r"was another \(lr 0.002, not 0.0001\).*on purpose with --set"):
        runs.train(scenes, small(lr=1e-4), folder, CPU, resume=True)
    with pytest.raises(InputError, match=r"was another \(fpn_channels 16, not 8\).*choose another --out"):
        runs.train(scenes, small(fpn_channels=8), folder, CPU, resume=True, changes=["fpn_channels"])
    recipe = small(lr=1e-4)
    interrupted(scenes, folder, 5, recipe, resume=True, changes=["lr"])
    assert "changed from here on: lr 0.002 -> 0.0001" in capsys.readouterr().err
    assert load_recipe(str(folder / trained_model.RECIPE)) == recipe
    runs.train(scenes, recipe, folder, CPU, resume=True)  # now it is the run's own
    result = json.loads((folder / run_folder.RESULT).read_text())
    assert result["bit_exact"] is False and result["changes"] == [{"after_step": 3, "lr": [0.002, 0.0001]}]
    losses, before = ((f / runs.LOSSES).read_text().splitlines() for f in (folder, whole))
    assert losses[:5] == before[:5] and losses[6] != before[6]  # the fourth loss is before the first changed update


def test_a_run_may_be_made_longer_but_not_shorter_than_it_is(scenes, tmp_path):
    folder = interrupted(scenes, tmp_path / "run", 3)
    with pytest.raises(InputError, match="has done 3 steps already"):
        runs.train(scenes, small(steps=2), folder, CPU, resume=True, changes=["steps"])
    assert runs.train(scenes, small(steps=8), folder, CPU, resume=True, changes=["steps"])["steps"] == 8


def test_blank_and_torn_lines_of_the_losses_are_no_lines(scenes, whole, tmp_path):
    folder = interrupted(scenes, tmp_path / "run", 3)
    text = (folder / runs.LOSSES).read_text()
    (folder / runs.LOSSES).write_text(text.replace("\n", "\n\n") + "\n2\n")
    runs.train(scenes, small(), folder, CPU, resume=True)
    same_ending(folder, whole)


def test_a_relative_root_is_found_from_another_folder(scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(scenes.parent)
    runs.train(Path(scenes.name), small(steps=1), tmp_path / "run", CPU)
    monkeypatch.chdir(tmp_path)
    assert runs.evaluate_run(tmp_path / "run", None, None, CPU)["result"]["step"] == 1


def test_files_of_a_run_have_the_permissions_of_new_files(whole, tmp_path):
    (tmp_path / "plain").touch()
    mode = stat.S_IMODE((tmp_path / "plain").stat().st_mode)
    files = [path for path in whole.iterdir() if path.is_file() and path.name != run_folder.LOCK]
    assert len(files) == 5 and {stat.S_IMODE(path.stat().st_mode) for path in files} == {mode}


# One folder, one run


def test_the_second_of_two_runs_into_one_folder_is_refused(scenes, tmp_path, monkeypatch):
    dataset, refused, at_once = runs.task_module("voc").dataset, [], threading.Lock()

    def while_the_first_reads(*arguments, **options):
        if at_once.acquire(blocking=False):  # not for the evaluation's data, nor in the second run
            for also in ({}, {"overwrite": True}):
                with pytest.raises(InputError) as error:
                    runs.train(scenes, small(), tmp_path / "run", CPU, **also)
                refused.append(str(error.value))
        return dataset(*arguments, **options)

    monkeypatch.setattr(runs.task_module("voc"), "dataset", while_the_first_reads)
    runs.train(scenes, small(steps=1), tmp_path / "run", CPU)
    assert len(refused) == 2 and all("another training is writing into" in message for message in refused)


def test_a_running_run_is_not_resumed(scenes, tmp_path, monkeypatch):
    folder = interrupted(scenes, tmp_path / "run", 2)
    monkeypatch.setattr(run_folder, "LOCK_SECONDS", 0)
    with run_folder.claimed(folder, False, True), pytest.raises(InputError, match="another training is writing into"):
        runs.train(scenes, small(), folder, CPU, resume=True)


@pytest.mark.parametrize("breaks", ["data", "model", "first step"])
def test_overwrite_replaces_only_when_the_new_run_has_proved_that_it_can_start(breaks, scenes, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    before = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    recipe = {"data": small(train_split="trian"), "model": small(options={"rank": 0}), "first step": small(lr=1e-3)}
    with pytest.MonkeyPatch.context() as patch, pytest.raises((InputError, RuntimeError)):
        if breaks == "first step":

            def fail(*_):
                raise RuntimeError("out of memory")

            patch.setattr(engine.Training, "backward", fail)
        runs.train(scenes, recipe[breaks], folder, CPU, overwrite=True)
    assert {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()} == before
    runs.train(scenes, small(steps=1), folder, CPU, overwrite=True)
    assert trained_model.open_run(folder).step == 1


def test_a_new_run_that_cannot_start_leaves_no_folder(scenes, tmp_path):
    with pytest.raises(InputError):
        runs.train(scenes, small(train_split="trian"), tmp_path / "deep/run", CPU)
    assert not (tmp_path / "deep/run").exists()


def test_places_where_no_run_can_be_are_one_sentence(scenes, whole, tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "latest").symlink_to(whole)
    (tmp_path / "dangling").symlink_to("nothing")
    for place, message in (
        ("file/run", "is not a folder"),
        ("file", "is a file"),
        ("latest", "is a link: give the folder itself"),
        ("dangling", "link to something that does not exist"),
    ):
        with pytest.raises(InputError, match=message):
            runs.train(scenes, small(), tmp_path / place, CPU, overwrite=True)
    assert trained_model.open_run(whole).step == 6


def test_a_run_killed_before_its_first_file_is_whole_can_be_begun_again(scenes, whole, tmp_path):
    folder = tmp_path / "run"
    folder.mkdir()
    # All that such a run leaves, and a lock:
    (folder / f"{trained_model.RECIPE}.tmp").write_text("task: v", encoding="utf-8")
    (folder / run_folder.LOCK).touch()
    runs.train(scenes, small(), folder, CPU)
    same_ending(folder, whole)
    assert not list(folder.glob("*.tmp"))
