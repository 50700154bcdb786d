"""The paper in miniature: which runs there are, and running them.

What is compared is in :mod:`e3va_lite.experiments.studies`. Every arm of a study first chooses its learning rate, on
images that are neither trained nor tested on then; afterwards it is trained once per seed and judged on the test
images. Steps, batch and the learning rate of neck and heads (the one that a frozen backbone chooses) are the same for
all arms of a study, and so is the order of the images for one seed. A finished run is a line of a JSON lines file, from
which :mod:`e3va_lite.experiments.report` makes everything else.
"""

import json
import os
import sys
import threading
import time
import warnings
from collections.abc import Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ProcessPoolExecutor, wait
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from functools import cache
from itertools import chain, islice
from multiprocessing import get_context, parent_process
from multiprocessing.process import BaseProcess
from pathlib import Path

import numpy as np
import torch
from torch import nn
from torch.utils.data import Dataset, Subset
from tqdm import tqdm

from ..analysis.cost import interleaved_seconds, median_share, with_method
from ..analysis.training_step import Step, build_step, training_size
from ..backbones.base import trainable_parameters
from ..backbones.registry import create_backbone
from ..backbones.weights import fingerprint
from ..errors import InputError
from ..highway import E3VA
from ..methods.registry import parse_method
from ..recipes.schema import Recipe, recipe_from
from ..tasks.registry import task_module
from ..training.engine import build_model, evaluate, fit, machine
from ..training.feature_cache import cached, can_be_cached
from .jsonl import append_line
from .studies import ARMS, RATES, Photographs, Scenes, first_rates, spec_for

Study = Scenes | Photographs
CHOOSE_SEED = 1000  # of the runs that choose; those that are judged have 0, 1, ...
Pair = tuple[Study, str]  # and the name of an arm


@dataclass(frozen=True)
class Run:
    """One training and its judgement.

    Attributes:
        purpose: ``choose`` or ``test``.
        head_lr: Of neck and heads, where a frozen backbone has chosen it; else it is the recipe's.
    """

    study: Study
    arm: str
    purpose: str
    lr: float
    seed: int
    head_lr: float | None = None

    def recipe(self) -> Recipe:
        arm = ARMS[self.arm]
        recipe = self.study.recipe(parse_method(arm.spec)[0], self.purpose)
        fields = {"pretrained": arm.pretrained, "lr": self.lr, "seed": self.seed}
        if arm.backbone is not None:
            fields["backbone"] = arm.backbone
        if not arm.pretrained:
            fields["weights"] = None
        if self.head_lr is not None:
            fields["head_lr"] = self.head_lr
        if arm.spec == "fixed":  # nothing learns but neck and heads, and theirs is the rate that it chooses
            fields["head_lr"] = self.lr
        return with_method(replace(recipe, **fields), spec_for(self.arm, fields.get("backbone", recipe.backbone)))

    def key(self) -> dict:
        """What tells this run from the others of an experiment, as in its line."""
        key = {"study": self.study.name, "arm": self.arm, "purpose": self.purpose, "lr": self.lr, "seed": self.seed}
        return key if self.head_lr is None else {**key, "head_lr": self.head_lr}


def next_runs(pairs: list[Pair], lines: list[dict], seeds: int | None = None) -> Iterator[Run]:
    """What can be run now, in order: runs whose learning rate is known, and that have no line yet.

    First come those that choose, then those that are judged, seed by seed: whenever an experiment is stopped, arms have
    nearly as many seeds as each other.

    Args:
        pairs: Of one part.
        lines: Of this experiment, runs under way among them; those have no ``score``.
        seeds: Judged runs per arm, instead of as many as the study has.
    """
    frozen = {study.name: (study, "fixed") for study, _ in pairs if study.heads_follow}
    heads: dict[str, float | None] = {}
    for name, pair in frozen.items():
        if pair not in pairs:
            yield from _choosing(pair, None, lines)
        heads[name] = _chosen(pair, None, lines)
    ready = []
    for study, arm in pairs:
        head_lr = None if arm == "fixed" else heads.get(study.name)
        if head_lr is None and study.heads_follow and arm != "fixed":
            continue
        yield from _choosing((study, arm), head_lr, lines)
        if (lr := _chosen((study, arm), head_lr, lines)) is not None:
            ready.append((study, arm, lr, head_lr))
    for seed in range(max((seeds or study.seeds(arm) for study, arm in pairs), default=0)):
        for study, arm, lr, head_lr in ready:
            run = Run(study, arm, "test", lr, seed, head_lr)
            if seed < (seeds or study.seeds(arm)) and not any(run.key().items() <= line.items() for line in lines):
                yield run


def _tried(pair: Pair, head_lr: float | None, lines: list[dict]) -> dict[float, float | None]:
    """Scores by learning rate of an arm's runs that choose; None for one under way."""
    own = {"study": pair[0].name, "arm": pair[1], "purpose": "choose"}
    own |= {} if head_lr is None else {"head_lr": head_lr}
    return {line["lr"]: line.get("score") for line in lines if own.items() <= line.items()}


def _choosing(pair: Pair, head_lr: float | None, lines: list[dict]) -> Iterator[Run]:
    tried, first = _tried(pair, head_lr, lines), _first_rates(pair)
    for lr in rates_to_try(tried, first):
        yield Run(*pair, "choose", lr, CHOOSE_SEED, head_lr)


def _chosen(pair: Pair, head_lr: float | None, lines: list[dict]) -> float | None:
    """The learning rate that an arm has chosen, or None as long as there is something to try."""
    tried = _tried(pair, head_lr, lines)
    if None in tried.values() or rates_to_try(tried, _first_rates(pair)):
        return None
    return chosen_rate(tried)


def _first_rates(pair: Pair) -> tuple[float, ...]:
    study, arm = pair
    return first_rates(study.recipe(parse_method(ARMS[arm].spec)[0], "choose"))


def chosen_rate(tried: dict[float, float]) -> float:
    """The learning rate with the best score; of equals the lowest."""
    return min(tried, key=lambda lr: (-tried[lr], lr))


def rates_to_try(tried: dict[float, float | None], first: tuple[float, ...]) -> list[float]:
    """The rates that an arm has to try now, as far as its scores tell: as long as the best is the lowest or highest
    tried, the next one, too.

    Args:
        tried: Scores by rate; None for a run under way.
        first: What every arm tries.
    """
    if missing := [lr for lr in first if lr not in tried]:
        return missing
    if None in tried.values():
        return []
    place = RATES.index(chosen_rate(tried))
    return [lr for lr in RATES[max(place - 1, 0) : place + 2] if lr not in tried]


def perform(study: Study, recipe: Recipe, purpose: str, data: Path, device: str, cache: Path | None = None) -> dict:
    """Train and judge; the run's line without what :func:`setting` says.

    A training that diverges is a run, too: its ``status`` is ``failed`` and its score 0.

    Args:
        purpose: ``choose`` or ``test``.
        data: Folder of generated scenes.
        cache: Folder of stored maps, for the runs that can do with them: see :mod:`e3va_lite.training.feature_cache`.
    """
    task, where = task_module(recipe.task), torch.device(device)
    shown, judged, classes = study.datasets(recipe, purpose, data)
    model = build_model(recipe, len(classes))
    line = {"trainable": trainable_parameters(model.backbone.body), **machine(recipe, where)}
    start = time.monotonic()
    try:
        with _stored(model, shown, recipe, cache, where) as shown:
            losses = fit(model, shown, recipe, where)
    except InputError as error:
        return {"status": "failed", "score": 0.0, "message": str(error), **line}
    result = evaluate(model, judged, recipe, where)
    return {
        "status": "done",
        "score": result[task.METRIC],
        "result": result,
        "last_losses": round(sum(losses[-20:]) / len(losses[-20:]), 4),
        "seconds": round(time.monotonic() - start, 1),
        **line,
    }


@contextmanager
def _stored(
    model: nn.Module, shown: Dataset, recipe: Recipe, cache: Path | None, device: torch.device
) -> Iterator[Dataset]:
    """The images to train on, with stored maps in their place where there is a cache and it can be used."""
    if cache is None or getattr(recipe, "canvas", None) is None or not can_be_cached(model.backbone.body):
        yield shown
    else:
        with cached(model, shown.dataset, recipe, cache, device) as images:
            yield Subset(images, shown.indices)


def setting(run: Run) -> dict:
    """Everything that a run's result depends on besides the code: a line of another setting is not this run's.

    Pretrained weights are named by their fingerprint, wherever their file is.
    """
    recipe = run.recipe()
    weights = _pretrained(recipe.backbone, recipe.weights) if recipe.pretrained else None
    fields = asdict(replace(recipe, weights=None))
    return {**run.key(), "recipe": fields, **run.study.images_used(run.purpose), "weights": weights}


@cache
def _pretrained(backbone: str, weights: str | None) -> str:
    """Fingerprint of the weights that arms start from."""
    return fingerprint(create_backbone(backbone, weights is None, weights))


def run_experiment(
    parts: list[list[Pair]],
    lines: list[dict],
    file: Path,
    data: Path,
    device: torch.device,
    jobs: int,
    cache: Path | None = None,
    seeds: int | None = None,
) -> None:
    """Run what is missing, ``jobs`` at a time, each in a process of its own with one thread.

    It may be stopped at any time: what is finished is a line of ``file``, and the rest is run next time.

    Args:
        parts: Pairs of study and arm, the most urgent part first.
        lines: Of earlier runs; lines of other settings are left aside.
        file: To which finished runs are added.
        data: Folder of the generated scenes, which are made where they are missing.
        cache: See :func:`perform`.
        seeds: See :func:`next_runs`.
    """
    pairs = [pair for part in parts for pair in part]
    studies = {study.name: study for study, _ in pairs}
    for study in studies.values():
        study.prepare(data)
    known = [line for line in lines if _is_ours(line, studies)]
    under_way: dict[Future, Run] = {}
    total = sum((seeds or study.seeds(arm)) + 4 for study, arm in pairs)  # about: some try more learning rates
    counted = {(study.name, arm) for study, arm in pairs}
    with (
        ProcessPoolExecutor(jobs, get_context("spawn"), _init_worker) as pool,
        tqdm(total=total, initial=sum((x["study"], x["arm"]) in counted for x in known), unit="run") as bar,
    ):
        try:
            while True:
                started = known + [run.key() for run in under_way.values()]
                wanted = chain.from_iterable(next_runs(part, started, seeds) for part in parts)
                for run in islice(_unique(wanted), jobs - len(under_way)):
                    future = pool.submit(perform, run.study, run.recipe(), run.purpose, data, str(device), cache)
                    under_way[future] = run
                if not under_way:
                    return
                done, _ = wait(under_way, return_when=FIRST_COMPLETED)
                for future in done:
                    run = under_way.pop(future)
                    known.append({**setting(run), **future.result()})
                    append_line(file, known[-1])
                    bar.set_postfix_str(f"{run.study.name}, {run.arm}: {known[-1]['score']:.3f}")
                    bar.update()
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise


def _unique(runs: Iterable[Run]) -> Iterator[Run]:
    """Each run once, though several parts want it."""
    seen: list[dict] = []
    for run in runs:
        if run.key() not in seen:
            seen.append(run.key())
            yield run


def measure_costs(pairs: list[Pair], device: torch.device, rounds: int = 6) -> Iterator[dict]:
    """What a training step of each arm needs, a line per study; to be measured when nothing else runs.

    Yields:
        ``rows``: per arm the ``peak`` in bytes, the ``seconds`` of a training step, its seconds ``by_round``, in which
        arms take turns, their share of full fine-tuning's, and ``images_per_second`` of the backbone alone without
        gradients, literal equations for every highway. Medians over rounds.
    """
    for name, study in {study.name: study for study, _ in pairs}.items():
        recipes = {arm: Run(study, arm, "test", 1e-3, 0).recipe() for s, arm in pairs if s.name == name}
        any_of_them = next(iter(recipes.values()))
        size = training_size(any_of_them)
        steps = {arm: build_step(recipe, size, device) for arm, recipe in recipes.items()}
        peaks = {arm: step.ledger().peak for arm, step in steps.items()}
        training = {arm: x["step"] for arm, x in interleaved_seconds(steps, rounds, device).items()}
        passes = {arm: _Inference(step) for arm, step in steps.items()}
        inference = {arm: x["step"] for arm, x in interleaved_seconds(passes, rounds, device).items()}
        rows = []
        for arm in steps:
            row = {"arm": arm, "peak": peaks[arm], "seconds": round(float(np.median(training[arm])), 5)}
            row["by_round"] = training[arm].round(5).tolist()
            if "full" in training:
                row["seconds_of_full"] = median_share(training[arm], training["full"])
            rows.append(row | {"images_per_second": round(float(any_of_them.batch / np.median(inference[arm])), 2)})
        about = {"purpose": "cost", "study": name, "kind": study.kind, "rounds": rounds, "rows": rows}
        yield {**about, **machine(any_of_them, device)}


class _Inference:
    """The backbone's part of inference, to be timed like a training step."""

    def __init__(self, step: Step) -> None:
        self.body, self.images = step.model.backbone.body.eval(), torch.stack(step.images)
        if isinstance(self.body, E3VA):
            self.body.memory = "reference"  # so that structures are compared, not ways of computing them

    @torch.no_grad()
    def forward(self) -> None:
        self.body(self.images)

    def backward(self, loss: None) -> None: ...

    def update(self) -> None: ...


def _is_ours(line: dict, studies: dict[str, Study]) -> bool:
    """Whether a line is of a run of this experiment as it is now; recipes may have got new fields since."""
    study = studies.get(line.get("study"))
    if study is None or line.get("purpose") not in ("choose", "test") or line["arm"] not in ARMS:
        return False
    run = Run(study, line["arm"], line["purpose"], line["lr"], line["seed"], line.get("head_lr"))
    try:
        whole = {**line, "recipe": asdict(recipe_from(line["recipe"]))}
    except InputError:
        return False
    return json.loads(json.dumps(setting(run))).items() <= json.loads(json.dumps(whole)).items()


def _init_worker() -> None:
    """Before a process's first run: one thread, no warnings or progress bars, and an exit when the parent exits."""

    def exit_with_parent(parent: BaseProcess) -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=exit_with_parent, args=(parent_process(),), daemon=True).start()
    torch.set_num_threads(1)
    warnings.simplefilter("ignore")
    sys.stderr = open(os.devnull, "w")  # noqa: SIM115, for as long as the process lives
