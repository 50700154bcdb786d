"""Two processes are one process with twice the batch, and only what is trained travels between them."""

import csv
import json
import multiprocessing
import os
import signal
import socket
import subprocess
import sys

import pytest
import torch
from torch import nn
from torchvision.models.detection._utils import BalancedPositiveNegativeSampler

from e3va_lite.datasets.shapes import write_scenes
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.tasks.registry import task_module
from e3va_lite.training import distributed
from e3va_lite.training.engine import Training, build_model, evaluate, fit
from e3va_lite.training.runs import train
from e3va_lite.training.trained_model import open_run

CPU = torch.device("cpu")
pytestmark = pytest.mark.usefixtures("one_thread")
SPAWN = multiprocessing.get_context("forkserver")
SPAWN.set_forkserver_preload(["e3va_lite.training.runs", "e3va_lite.tasks.voc", "torch.utils.tensorboard"])
COMMON = {"batch": 1, "steps": 4, "clip": None, "workers": 0}
RECIPES = {
    "voc": ("shapes", {"min_size": 96, "max_size": 96, "fpn_channels": 16}),
    "coco": (
        "coco-nano",
        {"min_size": 96, "min_sizes": [96], "max_size": 96, "fpn_channels": 16, "head_channels": 32},
    ),
    "ade20k": ("ade20k-nano", {"crop": 96, "scale": [96, 96], "ratio": [1.0, 1.0], "head_channels": 16}),
}


def together(target, *arguments):
    """Run a function in two processes that know of each other as ``torchrun`` would have told them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    processes = [SPAWN.Process(target=_joined, args=(target, rank, port, *arguments)) for rank in range(2)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(300)
    assert [process.exitcode for process in processes] == [0, 0]


def _joined(target, rank, port, *arguments):
    torch.set_num_threads(1)
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    distributed.start(CPU)
    target(*arguments)
    distributed.stop()


class First(BalancedPositiveNegativeSampler):
    """Sampling fixed: the first so many, instead of any so many."""

    def __call__(self, matched):
        chosen = [], []
        for labels in matched:
            most = int(self.batch_size_per_image * self.positive_fraction)
            positive = torch.where(labels >= 1)[0][:most]
            negative = torch.where(labels == 0)[0][: self.batch_size_per_image - len(positive)]
            for part, index in zip(chosen, (positive, negative), strict=True):
                part.append(torch.zeros_like(labels, dtype=torch.uint8).index_fill(0, index, 1))
        return chosen


def prepared(task, root, batch):
    """A training whose randomness is fixed: no flips, no sampling, batch norm and dropout at rest."""
    name, changes = RECIPES[task]
    recipe = load_recipe(name, {**COMMON, **changes, "batch": batch})
    data = task_module(task).dataset(recipe, root, recipe.train_split, recipe.classes, train=True)
    # In double precision, so that what differs is not the order of a sum.
    training = Training(build_model(recipe, len(data.classes)).double(), data, recipe, CPU)
    for module in training.model.modules():
        if isinstance(module, nn.BatchNorm2d | nn.Dropout | nn.Dropout2d):
            module.eval()
        for key, value in vars(module).items():
            if isinstance(value, BalancedPositiveNegativeSampler):
                setattr(module, key, First(value.batch_size_per_image, value.positive_fraction))
    return training


def one_step(task, root, batch, folder):
    training = prepared(task, root, batch)
    travelled = []
    if distributed.world() > 1:

        def hook(_, bucket):
            travelled.extend(bucket.parameters())
            flat = bucket.buffer() / distributed.world()
            return torch.distributed.all_reduce(flat, async_op=True).get_future().then(lambda f: f.value()[0])

        training.parallel.register_comm_hook(None, hook)
    images, targets = next(training.batches())
    training.backward([([image.double() for image in images], targets)])
    names = {id(p): name for name, p in training.model.named_parameters()}
    torch.save(
        {
            "grads": {name: p.grad for name, p in training.model.named_parameters() if p.requires_grad},
            "travelled": [names[id(p)] for p in travelled],
        },
        folder / f"{distributed.world()}-{distributed.rank()}.pt",
    )


@pytest.mark.parametrize("task", ["voc", "coco", "ade20k"])
def test_two_processes_give_the_gradients_of_one_with_twice_the_batch(task, tmp_path):
    if task == "ade20k":
        pytest.importorskip("cv2", exc_type=ImportError)
    write_scenes(tmp_path / "scenes", task, train=4, val=1, seed=3, size=96)
    together(one_step, task, tmp_path / "scenes", 2, tmp_path)
    one_step(task, tmp_path / "scenes", 4, tmp_path)
    whole, a, b = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    largest = max(grad.abs().max() for grad in whole["grads"].values())
    for name, grad in whole["grads"].items():
        assert torch.equal(a["grads"][name], b["grads"][name]), name
        assert (a["grads"][name] - grad).abs().max() <= 1e-6 * max(largest, 1), name
    assert sorted(a["travelled"]) == sorted(whole["grads"])  # all that is trained, and nothing else


def differing(root):
    """Frozen weights and buffers that differ between the processes go on differing: nobody sends them."""
    training = prepared("voc", root, 1)
    rank = float(distributed.rank())
    model = training.model
    frozen = [p for p in model.parameters() if not p.requires_grad]
    model.register_buffer("mark", torch.zeros(1))
    for tensor in (*frozen, model.mark):
        tensor.data += rank
    before = [tensor.clone() for tensor in frozen]
    training = Training(model, training.dataset, training.recipe, CPU)
    images, targets = next(training.batches())
    batch = [image.double() for image in images], targets
    training.backward([batch])
    training.update([batch])
    assert model.mark == rank and all(torch.equal(a, b) for a, b in zip(frozen, before, strict=True))


def test_frozen_parameters_and_buffers_are_never_sent(tmp_path):
    write_scenes(tmp_path / "scenes", "voc", train=4, val=1, seed=3, size=96)
    together(differing, tmp_path / "scenes")


# Evaluation


class Narrower(torch.utils.data.Dataset):
    """Images of several widths: every second one loses a third of it, every third one half."""

    def __init__(self, dataset):
        self.dataset, self.classes = dataset, dataset.classes

    def __len__(self):
        return len(self.dataset)

    def __getitem__(self, index):
        image, target = self.dataset[index]
        width = image.shape[-1] * (6, 4, 3)[index % 3] // 6
        inside = target["boxes"][:, 2] <= width
        return image[..., :width], target | {key: target[key][inside] for key in ("boxes", "labels", "difficult")}


SEES = {"min_size": 64, "max_size": 96, "fpn_channels": 16, "workers": 0, "train_split": "val", "lr": 5e-3}


def evaluated(root, batch, file):
    """The metric of a detector that knows a little, of images of several sizes."""
    recipe = load_recipe("shapes", {**SEES, "batch": batch})
    model = build_model(recipe, 6)
    model.load_state_dict(torch.load(root / "model.pt"))
    metric = evaluate(model, Narrower(task_module("voc").dataset(recipe, root, "val")), recipe, CPU)
    if metric is not None:
        file.write_text(json.dumps(metric))


def test_the_metric_depends_neither_on_the_batch_nor_on_the_number_of_processes(tmp_path):
    write_scenes(tmp_path / "scenes", "voc", train=1, val=9, seed=3, size=96)
    recipe = load_recipe("shapes", {**SEES, "epochs": None, "steps": 60, "batch": 4})
    data = task_module("voc").dataset(recipe, tmp_path / "scenes", "val", train=True)
    model = build_model(recipe, 6)
    fit(model, data, recipe, CPU)
    torch.save(model.state_dict(), tmp_path / "scenes" / "model.pt")
    for batch in (1, 2, 4):
        evaluated(tmp_path / "scenes", batch, tmp_path / f"{batch}.json")
    together(evaluated, tmp_path / "scenes", 3, tmp_path / "two.json")
    one, *others = [json.loads((tmp_path / f"{name}.json").read_text()) for name in ("1", "2", "4", "two")]
    assert 0 < one["ap50_all_point"] < 1 and all(other == one for other in others)


# Runs


def trained_by_both(root, folder):
    recipe = load_recipe("shapes", RECIPES["voc"][1] | COMMON | {"steps": 2})
    seen, backward = [], Training.backward

    def noted(self, batches):
        losses = backward(self, batches)
        seen.append(sum(losses.values()).item())
        return losses

    Training.backward = noted
    train(root, recipe, folder / "run", CPU)
    (folder / f"{distributed.rank()}.json").write_text(json.dumps(seen))


def test_the_losses_that_are_kept_are_the_mean_over_the_processes(tmp_path):
    write_scenes(tmp_path / "scenes", "voc", train=4, val=1, seed=3, size=96)
    together(trained_by_both, tmp_path / "scenes", tmp_path)
    a, b = (json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2))
    with (tmp_path / "run/losses.csv").open(encoding="utf-8") as file:
        kept = [float(row["loss"]) for row in csv.DictReader(file)]
    assert a != b and kept == pytest.approx([(x + y) / 2 for x, y in zip(a, b, strict=True)], rel=1e-12)


def stopped_on_one(root, folder):
    """Only the second process is asked to stop: both have to, after the same step."""
    recipe = load_recipe("shapes", RECIPES["voc"][1] | COMMON | {"steps": 50})
    backward = Training.backward

    def asked(self, batches):
        losses = backward(self, batches)
        if distributed.rank() == 1 and self.step == 1:
            os.kill(os.getpid(), signal.SIGTERM)
        return losses

    Training.backward = asked
    with pytest.raises(KeyboardInterrupt):
        train(root, recipe, folder / "run", CPU)


def test_processes_stop_together_and_keep_their_state(tmp_path):
    write_scenes(tmp_path / "scenes", "voc", train=4, val=1, seed=3, size=96)
    together(stopped_on_one, tmp_path / "scenes", tmp_path)
    assert open_run(tmp_path / "run").step == 2


def test_a_stray_variable_is_no_launch(monkeypatch):
    for name in ("RANK", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert distributed.start(CPU) == CPU and distributed.world() == 1


@pytest.mark.slow
def test_torchrun_trains_evaluates_and_resumes(tmp_path):
    write_scenes(tmp_path / "scenes", "voc", train=6, val=3, seed=0, size=64)
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"]
    command += ["--standalone", "-m", "e3va_lite", "train", "voc", "--recipe", "shapes", "--json"]
    command += ["--root", tmp_path / "scenes", "--out", tmp_path / "run"]
    for setting in ("min_size=64", "max_size=64", "fpn_channels=16", "epochs=2", "batch=1", "eval_every=1"):
        command += ["--set", setting]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True, env=environment)
    assert done.returncode == 0, done.stderr
    result = json.loads(done.stdout)  # printed by one process alone
    assert result["processes"] == 2 and result["steps"] == 6 and len(result["evaluations"]) == 2
    # The evaluation that two processes shared out is the evaluation of one.
    from e3va_lite.training.runs import evaluate_run

    assert evaluate_run(tmp_path / "run", None, None, CPU)["result"] == result["result"]
