"""The console command ``e3va``: reads options, calls the library, prints."""

import json
import os
import sys
import warnings
from collections.abc import Callable
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

import click

from . import __version__
from .errors import InputError, unknown
from .files import check_picture, check_place

# torch, and the library behind a command, are imported when the command runs: `e3va --help` answers at once.
if TYPE_CHECKING:
    import torch


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


PATH = click.Path(path_type=Path)


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 110})
@click.version_option(__version__)
def cli() -> None:
    """E3VA: adapters on a gradient highway beside a frozen Swin Transformer."""


as_json = click.option(
    "--json", "as_json", is_flag=True, help="Print one JSON document and nothing else on standard output."
)
overwrite = click.option("--overwrite", is_flag=True, help="Replace what is there.")
some_methods = partial(click.option, "--method", "methods", multiple=True, metavar="METHOD[:option=value,...]")
strict = click.option(
    "--strict", is_flag=True, help="Boxes without area or outside the image are errors, not warnings."
)
device_option = click.option(
    "--device", default=None, help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]"
)
best = click.option("--best", is_flag=True, help="The checkpoint with the best metric.  [default: the last one]")
memory_option = click.option(
    "--memory",
    "mode",
    type=click.Choice(["store", "compress", "recompute", "reference"]),
    help="How the E3VA family keeps its taps until the backward pass.  [default: compress]",
)
weights_option = click.option("--weights", help="File of the pretrained weights, where it is elsewhere now.")
teacher_option = click.option(
    "--teacher", help="A ViT of timm that has learned from more, e.g. vit_small_patch14_dinov2."
)
teacher_weights_option = click.option(
    "--teacher-weights", type=PATH, help="The teacher's weights as a local file.  [default: timm's, from its hub]"
)
settings = click.option(
    "--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Override a field of the recipe; may be repeated."
)


@cli.command()
@click.option("--backbone", default="swin_large_patch4_window7_224", show_default=True)
@as_json
def params(backbone: str, as_json: bool) -> None:
    """Trainable parameters of all twelve methods, beside the paper's."""
    from .analysis.text import text_table
    from .experiments.paper_tables import parameter_table

    table = parameter_table(backbone)
    if as_json:
        click.echo(json.dumps(table, indent=2))
        return
    rows = [
        [
            row["method"],
            f"{row['trainable']:,}",
            "" if row["paper_millions"] is None else f"{row['paper_millions']:.2f} M",
        ]
        for row in table["rows"]
    ]
    click.echo(f"trainable parameters of {backbone}, four stages consumed, neck and head not counted")
    click.echo(text_table(["method", "ours", "printed"], rows))
    for row in table["rows"]:
        click.echo(f"{row['method']}: {row['note']}")


@cli.command()
@some_methods(help="May be repeated.  [default: fixed, adapter, e3va, full]")
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1, 10), help="Training seeds per method.")
@click.option("--root", type=PATH, help="A folder in Pascal VOC layout to compare on.  [default: generated scenes]")
@click.option("--recipe", help="A recipe's name or YAML file.  [default: shapes; with --root, voc-nano]")
@settings
@click.option("--data", type=PATH, default="data/shapes-voc", show_default=True, help="For the generated scenes.")
@click.option("--out", type=PATH, default="runs/compare", show_default=True)
@memory_option
@device_option
@overwrite
@as_json
def compare(methods, seeds, root, recipe, settings, data, out, mode, device, overwrite, as_json) -> None:
    """The main job: tune one small detector in several ways and compare accuracy, memory and time.

    A comparison that was cut off goes on where it was when the same command is given again.
    """
    from .analysis.cost import with_memory
    from .analysis.plots import compare_figure
    from .experiments.compare import METHODS, as_text
    from .experiments.compare import compare as run

    *files, partial = [out.with_name(out.name + ending) for ending in (".json", ".png", ".partial")]
    for file in files:
        check_place(file, overwrite)
    check_place(data, overwrite=True, folder=True)
    loaded = _recipe(recipe or ("voc-nano" if root else "shapes"), settings)
    result = run(loaded, with_memory(methods or METHODS, mode), seeds, root, data, partial, _device(device))
    out.parent.mkdir(parents=True, exist_ok=True)
    files[0].write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    compare_figure(result).savefig(files[1])
    partial.unlink()
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(as_text(result))
        click.echo(f"saved: {files[0]}, {files[1]}")


@cli.command()
@some_methods(help="May be repeated; a single one is shown block by block.  [default: full, adapter, e3va]")
@click.option("--backbone", default="swin_nano", show_default=True)
@click.option("--size", default="64x64", show_default=True, metavar="HEIGHTxWIDTH", help="Bytes grow with it.")
@click.option("--figures", type=click.Path(path_type=Path, file_okay=False), help="A folder for drawings, as PNG.")
@overwrite
@as_json
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
    if as_json:
        click.echo(json.dumps(rows[0] if len(rows) == 1 else {"rows": rows}, indent=2))
        return
    click.echo(as_text(rows))
    if figures is not None:
        click.echo(f"saved: {figures}, {len(FIGURES)} figures")


def _cost_options(batch: bool) -> Callable:
    """The options of the commands that look at one training step on a made-up batch."""
    options = [
        click.option("--recipe", default="voc", show_default=True, help="A recipe's name or YAML file."),
        click.option("--backbone", help="swin_nano or one of timm's.  [default: the recipe's]"),
        click.option(
            "--methods",
            default="full,fixed,adapter,e3va",
            show_default=True,
            metavar="METHOD[:option=value,...],...",
            help="'all' for the twelve.",
        ),
        click.option("--size", metavar="HxW", help="Of the images, in pixels.  [default: the recipe's largest]"),
        click.option("--precision", help="float32, bfloat16 or float16.  [default: the recipe's]"),
        click.option("--checkpointing", is_flag=True, help="Gradient checkpointing, for the methods that have it."),
        memory_option,
        settings,
    ]
    if batch:
        options.append(click.option("--batch-size", type=click.IntRange(1), help="Images.  [default: the recipe's]"))

    def decorate(command: Callable) -> Callable:
        for option in reversed(options):
            command = option(command)
        return command

    return decorate


def _costed(recipe, backbone, size, precision, settings, batch_size=None) -> tuple:
    """The recipe and the size."""
    from .analysis.training_step import training_size
    from .backbones.swin import image_size

    chosen = {"backbone": backbone, "precision": precision, "batch": batch_size}
    loaded = _recipe(recipe, (*settings, *(f"{key}={value}" for key, value in chosen.items() if value is not None)))
    return loaded, image_size(size) if size else training_size(loaded)


@cli.command()
@_cost_options(batch=True)
@click.option("--dry-run", is_flag=True, help="With torch's fake tensors: no weights are allocated, nothing computed.")
@click.option("--modules", default=0, type=click.IntRange(0), help="Print so many places that keep most activations.")
@click.option("--figure", type=PATH, help="Draw the ledger into this PNG.")
@device_option
@overwrite
@as_json
def memory(
    recipe, backbone, methods, size, precision, checkpointing, mode, settings, batch_size, dry_run, modules, figure,
    device, overwrite, as_json,
) -> None:  # fmt: skip
    """Where the memory of one training step goes: parameters, gradients, optimiser, activations, temporaries."""
    from .analysis.cost import memory_table, memory_text, split_methods, with_memory
    from .analysis.plots import memory_figure

    if figure:
        check_picture(figure, overwrite)
    loaded, size = _costed(recipe, backbone, size, precision, settings, batch_size)
    where = _device("cpu" if dry_run and not device else device)
    table = memory_table(loaded, with_memory(split_methods(methods), mode), size, where, dry_run, checkpointing)
    click.echo(json.dumps(table, indent=2) if as_json else memory_text(table, modules))
    if figure:
        memory_figure(table).savefig(figure)
        click.echo(f"saved: {figure}", err=as_json)


@cli.command()
@_cost_options(batch=True)
@click.option("--rounds", default=8, show_default=True, type=click.IntRange(1), help="Timed steps of each method.")
@device_option
@as_json
def time(
    recipe, backbone, methods, size, precision, checkpointing, mode, settings, batch_size, rounds, device, as_json
) -> None:
    """Seconds of forward pass, backward pass and optimiser, all methods in turn; shares of full and fixed."""
    from .analysis.cost import split_methods, time_table, time_text, with_memory

    loaded, size = _costed(recipe, backbone, size, precision, settings, batch_size)
    specs = with_memory(split_methods(methods), mode)
    table = time_table(loaded, specs, size, _device(device), rounds, checkpointing)
    click.echo(json.dumps(table, indent=2) if as_json else time_text(table))


@cli.command()
@_cost_options(batch=False)
@click.option("--gpu", required=True, help="11GB, 8192MB, or a card: 1080ti, 3060, t4, p100, 3090, v100, a100, ...")
@click.option(
    "--overhead",
    type=click.IntRange(0),
    help="MB that go to the CUDA context, libraries and fragmentation.  [default: as in `e3va tables`]",
)
@as_json
def fit(recipe, backbone, methods, size, precision, checkpointing, mode, settings, gpu, overhead, as_json) -> None:
    """Will it fit? The largest batch of each method on a card, by dry runs."""
    from .analysis.cost import split_methods, with_memory
    from .analysis.fit_on_gpu import MIB, fit_table, fit_text
    from .experiments.paper_tables import OVERHEAD

    loaded, size = _costed(recipe, backbone, size, precision, settings)
    spent = OVERHEAD if overhead is None else overhead * MIB
    table = fit_table(loaded, with_memory(split_methods(methods), mode), size, gpu, spent, checkpointing)
    click.echo(json.dumps(table, indent=2) if as_json else fit_text(table))


@cli.command()
@click.option(
    "--table", "numbers", multiple=True, type=click.IntRange(1, 4), help="May be repeated.  [default: all four]"
)
@click.option("--times", type=PATH, help="Folder of measured times, for Table 3.  [default: data/results]")
@click.option("--figures", type=PATH, help="Draw them into this folder.")
@overwrite
@as_json
def tables(numbers, times, figures, overwrite, as_json) -> None:
    """The paper's Tables 1 to 4 beside ours: printed value, our value, difference, and how ours was obtained."""
    from .analysis.plots import TABLE_FIGURES, table_figures
    from .experiments.paper_tables import TIMES, as_text, paper_tables

    for name in TABLE_FIGURES if figures else ():
        check_place(figures / name, overwrite)
    result = paper_tables(sorted(set(numbers)) or [1, 2, 3, 4], times or TIMES)
    click.echo(json.dumps(result, indent=2) if as_json else as_text(result))
    if figures:
        figures.mkdir(parents=True, exist_ok=True)
        for name, figure in table_figures(result):
            figure.savefig(figures / name)
            click.echo(f"saved: {figures / name}", err=as_json)


@cli.group()
def train() -> None:
    """Train on a dataset, keep the run in a folder, evaluate it."""


def _train_command(task: str, help: str) -> None:
    @train.command(task, help=help)
    @click.option("--root", required=True, type=PATH, help="Folder of the dataset; data/README.md shows its layout.")
    @click.option("--recipe", default=task, show_default=True, help=f"{task}, {task}-nano or a YAML file.")
    @click.option("--method", help="One of the twelve fine-tuning methods.  [default: the recipe's]")
    @click.option("--backbone", help="swin_nano or one of timm's.  [default: the recipe's]")
    @memory_option
    @settings
    @click.option("--weights", help="File of the pretrained weights.  [default: the recipe's]")
    @click.option("--init", type=PATH, help="Start from what fits of an earlier run, or of an exported file.")
    @click.option("--out", type=PATH, help="Folder of the run.  [default: runs/RECIPE-METHOD, and a number if taken]")
    @click.option("--resume", is_flag=True, help="Go on where the run was cut off: same command, and this.")
    @device_option
    @strict
    @overwrite
    @as_json
    def command(
        root, recipe, method, backbone, mode, settings, weights, init, out, resume, device, strict, overwrite, as_json
    ) -> None:
        from .training import distributed
        from .training.runs import train as run

        if resume and overwrite:
            raise InputError("--resume goes on with what is there and --overwrite removes it: give one of the two.")
        options = {"method": method, "backbone": backbone, "weights": weights}
        chosen = [f"{key}={value}" for key, value in options.items() if value]
        loaded = _recipe(recipe, (*settings, *chosen), task)
        if mode:
            loaded = replace(loaded, options={**loaded.options, "memory": mode})
        out = out or _default_run(f"{Path(recipe).stem}-{loaded.method}", new=not (resume or overwrite))
        named = [setting.partition("=")[0] for setting in settings] + ["options"] * bool(mode)
        where = distributed.start(_device(device))
        result = run(root, loaded, out, where, strict, overwrite, resume, init, named)
        distributed.stop()
        _report(result, as_json, f"run: {out}")


_train_command("voc", "RetinaNet on Pascal VOC, or on any folder of that layout with classes of its own.")
_train_command("coco", "Cascade Mask R-CNN on COCO, or on any folder of that layout with categories of its own.")
_train_command("coco-boxes", "RetinaNet on the boxes of COCO, or of any folder of that layout, with or without masks.")
_train_command("ade20k", "UPerNet on ADE20K, or on any folder of images and index masks with classes of its own.")


def _default_run(name: str, new: bool) -> Path:
    """``runs/NAME``, ``runs/NAME-2``, ...: the first that is free for a new run, or else the latest one."""
    latest = free = Path("runs") / name
    number = 1
    while free.exists() and any(path.name != ".lock" for path in free.iterdir()):
        latest, number = free, number + 1
        free = Path("runs") / f"{name}-{number}"
    return free if new else latest


@cli.command("eval")
@click.argument("run", type=PATH)
@click.option("--root", type=PATH, help="Another folder of the same layout.  [default: the run's]")
@click.option("--split", help="Another split.  [default: the run's]")
@best
@weights_option
@device_option
@strict
@as_json
def evaluate(run, root, split, best, weights, device, strict, as_json) -> None:
    """Evaluate RUN, a run or an exported file, with the official metric of its task."""
    from .training import distributed
    from .training.runs import evaluate_run

    result = evaluate_run(run, root, split, distributed.start(_device(device)), strict, best, weights)
    distributed.stop()
    _report(result, as_json, f"run: {run}")


@cli.command()
@click.argument("run", type=PATH)
@click.argument("images", nargs=-1, required=True, type=PATH)
@click.option("--out", type=PATH, help="Folder for pictures and files.  [default: RUN/predictions]")
@click.option("--threshold", default=0.5, show_default=True, type=click.FloatRange(0, 1), help="For the pictures.")
@click.option(
    "--annotations",
    type=PATH,
    help="COCO file whose image ids the results use.  [default: the run's, for images of its dataset; else file names]",
)
@click.option("--skip-bad", is_flag=True, help="Leave out images that cannot be used, and list them.")
@best
@weights_option
@device_option
@overwrite
@as_json
def predict(
    run, images, out, threshold, annotations, skip_bad, best, weights, device, overwrite, as_json
) -> None:  # fmt: skip
    """Predict on IMAGES (files or folders) with RUN, a run or an exported file: pictures, and files for tools.

    The files are COCO results JSON and VOC text for boxes and masks, PNG for label maps. They hold everything; the
    pictures show what scores above the threshold. --json prints the COCO results.
    """
    import signal

    from .tasks.coco import category_ids
    from .tasks.registry import task_module
    from .training.export import open_trained
    from .training.predict import predict as draw
    from .training.predict import read_images

    files = read_images(images)
    trained = open_trained(run, best, weights)
    out = out or (run.with_suffix("") if run.is_file() else run) / "predictions"
    recipe, ids, known = trained.recipe, trained.category_ids, {}
    if find := getattr(task_module(recipe.task), "known_images", None):
        known = find(recipe, trained.root, files, annotations)
        ids = category_ids(annotations, trained.classes) if annotations else ids
    elif as_json or annotations:
        raise InputError("--json and --annotations are for detections: label maps are written as PNG below --out.")
    before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # what was predicted until then is written
    try:
        count = draw(
            trained.model, files, out, recipe.task, trained.classes, ids, getattr(recipe, "ignore", 0), threshold,
            _device(device), overwrite, known=known, precision=recipe.precision, skip_bad=skip_bad,
        )  # fmt: skip
    finally:
        signal.signal(signal.SIGTERM, before)
    click.echo((out / "results.json").read_text("utf-8") if as_json else f"saved: {out}, {count} images")


@cli.command()
@click.argument("run", type=PATH)
@click.option("--out", type=PATH, help="A new .safetensors file.  [default: RUN/export.safetensors]")
@click.option("--backbone-only", is_flag=True, help="Adapters and norms alone, without neck and head.")
@best
@weights_option
def export(run, out, backbone_only, best, weights) -> None:
    """Write what RUN trained as one small file that goes beside the pretrained weights again."""
    from .training.export import export as write

    out = out or run / "export.safetensors"
    click.echo(f"saved: {out}, {write(run, out, backbone_only, best, weights) / 1e6:.2f} MB")


@cli.command()
@click.option("--part", "parts", multiple=True, help="May be repeated.  [default: all, core first]")
@click.option("--quick", is_flag=True, help="Four ways, one task, shorter: minutes. Says how it works, not what holds.")
@click.option("--data", type=PATH, default="data/mini", show_default=True, help="For the generated scenes.")
@click.option("--out", type=PATH, default="runs/reproduce.jsonl", show_default=True, help="A line per finished run.")
@click.option("--jobs", type=click.IntRange(1), help="Runs at a time.  [default: one per CPU core; with CUDA, 4]")
@click.option("--costs", is_flag=True, help="Measure memory and time instead; for a machine that does nothing else.")
@device_option
def reproduce(parts, quick, data, out, jobs, costs, device) -> None:
    """The paper in miniature: all fine-tuning methods, three tasks, ablations, over several seeds.

    Parts: core, few, instances, methods, few-methods, larger, widths, neighbours, ablations. Some hours on two
    cores. Stop it whenever you want: the same command goes on with the runs that are missing. `e3va report` says what
    came out.
    """
    from .experiments.jsonl import append_line, read_lines
    from .experiments.miniature import PARTS, QUICK, measure_costs, run_experiment

    for part in parts:
        if part not in PARTS:
            raise unknown("part", part, PARTS)
    check_place(out, overwrite=True)
    check_place(data, overwrite=True, folder=True)
    arms = QUICK if quick else [pair for part in parts or PARTS for pair in PARTS[part]]
    where = _device(device)
    if costs:
        for line in measure_costs(arms, where):
            append_line(out, line)
        return
    jobs = jobs or (4 if where.type == "cuda" else os.cpu_count() or 1)
    run_experiment(arms, read_lines(out), out, data, where, jobs)
    click.echo(f"saved: {out}; 'e3va report {out}' says what came out.")


@cli.command()
@click.argument("lines", type=PATH)
@click.option("--out", type=PATH, help="Folder for report.md, report.json and figures.  [default: beside LINES]")
@click.option("--price", type=PATH, help="Of `e3va time --json`: what neighbours cost at full size, for a figure.")
def report(lines, out, price) -> None:
    """What the runs in LINES say: tables beside the paper's, figures, and its claims with a verdict each."""
    from .experiments.jsonl import read_lines
    from .experiments.report import write

    found = read_lines(lines)
    if not any(line.get("purpose") == "test" for line in found):
        raise InputError(f"'{lines}' holds no finished runs: 'e3va reproduce --out {lines}' makes them.")
    costs = None if price is None else _price(price)
    out = out or lines.with_suffix("")
    check_place(out, overwrite=True, folder=True)
    summary = write(found, out, costs)
    for claim in summary["claims"]:
        click.echo(f"{claim['verdict']:>9}: {claim['claim']} ({claim['study']})")
    click.echo(f"saved: the report in {out}")


def _price(path: Path) -> dict:
    try:
        costs = json.loads(path.read_text(encoding="utf-8"))
        [row["of_full"]["step"] for row in costs["rows"]]
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise InputError(f"'{path}' is no output of 'e3va time --json' with full among its methods.") from error
    return costs


@cli.command()
@click.argument("backbone", default="swin_nano")
@click.option(
    "--images",
    "folders",
    multiple=True,
    type=PATH,
    help="A folder of photographs, a folder per class in it; may be repeated, each has labels of its own.",
)
@click.option("--generated", is_flag=True, help="Generated silhouettes instead, where there are no photographs.")
@teacher_option
@teacher_weights_option
@click.option("--out", type=PATH, help="A .safetensors file.  [default: data/pretrain/BACKBONE.safetensors]")
@click.option("--steps", default=20000, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=64, show_default=True, type=click.IntRange(1))
@click.option("--lr", default=1e-3, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--size", default=112, show_default=True, type=click.IntRange(56), help="Pixels per side.")
@click.option("--ema/--no-ema", default=True, show_default=True, help="Moving average of the weights, where better.")
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Processes that draw generated images.")
@click.option("--cache", type=PATH, default="data/cache", show_default=True, help="Folder for decoded photographs.")
@device_option
@overwrite
@as_json
def pretrain(
    backbone,
    folders,
    generated,
    teacher,
    teacher_weights,
    out,
    steps,
    batch,
    lr,
    size,
    ema,
    seed,
    workers,
    cache,
    device,
    overwrite,
    as_json,
) -> None:
    """Pretrain swin_nano, or another BACKBONE, from nothing: on folders of photographs, or on generated images.

    The tokens of a teacher, where one is named, are targets beside the labels. Goes on where it was cut off. A file
    SOURCE.txt in a folder of photographs (its public name on the first line, its
    terms of use below) is copied into the card that is written beside the weights.
    """
    from .experiments.pretrain import build_objective
    from .experiments.pretrain import pretrain as run

    out = out or Path("data/pretrain") / f"{backbone}.safetensors"
    check_place(out, overwrite)
    check_place(cache, overwrite=True, folder=True)
    settings = {
        "backbone": backbone, "images": folders, "generated": generated,
        "teacher": teacher, "teacher_weights": teacher_weights, "steps": steps,
        "batch": batch, "lr": lr, "size": size, "ema": ema, "seed": seed,
    }  # fmt: skip
    objective = build_objective(settings, cache, workers)
    card = run(objective, settings, out, _device(device), overwrite)
    click.echo(json.dumps(card, indent=2) if as_json else f"saved: {out}, {card['parameters']:,} parameters")


@cli.command()
@click.argument("backbones", nargs=-1, required=True)
@click.option("--images", "folder", required=True, type=PATH, help="Photographs, a folder per class in it.")
@weights_option
@click.option("--known", default=8, show_default=True, type=click.IntRange(1), help="Images per class with a label.")
@click.option("--named", default=23, show_default=True, type=click.IntRange(1), help="Further ones, to be named.")
@click.option("--every", default=1, show_default=True, type=click.IntRange(1), help="Use every so many-th class.")
@click.option("--size", default=112, show_default=True, type=click.IntRange(32), help="Pixels per side.")
@teacher_option
@teacher_weights_option
@click.option("--linear", is_flag=True, help="A linear classifier instead of the nearest neighbour.")
@click.option("--cache", type=PATH, default="data/cache", show_default=True, help="Folder for decoded photographs.")
@device_option
@as_json
def probe(
    backbones, folder, weights, known, named, every, size, teacher, teacher_weights, linear, cache, device, as_json
) -> None:
    """What the frozen maps of BACKBONES know about photographs: nearest neighbours, or a linear probe, per stage.

    Pixels and each backbone at random stand beside them.
    """
    import torch

    from .experiments.pretrain_photographs import Teacher
    from .experiments.probe import as_text
    from .experiments.probe import probe as run
    from .methods.registry import build_backbone

    if weights and len(backbones) > 1:
        raise InputError("--weights is a file of one backbone's weights: name one backbone with it.")
    compared = {}
    for name in backbones:
        compared[name] = build_backbone("fixed", name, pretrained=weights is None, weights=weights)
        torch.manual_seed(0)
        compared[f"{name}, random"] = build_backbone("fixed", name)
    vit = Teacher(teacher, teacher_weights) if teacher else None
    result = run(folder, compared, known, named, every, size, linear, _device(device), vit, cache)
    click.echo(json.dumps(result, indent=2) if as_json else as_text(result))


@cli.group()
def data() -> None:
    """Datasets on disk."""


@data.command()
@click.argument("out", type=PATH)
@click.option("--layout", type=click.Choice(["voc", "coco", "ade20k"]), default="voc", show_default=True)
@click.option("--train", "train_images", default=480, show_default=True, type=click.IntRange(1))
@click.option("--val", "val_images", default=160, show_default=True, type=click.IntRange(1))
@click.option("--size", default=224, show_default=True, type=click.IntRange(64), help="Pixels per side.")
@click.option(
    "--world", type=click.Choice(["stained", "duotone"]), default="stained", show_default=True, help="How many stains."
)
@click.option("--seed", default=0, show_default=True)
@overwrite
def shapes(out, layout, train_images, val_images, size, world, seed, overwrite) -> None:
    """Generate scenes of shapes in the genuine layout of Pascal VOC, COCO or ADE20K, into the folder OUT."""
    from .datasets.shapes import write_scenes

    check_place(out, overwrite=True, folder=True)
    write_scenes(out, layout, train_images, val_images, seed=seed, size=size, world=world, overwrite=overwrite)
    click.echo(f"saved: {out}, {train_images} + {val_images} images in {layout} layout")


@data.command()
@click.argument("recipe")
@click.argument("root", type=PATH)
@settings
@click.option("--shown", default=3, show_default=True, type=click.IntRange(1), help="Places printed of each kind.")
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
@click.argument("recipe")
@click.argument("root", type=PATH)
@settings
@click.option("--share", default=0.2, show_default=True, type=click.FloatRange(0, 1), help="Held out for evaluation.")
@click.option("--seed", default=0, show_default=True, help="Draws other images.")
@click.option("--source", help="The COCO file below ROOT to divide.  [default: the only one there]")
@overwrite
def split(recipe, root, settings, share, seed, source, overwrite) -> None:
    """Divide the images of ROOT, which has no lists, into the two splits of RECIPE; nothing is moved."""
    from .datasets.split import split_dataset

    loaded = _recipe(recipe, settings)
    for file, names in split_dataset(loaded, root, share, seed, source, overwrite).items():
        click.echo(f"saved: {file}, {len(names)} images")
    if loaded.task == "ade20k" and loaded.listing is None:
        click.echo("train and check with the same --set, and --set 'listing={split}.txt'")


def _recipe(name: str, settings: tuple[str, ...], task: str | None = None):
    from .recipes.schema import load_recipe

    pairs = [setting.partition("=") for setting in settings]
    for setting, (_, equals, _) in zip(settings, pairs, strict=True):
        if not equals:
            raise InputError(f"--set {setting} is not understood: write --set FIELD=VALUE.")
    return load_recipe(name, {key: value for key, _, value in pairs}, task)


def _device(name: str | None) -> "torch.device":
    import torch

    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"--device {name} is not understood: write cpu, cuda or cuda:0.") from error
    try:
        torch.ones(1, device=device).item()
    except (RuntimeError, AssertionError, ImportError) as error:  # torch has one for every device that it lacks
        what = f"this machine has no {device.type.upper()} device, or torch was built without it"
        raise InputError(f"--device {name}: {what}; use cpu.") from error
    return device


def _report(result: dict | None, as_json: bool, last: str) -> None:
    """Print a metric; processes other than the first have none."""
    if result is None:
        return
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    metrics = result["result"]
    tables = {name: values for name, values in metrics.items() if isinstance(values, dict)}
    for label in dict.fromkeys(label for values in tables.values() for label in values):
        cells = ["    -" if (x := values[label]) is None else f"{x:.3f}" for values in tables.values()]
        click.echo(f"  {label:24s} {'  '.join(cells)}")
    if tables:
        click.echo(f"  ({', '.join(tables)})")
    for name, value in metrics.items():
        if name not in ("step", "split", *tables):
            click.echo(f"{name} on '{metrics['split']}': {'-' if value is None else f'{value:.3f}'}")
    click.echo(last)
