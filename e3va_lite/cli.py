"""The console command ``e3va``: reads options, calls the library, prints."""

import functools
import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click
from click import argument, option

from . import __version__
from .errors import InputError, unknown
from .files import check_picture, check_place

# torch, and the library behind a command, are imported when the command runs: `e3va --help` answers at once.
if TYPE_CHECKING:
    import torch

    from .recipes.schema import Recipe


def main() -> None:
    """Run the command; what the user can mend becomes one sentence and exit status 2."""
    os.environ.setdefault("MPLBACKEND", "Agg")  # figures become files
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="replace")  # a terminal may not know all letters of a class's name
    warnings.showwarning = lambda message, *_: click.echo(f"warning: {message}", err=True)
    try:
        cli.main(prog_name="e3va", standalone_mode=False)
    except click.ClickException as error:
        error.show()
        sys.exit(error.exit_code)
    except (click.Abort, KeyboardInterrupt):
        click.echo("stopped.", err=True)
        sys.exit(130)
    except InputError as error:
        click.echo(f"error: {error}", err=True)
        sys.exit(2)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110, "show_default": True})
@click.version_option(__version__)
def cli() -> None:
    """E3VA: adapters on a gradient highway beside a frozen Swin Transformer."""


# Options of several commands ------------------------------------------------------------------------------------------


def _fields(context: click.Context, parameter: click.Parameter, settings: tuple[str, ...]) -> dict[str, str]:
    """The values of an option ``NAME=VALUE`` that was given several times."""
    for setting in settings:
        if "=" not in setting:
            option = parameter.opts[0]
            raise InputError(f"{option} {setting} is not understood: write {option} {parameter.metavar}.")
    return dict(setting.split("=", 1) for setting in settings)


PATH = click.Path(path_type=Path)
COUNT, POSITIVE = click.IntRange(0), click.IntRange(1)

JSON = option("--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on standard output.")
OVERWRITE = option("--overwrite", is_flag=True, help="Replace what is there.")
DEVICE = option("--device", help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]")
SOME_METHODS = functools.partial(option, "--method", "methods", multiple=True, metavar="METHOD[:option=value,...]")
BACKBONE = option("--backbone", help="swin_nano or one of timm's.  [default: the recipe's]")
WEIGHTS = option("--weights", help="File of the pretrained weights, where it is elsewhere now.")
BEST = option("--best", is_flag=True, help="The checkpoint with the best metric.  [default: the last one]")
STRICT = option("--strict", is_flag=True, help="Boxes without area or outside the image are errors, not warnings.")
CACHE = option("--cache", type=PATH, default="data/cache", help="Folder for decoded photographs.")
MAPS = option(
    "--cache", type=PATH, help="Folder for the maps of a frozen backbone, computed once: RetinaNet with fixed or e3va."
)
TEACHER = option("--teacher", help="A larger pretrained ViT of timm, e.g. vit_small_patch14_dinov2.")
TEACHER_FILE = option(
    "--teacher-weights", type=PATH, help="File of the teacher's weights.  [default: timm's, from its hub]"
)
MEMORY = option(
    "--memory",
    "mode",
    type=click.Choice(["store", "compress", "recompute", "reference"]),
    help="How the E3VA family keeps its taps until the backward pass.  [default: compress]",
)
SET = option(
    "--set", "settings", multiple=True, callback=_fields, metavar="FIELD=VALUE",
    help="Override a field of the recipe; may be repeated.",
)  # fmt: skip
BATCH = option("--batch-size", type=POSITIVE, help="Images.  [default: the recipe's]")


def options(*several: Callable) -> Callable:
    """Several options as one decorator; the help lists them in this order."""
    return lambda command: functools.reduce(lambda decorated, one: one(decorated), reversed(several), command)


def training_step(command: Callable) -> Callable:
    """The options of the commands that look at one training step on a made-up batch.

    The command itself gets the recipe, the methods and the size of the images that these options stand for.
    """

    @option("--recipe", default="voc", help="A recipe's name or YAML file.")
    @BACKBONE
    @option(
        "--methods",
        default="full,fixed,adapter,e3va",
        metavar="METHOD[:option=value,...],...",
        help="'all' for the twelve.",
    )
    @option("--size", metavar="HxW", help="Of the images, in pixels.  [default: the recipe's largest]")
    @option("--precision", help="float32, bfloat16 or float16.  [default: the recipe's]")
    @option("--checkpointing", is_flag=True, help="Gradient checkpointing, for the methods that have it.")
    @options(MEMORY, SET)
    @functools.wraps(command)
    def with_step(recipe, backbone, methods, size, precision, mode, settings, batch_size=None, **others) -> None:
        from .analysis.cost import split_methods, with_memory
        from .analysis.training_step import training_size
        from .backbones.swin import image_size

        recipe = _recipe(recipe, settings, backbone=backbone, precision=precision, batch=batch_size)
        pixels = image_size(size) if size else training_size(recipe)
        command(recipe, with_memory(split_methods(methods), mode), pixels, **others)

    return with_step


# What the methods cost ------------------------------------------------------------------------------------------------


@cli.command()
@option("--backbone", default="swin_large_patch4_window7_224")
@JSON
def params(backbone, as_json) -> None:
    """Trainable parameters of all twelve methods, beside the paper's."""
    from .analysis.text_table import text_table
    from .experiments.paper_tables import parameter_table

    def as_text(table: dict) -> str:
        lines = [f"trainable parameters of {backbone}, four stages consumed, neck and head not counted"]
        printed = ["" if (x := row["paper_millions"]) is None else f"{x:.2f} M" for row in table["rows"]]
        ours = [[row["method"], f"{row['trainable']:,}"] for row in table["rows"]]
        rows = [[*row, paper] for row, paper in zip(ours, printed, strict=True)]
        lines += [text_table(["method", "ours", "printed"], rows)]
        return "\n".join(lines + [f"{row['method']}: {row['note']}" for row in table["rows"]])

    _print(parameter_table(backbone), as_json, as_text)


@cli.command()
@SOME_METHODS(help="May be repeated; a single one is shown block by block.  [default: full, adapter, e3va]")
@option("--backbone", default="swin_nano")
@option("--size", default="64x64", metavar="HEIGHTxWIDTH", help="Bytes grow with it.")
@option("--figures", type=click.Path(path_type=Path, file_okay=False), help="A folder for drawings, as PNG.")
@options(OVERWRITE, JSON)
def gradpath(methods, backbone, size, figures, overwrite, as_json) -> None:
    """Follow the gradient's path back from a loss: what of the backbone it reaches, how long it is, what it keeps.

    Models are built without memory: any backbone and size will do.
    """
    from .analysis.gradient_path_report import FIGURES, METHODS, as_text, measure
    from .backbones.swin import image_size

    methods, pixels = methods or METHODS, image_size(size)
    for name in FIGURES if figures else ():
        check_place(figures / name, overwrite)
    rows = [measure(spec, backbone, pixels) for spec in methods]
    if figures is not None:
        from .analysis.diagrams import save

        save(figures, methods, backbone, pixels)
    _print(rows[0] if len(rows) == 1 else {"rows": rows}, as_json, lambda _: as_text(rows))
    if figures is not None and not as_json:
        click.echo(f"saved: {figures}, {len(FIGURES)} figures")


@cli.command()
@training_step
@BATCH
@option("--dry-run", is_flag=True, help="With torch's fake tensors: no weights are allocated, nothing computed.")
@option("--modules", default=0, type=COUNT, help="Print so many places that keep most activations.")
@option("--figure", type=PATH, help="Draw the ledger into this PNG.")
@options(DEVICE, OVERWRITE, JSON)
def memory(recipe, methods, size, checkpointing, dry_run, modules, figure, device, overwrite, as_json) -> None:
    """Where the memory of one training step goes: parameters, gradients, optimiser, activations, temporaries."""
    from .analysis.cost import memory_table, memory_text
    from .analysis.plots import memory_figure

    if figure:
        check_picture(figure, overwrite)
    where = _device("cpu" if dry_run and not device else device)
    table = memory_table(recipe, methods, size, where, dry_run, checkpointing)
    _print(table, as_json, functools.partial(memory_text, modules=modules))
    if figure:
        memory_figure(table).savefig(figure)
        click.echo(f"saved: {figure}", err=as_json)


@cli.command()
@training_step
@BATCH
@option("--rounds", default=8, type=POSITIVE, help="Timed steps of each method.")
@options(DEVICE, JSON)
def time(recipe, methods, size, checkpointing, rounds, device, as_json) -> None:
    """Seconds of forward pass, backward pass and optimiser, all methods in turn; shares of full and fixed."""
    from .analysis.cost import time_table, time_text

    _print(time_table(recipe, methods, size, _device(device), rounds, checkpointing), as_json, time_text)


@cli.command()
@training_step
@option("--gpu", required=True, help="11GB, 8192MB, or a card: 1080ti, 3060, t4, p100, 3090, v100, a100, ...")
@option("--overhead", type=COUNT, help="MB of CUDA context, libraries, fragmentation.  [default: as in `e3va tables`]")
@JSON
def fit(recipe, methods, size, checkpointing, gpu, overhead, as_json) -> None:
    """Will it fit? The largest batch of each method on a card, by dry runs."""
    from .analysis.fit_on_gpu import MIB, fit_table, fit_text
    from .experiments.paper_tables import OVERHEAD

    spent = OVERHEAD if overhead is None else overhead * MIB
    _print(fit_table(recipe, methods, size, gpu, spent, checkpointing), as_json, fit_text)


@cli.command()
@option("--table", "numbers", multiple=True, type=click.IntRange(1, 4), help="May be repeated.  [default: all four]")
@option("--times", type=PATH, help="Folder of measured times, for Table 3.  [default: data/results]")
@option("--figures", type=PATH, help="Draw them into this folder.")
@options(OVERWRITE, JSON)
def tables(numbers, times, figures, overwrite, as_json) -> None:
    """The paper's Tables 1 to 4 beside ours: printed value, our value, difference, and how ours was obtained."""
    from .analysis.plots import TABLE_FIGURES, table_figures
    from .experiments.paper_tables import TIMES, as_text, paper_tables

    for name in TABLE_FIGURES if figures else ():
        check_place(figures / name, overwrite)
    result = paper_tables(sorted(set(numbers)) or [1, 2, 3, 4], times or TIMES)
    _print(result, as_json, as_text)
    if figures:
        figures.mkdir(parents=True, exist_ok=True)
        for name, figure in table_figures(result):
            figure.savefig(figures / name)
            click.echo(f"saved: {figures / name}", err=as_json)


# Training on a dataset ------------------------------------------------------------------------------------------------


@cli.group()
def train() -> None:
    """Train on a dataset, keep the run in a folder, evaluate it."""


def _train_command(task: str, help: str) -> None:
    @train.command(task, help=help)
    @option("--root", required=True, type=PATH, help="Folder of the dataset; data/README.md shows its layout.")
    @option("--recipe", default=task, help=f"{task}, {task}-nano or a YAML file.")
    @option("--method", help="One of the twelve fine-tuning methods.  [default: the recipe's]")
    @options(BACKBONE, MEMORY, SET)
    @option("--weights", help="File of the pretrained weights.  [default: the recipe's]")
    @option("--init", type=PATH, help="Start from what fits of an earlier run, or of an exported file.")
    @option("--out", type=PATH, help="Folder of the run.  [default: runs/RECIPE-METHOD, and a number if taken]")
    @option("--resume", is_flag=True, help="Go on where the run was cut off: same command, and this.")
    @MAPS
    @options(DEVICE, STRICT, OVERWRITE, JSON)
    def command(
        recipe, method, backbone, mode, settings, weights, out, resume, device, overwrite, as_json, **others
    ) -> None:
        from .training import distributed, runs
        from .training.run_folder import default_run

        if resume and overwrite:
            raise InputError("--resume goes on with what is there and --overwrite removes it: give one of the two.")
        loaded = _recipe(recipe, settings, task, method=method, backbone=backbone, weights=weights)
        if mode:
            loaded = replace(loaded, options={**loaded.options, "memory": mode})
        changes = [*settings, *(["options"] if mode else [])]
        out = out or default_run(f"{Path(recipe).stem}-{loaded.method}", new=not (resume or overwrite))
        where = distributed.start(_device(device))
        result = runs.train(
            recipe=loaded, run=out, device=where, overwrite=overwrite, resume=resume, changes=changes, **others
        )
        distributed.stop()
        _print(result, as_json, lambda result: f"{runs.metrics_text(result['result'])}\nrun: {out}")


_train_command("voc", "RetinaNet on Pascal VOC, or on any folder of that layout with classes of its own.")
_train_command("coco", "Cascade Mask R-CNN on COCO, or on any folder of that layout with categories of its own.")
_train_command("coco-boxes", "RetinaNet on the boxes of COCO, or of any folder of that layout, with or without masks.")
_train_command("ade20k", "UPerNet on ADE20K, or on any folder of images and index masks with classes of its own.")


@cli.command("eval")
@argument("run", type=PATH)
@option("--root", type=PATH, help="Another folder of the same layout.  [default: the run's]")
@option("--split", help="Another split.  [default: the run's]")
@options(BEST, WEIGHTS, DEVICE, STRICT, JSON)
def evaluate(run, device, as_json, **others) -> None:
    """Evaluate RUN, a run or an exported file, with the official metric of its task."""
    from .training import distributed, runs

    result = runs.evaluate_run(run, device=distributed.start(_device(device)), **others)
    distributed.stop()
    _print(result, as_json, lambda result: f"{runs.metrics_text(result['result'])}\nrun: {run}")


@cli.command()
@argument("run", type=PATH)
@argument("images", nargs=-1, required=True, type=PATH)
@option("--out", type=PATH, help="Folder for pictures and files.  [default: RUN/predictions]")
@option("--threshold", default=0.5, type=click.FloatRange(0, 1), help="For the pictures.")
@option(
    "--annotations",
    type=PATH,
    help="COCO file whose image ids the results use.  [default: the run's, for images of its dataset; else file names]",
)
@option("--skip-bad", is_flag=True, help="Leave out images that cannot be used, and list them.")
@options(BEST, WEIGHTS, DEVICE, OVERWRITE, JSON)
def predict(run, images, out, annotations, best, weights, device, as_json, **others) -> None:
    """Predict on IMAGES (files or folders) with RUN, a run or an exported file: pictures, and files for tools.

    The files are COCO results JSON and VOC text for boxes and masks, PNG for label maps. They hold everything; the
    pictures show what scores above the threshold. --json prints the COCO results.
    """
    import signal

    from .tasks.coco import category_ids
    from .tasks.registry import task_module
    from .training import predict as library
    from .training.export import open_trained

    files = library.read_images(images)
    trained = open_trained(run, best, weights)
    out = out or (run.with_suffix("") if run.is_file() else run) / "predictions"
    recipe, ids, known = trained.recipe, trained.category_ids, {}
    if find := getattr(task_module(recipe.task), "known_images", None):
        known = find(recipe, trained.root, files, annotations)
        ids = category_ids(annotations, trained.classes) if annotations else ids
    elif as_json or annotations:
        raise InputError("--json and --annotations are for detections: label maps are written as PNG below --out.")
    others |= {"ignore": getattr(recipe, "ignore", 0), "precision": recipe.precision, "device": _device(device)}
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was predicted until then is written
    try:
        count = library.predict(trained.model, files, out, recipe.task, trained.classes, ids, known=known, **others)
    finally:
        signal.signal(signal.SIGTERM, before)
    click.echo((out / "results.json").read_text("utf-8") if as_json else f"saved: {out}, {count} images")


@cli.command()
@argument("run", type=PATH)
@option("--format", type=click.Choice(["safetensors", "onnx", "torch-export"]), default="safetensors")
@option("--out", type=PATH, help="A new file.  [default: RUN/export.safetensors, .onnx or .pt2]")
@option("--backbone-only", is_flag=True, help="Without neck and head.")
@option("--int8", is_flag=True, help="Graphs: frozen weights of linear layers in 8 bits; says what that changes.")
@option("--size", metavar="HxW", help="Graphs: of all images, in pixels; torch-export needs it.  [default: any]")
@options(BEST, WEIGHTS, JSON)
def export(run, format, out, int8, size, as_json, **others) -> None:
    """Write the model of RUN as one file.

    safetensors: what was trained, a small file that goes beside the pretrained weights again; with --backbone-only
    adapters and norms alone.

    onnx, torch-export: a graph that needs this package no more, of the whole model or, with --backbone-only, from
    images to maps; RUN may be a .safetensors file of this command, too. The graph is read back and compared with the
    model, and kept only if it computes the same. What goes in and comes out is described in the file and in
    e3va_lite.training.deploy.
    """
    suffix = {"safetensors": ".safetensors", "onnx": ".onnx", "torch-export": ".pt2"}[format]
    out = out or (run.with_suffix(suffix) if run.is_file() else run / f"export{suffix}")
    if format == "safetensors":
        from .training.export import export as write

        if int8 or size:
            raise InputError("--int8 and --size are for graphs: give --format onnx or torch-export, too.")
        report, as_text = {"bytes": write(run, out, **others)}, lambda _: []
    else:
        from .backbones.swin import image_size
        from .training.deploy import as_text, deploy

        report = deploy(run, out, format, int8=int8, size=image_size(size) if size else None, **others)
    said = [f"saved: {out}, {report['bytes'] / 1e6:.2f} MB", *as_text(report)]
    _print(report, as_json, lambda _: "\n".join(said))


# Experiments ----------------------------------------------------------------------------------------------------------


@cli.command()
@SOME_METHODS(help="May be repeated.  [default: fixed, adapter, e3va, full]")
@option("--seeds", default=1, type=click.IntRange(1, 10), help="Training seeds per method.")
@option("--root", type=PATH, help="A folder in Pascal VOC layout to compare on.  [default: generated scenes]")
@option("--recipe", help="A recipe's name or YAML file.  [default: shapes; with --root, voc-nano]")
@SET
@option("--data", type=PATH, default="data/shapes-voc", help="For the generated scenes.")
@option("--out", type=PATH, default="runs/compare")
@options(MEMORY, DEVICE, OVERWRITE, JSON)
def compare(methods, seeds, root, recipe, settings, data, out, mode, device, overwrite, as_json) -> None:
    """The main job: fine-tune one small detector with several methods and compare accuracy, memory and time.

    A comparison that was cut off goes on where it was when the same command is given again.
    """
    from .analysis.cost import with_memory
    from .analysis.plots import compare_figure
    from .experiments import compare as library

    table, figure, partial = (out.with_name(out.name + ending) for ending in (".json", ".png", ".partial"))
    for file in (table, figure):
        check_place(file, overwrite)
    check_place(data, overwrite=True, folder=True)
    loaded = _recipe(recipe or ("voc-nano" if root else "shapes"), settings)
    specs = with_memory(methods or library.METHODS, mode)
    result = library.compare(loaded, specs, seeds, root, data, partial, _device(device))
    out.parent.mkdir(parents=True, exist_ok=True)
    table.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    compare_figure(result).savefig(figure)
    partial.unlink()
    _print(result, as_json, lambda result: f"{library.as_text(result)}\nsaved: {table}, {figure}")


@cli.command()
@option("--out", type=PATH, help="Folder for bench.json and bench.png.  [default: runs/bench-CARD]")
@option("--minutes", default=20.0, type=click.FloatRange(0, min_open=True), help="No measurement begins after them.")
@option("--quick", is_flag=True, help="Swin-T only, some minutes: is all well on this card?")
@options(DEVICE, OVERWRITE, JSON)
def bench(out, minutes, quick, device, overwrite, as_json) -> None:
    """For somebody with a GPU: is everything correct on it, and what do the methods cost there?

    Checks the highway, its proofs and a training step against literal equations and the CPU. Measures time and memory
    of a training step, beside the allocator's own peak: the paper's twelve methods, LST, LoSA and PEFT's LoRA, with
    RetinaNet on Swin-L, ViT-L, Swin-T and Swin-B, at the largest of a few sizes that fits. Searches for the largest
    batch that runs. All weights are random: nothing is downloaded.

    Stop it whenever you want: the same command goes on with what is missing. On a CPU it is a trial with tiny models.
    """
    from .analysis.plots import bench_figure
    from .experiments import bench as library
    from .experiments.bench_text import TRIAL, as_text

    where = _device(device)
    name = library.card_name(library.environment(where))
    plan = library.plan_for(where, quick)
    out = out or Path("runs") / "-".join(["bench", name, *(["quick"] if plan == "quick" else [])])
    check_place(out, overwrite=True, folder=True)
    if overwrite:
        (out / "bench.json").unlink(missing_ok=True)
    if where.type == "cpu":
        click.echo(f"note: {TRIAL}.", err=True)
    result = library.bench(out / "bench.json", where, quick, minutes)
    bench_figure(result).savefig(out / "bench.png")
    _print(result, as_json, as_text)
    hint = {
        "whole": f"to contribute it, copy the folder to data/results/gpu/{name}; data/results/README.md says what else",
        "quick": "without --quick, the command measures what can be contributed",
        "trial": TRIAL,
    }[plan]
    click.echo(f"saved: {out}, bench.json and bench.png; {hint}.", err=as_json)


@cli.command()
@option("--part", "parts", multiple=True, help="May be repeated.  [default: all, the most urgent first]")
@option(
    "--arm", "arms", multiple=True, help="Only these methods or variants, as the report names them; may be repeated."
)
@option("--seeds", type=POSITIVE, help="Judged runs per method.  [default: 2 to 8, by study]")
@option("--quick", is_flag=True, help="Four methods, one task, shorter: minutes. Shows how it works, proves nothing.")
@option(
    "--photographs",
    multiple=True,
    callback=_fields,
    metavar="STUDY=ROOT",
    help="Photographs instead of scenes, for detection, segmentation, instances or vit; may be repeated.",
)
@option(
    "--set", "settings", multiple=True, callback=_fields, metavar="STUDY.FIELD=VALUE",
    help="Of a study on photographs: a field of its recipe, 'recipe' itself, or 'name'; may be repeated.",
)  # fmt: skip
@option("--data", type=PATH, default="data/mini", help="For the generated scenes.")
@option("--out", type=PATH, default="runs/reproduce.jsonl", help="A line per finished run.")
@option("--jobs", type=POSITIVE, help="Runs at a time.  [default: one per CPU core; with CUDA, 4]")
@option("--costs", is_flag=True, help="Measure memory and time instead; for a machine that does nothing else.")
@options(MAPS, DEVICE)
def reproduce(parts, arms, seeds, quick, photographs, settings, data, out, jobs, costs, cache, device) -> None:
    """The paper in miniature: all fine-tuning methods, three tasks, ablations, over several seeds.

    Parts: core, few, instances, methods, few-methods, larger, widths, neighbours, ablations. Some hours on two
    cores. Stop it whenever you want: the same command goes on with the runs that are missing. `e3va report` says what
    came out, and how many --seeds would decide a claim that is undecided.

    With --photographs the parts are detection, segmentation, instances, few, design, methods, vit. ROOT is a folder in
    the layout of Pascal VOC 2007, ADE20K or COCO 2017; --set says how yours differs, and where the weights of
    vit are: --photographs vit=ROOT --set vit.weights=FILE. Which images were used is written beside OUT.
    """
    from .experiments.jsonl import append_line, read_lines
    from .experiments.reproduce import measure_costs, run_experiment
    from .experiments.studies import ARMS, PARTS, PHOTOGRAPH_PARTS, QUICK, STUDIES, photograph_studies, write_lists

    check_place(out, overwrite=True)
    for arm in arms:
        if arm not in ARMS:
            raise unknown("method or variant", arm, ARMS)
    if photographs:
        if quick:
            raise InputError("--quick is for generated scenes: leave out --photographs, or choose a part with --part.")
        roots = {word: Path(root) for word, root in photographs.items()}
        studies, known = photograph_studies(roots, settings), PHOTOGRAPH_PARTS
    elif settings:
        raise InputError("--set is for studies on photographs: give --photographs, too.")
    else:
        check_place(data, overwrite=True, folder=True)
        studies, known = STUDIES, {"quick": QUICK} if quick else PARTS
    for part in parts:
        if part not in known:
            raise unknown("part", part, known)
    chosen = [
        [(studies[kind], arm) for kind, arm in known[part] if kind in studies and (not arms or arm in arms)]
        for part in parts or known
    ]
    if not any(chosen):
        raise InputError("nothing to run: no chosen part has such a method on these images; leave out --arm or --part.")
    if photographs:
        write_lists(studies.values(), out.with_name(f"{out.stem}-images.json"))
    where = _device(device)
    if costs:
        for line in measure_costs([pair for part in chosen for pair in part], where):
            append_line(out, line)
        return
    jobs = jobs or (4 if where.type == "cuda" else os.cpu_count() or 1)
    run_experiment(chosen, read_lines(out), out, data, where, jobs, cache, seeds)
    click.echo(f"saved: {out}; 'e3va report {out}' says what came out.")


@cli.command()
@argument("lines", nargs=-1, required=True, type=PATH)
@option("--out", type=PATH, help="Folder for report.md, report.json and figures.  [default: beside the first of LINES]")
@option("--price", type=PATH, help="Of `e3va time --json`: what neighbours cost at full size, for a figure.")
def report(lines, out, price) -> None:
    """What the runs in LINES say: tables beside the paper's, figures, and its claims with a verdict each.

    LINES are one or more files of `e3va reproduce`, such as one on photographs and one on generated scenes.
    """
    from .experiments.jsonl import read_lines
    from .experiments.report import write

    found = []
    for file in lines:
        own = read_lines(file)
        if not any(line.get("purpose") == "test" for line in own):
            raise InputError(f"'{file}' holds no finished runs: 'e3va reproduce --out {file}' makes them.")
        found += own
    costs = None if price is None else _price(price)
    out = out or lines[0].with_suffix("")
    check_place(out, overwrite=True, folder=True)
    summary = write(found, out, costs)
    photographs, names = summary["photographs"], summary["photographs"]["names"]
    for claim in (*photographs["costs"], *photographs["claims"], *summary["claims"]):
        click.echo(f"{claim['verdict']:>9}: {claim['claim']} ({names.get(claim['study'], claim['study'])})")
    click.echo(f"saved: the report in {out}")


def _price(path: Path) -> dict:
    try:
        costs = json.loads(path.read_text(encoding="utf-8"))
        [row["of_full"]["step"] for row in costs["rows"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"'{path}' is no output of 'e3va time --json' with full among its methods.") from error
    return costs


@cli.command()
@argument("backbone", default="swin_nano")
@option(
    "--images",
    multiple=True,
    type=PATH,
    help="A folder of photographs, a folder per class in it; may be repeated, each has labels of its own.",
)
@option("--generated", is_flag=True, help="Generated silhouettes instead, where there are no photographs.")
@options(TEACHER, TEACHER_FILE)
@option("--out", type=PATH, help="A .safetensors file.  [default: data/pretrain/BACKBONE.safetensors]")
@option("--steps", default=20000, type=POSITIVE)
@option("--batch", default=64, type=POSITIVE)
@option("--lr", default=1e-3, type=click.FloatRange(0, min_open=True))
@option("--size", default=112, type=click.IntRange(56), help="Pixels per side.")
@option("--ema/--no-ema", default=True, help="Moving average of the weights, where better.")
@option("--seed", default=0)
@option("--workers", default=1, help="Processes that draw generated images.")
@options(CACHE, DEVICE, OVERWRITE, JSON)
def pretrain(out, workers, cache, device, overwrite, as_json, **settings) -> None:
    """Pretrain swin_nano, or another BACKBONE, from nothing: on folders of photographs, or on generated images.

    The tokens of a teacher, where one is named, are targets beside the labels. Goes on where it was cut off. A file
    SOURCE.txt in a folder of photographs (its public name on the first line, its terms of use below) is copied into
    the card that is written beside the weights.
    """
    from .experiments import pretrain as library

    out = out or Path("data/pretrain") / f"{settings['backbone']}.safetensors"
    check_place(out, overwrite)
    check_place(cache, overwrite=True, folder=True)
    objective = library.build_objective(settings, cache, workers)
    card = library.pretrain(objective, settings, out, _device(device), overwrite)
    _print(card, as_json, lambda card: f"saved: {out}, {card['parameters']:,} parameters")


@cli.command()
@argument("backbones", nargs=-1, required=True)
@option("--images", "folder", required=True, type=PATH, help="Photographs, a folder per class in it.")
@WEIGHTS
@option("--known", default=8, type=POSITIVE, help="Images per class with a label.")
@option("--named", default=23, type=POSITIVE, help="Further ones, to be named.")
@option("--every", default=1, type=POSITIVE, help="Use every so many-th class.")
@option("--size", default=112, type=click.IntRange(32), help="Pixels per side.")
@options(TEACHER, TEACHER_FILE)
@option("--linear", is_flag=True, help="A linear classifier instead of the nearest neighbour.")
@options(CACHE, DEVICE, JSON)
def probe(backbones, weights, teacher, teacher_weights, device, as_json, **others) -> None:
    """What the frozen maps of BACKBONES know about photographs: nearest neighbours, or a linear probe, per stage.

    Pixels and each backbone at random stand beside them.
    """
    import torch

    from .experiments import probe as library
    from .experiments.pretrain_photographs import Teacher
    from .methods.registry import build_backbone

    if weights and len(backbones) > 1:
        raise InputError("--weights is a file of one backbone's weights: name one backbone with it.")
    compared = {}
    for name in backbones:
        compared[name] = build_backbone("fixed", name, pretrained=weights is None, weights=weights)
        torch.manual_seed(0)
        compared[f"{name}, random"] = build_backbone("fixed", name)
    vit = Teacher(teacher, teacher_weights) if teacher else None
    result = library.probe(backbones=compared, device=_device(device), teacher=vit, **others)
    _print(result, as_json, library.as_text)


# Datasets -------------------------------------------------------------------------------------------------------------


@cli.group()
def data() -> None:
    """Datasets on disk."""


@data.command()
@argument("out", type=PATH)
@option("--layout", type=click.Choice(["voc", "coco", "ade20k"]), default="voc")
@option("--train", default=480, type=POSITIVE)
@option("--val", default=160, type=POSITIVE)
@option("--size", default=224, type=click.IntRange(64), help="Pixels per side.")
@option("--world", type=click.Choice(["stained", "duotone"]), default="stained", help="How many stains.")
@option("--seed", default=0)
@OVERWRITE
def shapes(out, **scenes) -> None:
    """Generate scenes of shapes in the genuine layout of Pascal VOC, COCO or ADE20K, into the folder OUT."""
    from .datasets.shapes import write_scenes

    check_place(out, overwrite=True, folder=True)
    write_scenes(out, **scenes)
    click.echo(f"saved: {out}, {scenes['train']} + {scenes['val']} images in {scenes['layout']} layout")


@data.command()
@argument("recipe")
@argument("root", type=PATH)
@SET
@option("--shown", default=3, type=POSITIVE, help="Places printed of each kind.")
def check(recipe, root, settings, shown) -> None:
    """Walk the dataset ROOT of RECIPE before a week of training does, both splits, every file.

    Says what the files were understood to hold: images, classes and where their names come from, objects of each.
    Exit status 1 if training would stop at something; what training would only leave out, or not mind, is printed too.
    """
    from .datasets.check import check_dataset, report
    from .tasks.registry import task_module

    loaded = _recipe(recipe, settings)
    found = check_dataset(loaded, root, task_module(loaded.task).check)
    for split, problems in found.items():
        click.echo(f"split '{split}':")
        for line in problems.contents.summary() if problems.contents else ():
            click.echo(line)
        click.echo(report(problems, shown) or "  nothing found")
    fatal = any(problem.fatal for problems in found.values() for problem in problems)
    click.echo("training would stop." if fatal else "training would go through.")
    sys.exit(fatal)


@data.command()
@argument("recipe")
@argument("root", type=PATH)
@SET
@option("--share", default=0.2, type=click.FloatRange(0, 1), help="Held out for evaluation.")
@option("--seed", default=0, help="Draws other images.")
@option("--source", help="The COCO file below ROOT to divide.  [default: the only one there]")
@OVERWRITE
def split(recipe, root, settings, **others) -> None:
    """Divide the images of ROOT, which has no lists, into the two splits of RECIPE; nothing is moved."""
    from .datasets.split import split_dataset

    loaded = _recipe(recipe, settings)
    for file, names in split_dataset(loaded, root, **others).items():
        click.echo(f"saved: {file}, {len(names)} images")
    if loaded.task == "ade20k" and loaded.listing is None:
        click.echo("train and check with the same --set, and --set 'listing={split}.txt'")


# What the commands share ----------------------------------------------------------------------------------------------


def _recipe(name: str, settings: dict[str, str], task: str | None = None, **options) -> "Recipe":
    """The recipe with the fields that ``--set`` gives, and those of the given options, which are named like fields."""
    from .recipes.schema import load_recipe

    return load_recipe(name, settings | {key: value for key, value in options.items() if value}, task)


def _device(name: str | None) -> "torch.device":
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has one for every device that it lacks
        what = "this machine has no such device, or torch was built without it"
        raise InputError(f"--device {name}: {what}; write cpu, cuda or cuda:0.") from error
    return device


def _print(result: dict | None, as_json: bool, as_text: Callable[[dict], str]) -> None:
    if result is not None:  # as on all processes of a training but the first
        click.echo(json.dumps(result, indent=2) if as_json else as_text(result))
