"""Nothing is lost: runs that are killed, files that are damaged, disks that are full."""

import json
import multiprocessing
import os
import pickle
import random
import resource
import shutil
import signal
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from e3va_lite import InputError, build_backbone
from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.training import checkpoint, runs, trained_model
from e3va_lite.training.export import export, load_adapters, load_exported

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
SMALL = {"min_size": 64, "max_size": 64, "fpn_channels": 16, "batch": 2, "steps": 8, "save_every": 1, "warmup": 2}
SPAWN = multiprocessing.get_context("forkserver")  # its children find everything imported
SPAWN.set_forkserver_preload(["e3va_lite.training.runs", "e3va_lite.tasks.voc", "torch.utils.tensorboard"])


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


def work(root, recipe, folder, resume, die_in=None):
    """In a process of its own: train, or die at the worst moment."""
    torch.set_num_threads(1)
    if die_in is not None:
        renamed = Path.replace

        def replace(self, target):
            work.saves = getattr(work, "saves", 0) + (Path(target).name == trained_model.LAST)
            if work.saves == die_in:
                os.kill(os.getpid(), signal.SIGKILL)  # written in full, but not yet under its name
            return renamed(self, target)

        Path.replace = replace
    runs.train(root, recipe, folder, CPU, resume=resume)


def start(*arguments, **options):
    process = SPAWN.Process(target=work, args=arguments, kwargs=options)
    process.start()
    return process


def same_ending(folder, other):
    """All weights, all of the optimiser's state, and the losses of every step: equal bit for bit."""
    a, b = (load_file(f / trained_model.LAST) for f in (folder, other))
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    assert (folder / runs.LOSSES).read_text() == (other / runs.LOSSES).read_text()
    results = [json.loads((f / runs.RESULT).read_text())["evaluations"] for f in (folder, other)]
    assert results[0] == results[1]


def killed(root, recipe, folder, kills, seed):
    """Train, killed ``kills`` times at random moments; a run that ends sooner is begun anew. Yields every ended run."""
    chance, done = random.Random(seed), 0
    for _ in range(2):  # the first process pays for the imports of all
        start_of_run = time.monotonic()
        process = start(root, recipe, folder, resume=False)
        process.join()
        length = time.monotonic() - start_of_run
        shutil.rmtree(folder)
    while done < kills:
        process = start(root, recipe, folder, resume=(folder / trained_model.RECIPE).is_file())
        process.join(chance.uniform(0.1, 0.8) * length)
        if process.is_alive():
            process.kill()
            done += 1
        process.join()
        assert process.exitcode in (0, -signal.SIGKILL), "a resumed run failed"
        if process.exitcode == 0 and done < kills:
            yield folder
            shutil.rmtree(folder)
    if not (folder / runs.RESULT).is_file():
        process = start(root, recipe, folder, resume=(folder / trained_model.RECIPE).is_file())
        process.join()
        assert process.exitcode == 0
    yield folder


def test_a_killed_run_ends_as_if_nothing_had_happened(scenes, whole, tmp_path):
    for folder in killed(scenes, small(), tmp_path / "run", kills=3, seed=0):
        same_ending(folder, whole)


@pytest.mark.parametrize("saves", [1, 4])
def test_a_run_killed_while_it_saves_goes_on_from_the_save_before(saves, scenes, whole, tmp_path):
    process = start(scenes, small(), tmp_path / "run", resume=False, die_in=saves)
    process.join()
    assert process.exitcode == -signal.SIGKILL
    assert (tmp_path / "run" / f"{trained_model.LAST}.tmp").exists()
    if saves > 1:
        assert trained_model.open_run(tmp_path / "run").step == saves - 1
    runs.train(scenes, small(), tmp_path / "run", CPU, resume=True)
    same_ending(tmp_path / "run", whole)


def test_random_numbers_inside_the_model_are_those_of_the_step(scenes, tmp_path):
    """Stochastic depth draws at every step; a run that goes on has to draw what it would have drawn."""
    recipe = small(method="full", drop_path_rate=0.9, steps=4)
    runs.train(scenes, recipe, tmp_path / "whole", CPU)
    process = start(scenes, recipe, tmp_path / "run", resume=False, die_in=3)
    process.join()
    runs.train(scenes, recipe, tmp_path / "run", CPU, resume=True)
    same_ending(tmp_path / "run", tmp_path / "whole")


@pytest.mark.slow
@pytest.mark.parametrize("task", ["voc", "coco", "ade20k"])
def test_twenty_kills(task, tmp_path):
    root, recipe = tmp_path / "scenes", f"{task}-nano"
    write_scenes(root, task, train=5, val=2, seed=0, size=64)
    changes = {"steps": 12, "save_every": 1, "batch": 2, "workers": 0}
    if task == "ade20k":
        changes |= {"crop": 64, "scale": [64, 64], "head_channels": 16, "eval_split": "validation"}
    else:
        changes |= {"min_size": 64, "max_size": 64, "fpn_channels": 16, "train_split": "train"}
    if task == "coco":
        changes |= {"min_sizes": [64], "head_channels": 32, "samples": 16, "train_split": "train2017"}
    if task == "voc":
        changes |= {"eval_split": "val"}
    recipe = load_recipe(recipe, changes)
    process = start(root, recipe, tmp_path / "whole", resume=False)
    process.join()
    for folder in killed(root, recipe, tmp_path / "run", kills=20, seed=1):
        same_ending(folder, tmp_path / "whole")


def test_a_full_disk_is_one_sentence_and_the_last_checkpoint_is_kept(scenes, whole, tmp_path):
    # A run of three steps, then a limit on the size of files below that of a checkpoint.
    shutil.copytree(whole, tmp_path / "run")
    (tmp_path / "run" / runs.RESULT).unlink()
    tensors, state = checkpoint.read(tmp_path / "run" / trained_model.LAST)
    checkpoint.write(tmp_path / "run" / trained_model.LAST, tensors, state | {"step": 3, "evaluations": []})
    before = (tmp_path / "run" / trained_model.LAST).read_bytes()
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    handler = signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (len(before) // 2, hard))
    try:
        with pytest.raises(InputError, match=r"cannot be written .*; the one before it is still there: make room"):
            runs.train(scenes, small(), tmp_path / "run", CPU, resume=True)
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        signal.signal(signal.SIGXFSZ, handler)
    assert (tmp_path / "run" / trained_model.LAST).read_bytes() == before
    assert not list((tmp_path / "run").glob("*.tmp"))


def test_a_resume_with_another_recipe_says_what_differs(scenes, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / runs.RESULT).unlink()
    with pytest.raises(InputError, match=r"was another \(batch 2, not 3; lr 0.002, not 0.1\)"):
        runs.train(scenes, small(batch=3, lr=0.1), folder, CPU, resume=True)
    with pytest.raises(InputError, match="no run to resume"):
        runs.train(scenes, small(), tmp_path / "elsewhere", CPU, resume=True)
    with pytest.raises(InputError, match="is finished"):
        runs.train(scenes, small(), whole, CPU, resume=True)


def test_a_resume_with_other_data_says_so(scenes, whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / runs.RESULT).unlink()
    other = shutil.copytree(scenes, tmp_path / "scenes")
    listing = other / "ImageSets/Main/train.txt"
    listing.write_text("\n".join(listing.read_text().split()[:4]))
    with pytest.raises(InputError, match=r"have changed \(images .*5.*, not .*4"):
        runs.train(other, small(), folder, CPU, resume=True)
    moved = shutil.copytree(scenes, tmp_path / "moved")  # the same elsewhere is the same
    runs.train(moved, small(), folder, CPU, resume=True)


# Checkpoints are data


class Malice:
    def __reduce__(self):
        return (os.system, ("touch executed",))


@pytest.mark.parametrize("make", ["pickle", "torch", "zip as safetensors"])
def test_no_checkpoint_executes_anything(make, whole, scenes, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / runs.RESULT).unlink()
    if make == "pickle":
        (folder / trained_model.LAST).write_bytes(pickle.dumps(Malice()))
    else:
        torch.save({"model": Malice()}, folder / trained_model.LAST, _use_new_zipfile_serialization=make != "torch")
    for load in (
        lambda: trained_model.open_run(folder),
        lambda: runs.train(scenes, small(), folder, CPU, resume=True),
        lambda: load_exported(folder / trained_model.LAST),
    ):
        with pytest.raises(InputError, match="cannot be read as a safetensors file"):
            load()
    assert not (tmp_path / "executed").exists()


def test_a_recipe_executes_nothing(whole, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = shutil.copytree(whole, tmp_path / "run")
    (folder / trained_model.RECIPE).write_text("task: !!python/object/apply:os.system ['touch executed']\n")
    with pytest.raises(InputError, match="not valid YAML"):
        trained_model.open_run(folder)
    assert not (tmp_path / "executed").exists()


def test_another_safetensors_file_is_refused(whole, tmp_path):
    folder = shutil.copytree(whole, tmp_path / "run")
    tensors, state = checkpoint.read(folder / trained_model.LAST)
    save_file(tensors, folder / trained_model.LAST)
    with pytest.raises(InputError, match="was not written by this version"):
        trained_model.open_run(folder)
    name = next(name for name in tensors if name.startswith("head"))
    checkpoint.write(folder / trained_model.LAST, {k: v for k, v in tensors.items() if k != name}, state)
    with pytest.raises(InputError, match=f"does not fit the model of its recipe, first at '{name}'"):
        trained_model.open_run(folder)


def test_saved_files_hold_what_training_changes_and_nothing_frozen(whole, scenes, tmp_path):
    assert (whole / trained_model.BEST).stat().st_size < 2e6  # the frozen 14 MB stay out
    model = trained_model.open_run(whole).model
    runs.train(scenes, small(method="full", steps=1), tmp_path / "full", CPU)
    assert (tmp_path / "full" / trained_model.BEST).stat().st_size > 14e6
    tensors = checkpoint.read(whole / trained_model.LAST)[0]
    assert all(torch.equal(tensors[name], model.state_dict()[name]) for name in checkpoint.kept_names(model))


# Exported files


def test_an_exported_file_makes_the_same_model(whole, tmp_path):
    export(whole, tmp_path / "model.safetensors")
    model, again = trained_model.open_run(whole).model, load_exported(tmp_path / "model.safetensors")
    assert again.classes[0] == "star" and again.recipe == small()
    assert all(torch.equal(value, again.model.state_dict()[key]) for key, value in model.state_dict().items())


def test_adapters_alone_go_into_the_backbone_they_were_made_with(whole, tmp_path):
    path = tmp_path / "adapters.safetensors"
    size = export(whole, path, backbone_only=True)
    model = trained_model.open_run(whole).model
    learnt = sum(p.numel() for p in model.backbone.body.parameters() if p.requires_grad)
    assert 4 * learnt < size < 4 * learnt + 30_000  # float32, and the names
    backbone = build_backbone("e3va", "swin_nano", pretrained=True, stages=(2, 3, 4))
    images = torch.randn(1, 3, 64, 96)
    assert not torch.equal(backbone(images)[0], model.backbone.body(images)[0])
    load_adapters(backbone, path)
    assert all(torch.equal(a, b) for a, b in zip(backbone(images), model.backbone.body(images), strict=True))


def test_adapters_are_refused_by_everything_else(whole, tmp_path):
    path = tmp_path / "adapters.safetensors"
    export(whole, path, backbone_only=True)
    with pytest.raises(InputError, match="belongs to the backbone swin_nano, not to swin_tiny"):
        load_adapters(build_backbone("e3va", "swin_tiny_patch4_window7_224", stages=(2, 3, 4)), path)
    with pytest.raises(InputError, match="other pretrained weights of swin_nano"):
        load_adapters(build_backbone("e3va", "swin_nano", stages=(2, 3, 4)), path)
    for other in ({"method": "adapter"}, {"method": "e3va", "rank": 4}):
        backbone = build_backbone(**other, name="swin_nano", pretrained=True, stages=(2, 3, 4))
        before = {name: tensor.clone() for name, tensor in backbone.state_dict().items()}
        with pytest.raises(InputError, match="does not fit the model"):
            load_adapters(backbone, path)
        assert all(torch.equal(tensor, before[name]) for name, tensor in backbone.state_dict().items())
    with pytest.raises(InputError, match="holds no neck and head"):
        load_exported(path)
    with pytest.raises(InputError, match="not written by `e3va export`"):
        load_adapters(build_backbone("e3va", "swin_nano", stages=(2, 3, 4)), whole / trained_model.LAST)
    with pytest.raises(InputError, match="exists"):
        export(whole, path)


def test_swin_large_adapters_fit_in_eight_megabytes():
    with torch.device("meta"):
        backbone = build_backbone("e3va", "swin_large_patch4_window7_224", stages=(1, 2, 3, 4))
    state = checkpoint.kept_state(backbone)
    buffers = sum(state[name].numel() for name, _ in backbone.named_buffers() if name in state)
    assert sum(tensor.numel() * tensor.element_size() for tensor in state.values()) < 8e6 - 100_000, buffers
