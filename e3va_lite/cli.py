"""The console command ``e3va``: reads options, calls the library, prints."""

import json
import sys
import warnings
from pathlib import Path

import click
import torch

from . import __version__
from .errors import InputError

# The library behind a command is imported when the command runs: `e3va --help` answers at once.


def main() -> None:
    """Run the command; what the user can mend becomes one sentence and exit status 2."""
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
strict = click.option(
    "--strict", is_flag=True, help="Boxes without area or outside the image are errors, not warnings."
)
device_option = click.option(
    "--device", default=None, help="cpu, cuda, cuda:1, ...  [default: cuda where there is one]"
)
settings = click.option(
    "--set", "settings", multiple=True, metavar="FIELD=VALUE", help="Override a field of the recipe; may be repeated."
)


@cli.command()
@click.option("--backbone", default="swin_large_patch4_window7_224", show_default=True)
@as_json
def params(backbone: str, as_json: bool) -> None:
    """Trainable parameters of all twelve methods, beside the paper's."""
    from .tables import parameter_table, text_table

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
@click.option(
    "--method",
    "methods",
    multiple=True,
    metavar="METHOD[:option=value,...]",
    help="May be repeated.  [default: fixed, adapter, e3va, full]",
)
@click.option("--seeds", default=1, show_default=True, type=click.IntRange(1, 10), help="Training seeds per method.")
@click.option("--root", type=PATH, help="A folder in Pascal VOC layout to compare on.  [default: generated scenes]")
@click.option("--recipe", help="A recipe's name or YAML file.  [default: shapes; with --root, voc-nano]")
@settings
@click.option("--data", type=PATH, default="data/shapes-voc", show_default=True, help="For the generated scenes.")
@click.option("--out", type=PATH, default="runs/compare", show_default=True)
@device_option
@overwrite
@as_json
def compare(methods, seeds, root, recipe, settings, data, out, device, overwrite, as_json) -> None:
    """The main job: tune one small detector in several ways and compare accuracy, memory and time.

    A comparison that was cut off goes on where it was when the same command is given again.
    """
    from .compare import METHODS, as_text
    from .compare import compare as run
    from .plots import compare_figure

    *files, partial = [out.with_name(out.name + ending) for ending in (".json", ".png", ".partial")]
    for file in files:
        if file.exists() and not overwrite:
            raise InputError(f"'{file}' exists: choose another --out or pass --overwrite.")
    loaded = _recipe(recipe or ("voc-nano" if root else "shapes"), settings)
    result = run(loaded, methods or METHODS, seeds, root, data, partial, _device(device))
    out.parent.mkdir(parents=True, exist_ok=True)
    files[0].write_text(json.dumps(result, indent=2) + "\n")
    compare_figure(result, files[1])
    partial.unlink()
    if as_json:
        click.echo(json.dumps(result, indent=2))
    else:
        click.echo(as_text(result))
        click.echo(f"saved: {files[0]}, {files[1]}")


@cli.group()
def train() -> None:
    """Train on a dataset, keep the run in a folder, evaluate it."""


@train.command("voc")
@click.option("--root", required=True, type=PATH, help="A folder in Pascal VOC layout.")
@click.option("--recipe", default="voc", show_default=True, help="A recipe's name (voc, voc-nano, ...) or YAML file.")
@click.option("--method", help="One of the twelve ways of tuning.  [default: the recipe's]")
@click.option("--backbone", help="swin_nano or one of timm's.  [default: the recipe's]")
@settings
@click.option("--out", type=PATH, help="Folder of the run.  [default: runs/RECIPE-METHOD]")
@device_option
@strict
@overwrite
@as_json
def train_voc(root, recipe, method, backbone, settings, out, device, strict, overwrite, as_json) -> None:
    """RetinaNet on Pascal VOC, or on any folder of that layout with classes of its own."""
    from .engine import train_voc as run

    chosen = [f"{key}={value}" for key, value in (("method", method), ("backbone", backbone)) if value]
    loaded = _recipe(recipe, (*settings, *chosen))
    out = out or Path("runs") / f"{Path(recipe).stem}-{loaded.method}"
    result = run(root, loaded, out, _device(device), strict, overwrite)
    _report(result, out, as_json)


@cli.command("eval")
@click.argument("run", type=PATH)
@click.option("--root", type=PATH, help="Another folder of the same layout.  [default: the run's]")
@click.option("--split", help="Another split.  [default: the run's]")
@device_option
@strict
@as_json
def evaluate(run, root, split, device, strict, as_json) -> None:
    """Evaluate the folder RUN that `e3va train` wrote."""
    from .engine import eval_voc

    _report(eval_voc(run, root, split, _device(device), strict), run, as_json)


@cli.command()
@click.option("--out", type=PATH, default="data/pretrain/swin_nano.safetensors", show_default=True)
@click.option("--steps", default=7000, show_default=True, type=click.IntRange(1))
@click.option("--batch", default=16, show_default=True, type=click.IntRange(1))
@click.option("--lr", default=7e-4, show_default=True, type=click.FloatRange(0, min_open=True))
@click.option("--seed", default=0, show_default=True)
@click.option("--workers", default=1, show_default=True, help="Processes that draw images.")
@device_option
@overwrite
@as_json
def pretrain(out, steps, batch, lr, seed, workers, device, overwrite, as_json) -> None:
    """Remake the weights of swin_nano: dense supervision on generated images. Goes on where it was cut off."""
    from .pretrain import pretrain as run

    card = run(out, steps, batch, lr, seed, workers, str(_device(device)), overwrite)
    click.echo(json.dumps(card, indent=2) if as_json else f"saved: {out}, {card['parameters']:,} parameters")


@cli.group()
def data() -> None:
    """Datasets on disk."""


@data.command()
@click.argument("out", type=PATH)
@click.option("--layout", type=click.Choice(["voc", "coco", "ade20k"]), default="voc", show_default=True)
@click.option("--train", "train_images", default=480, show_default=True, type=click.IntRange(1))
@click.option("--val", "val_images", default=160, show_default=True, type=click.IntRange(1))
@click.option("--size", default=224, show_default=True, type=click.IntRange(64), help="Pixels per side.")
@click.option("--seed", default=0, show_default=True)
@overwrite
def shapes(out, layout, train_images, val_images, size, seed, overwrite) -> None:
    """Generate scenes of shapes in the genuine layout of Pascal VOC, COCO or ADE20K, into the folder OUT."""
    from .datasets.shapes import write_scenes

    write_scenes(out, layout, train_images, val_images, seed=seed, size=size, overwrite=overwrite)
    click.echo(f"saved: {out}, {train_images} + {val_images} images in {layout} layout")


def _recipe(name: str, settings: tuple[str, ...]):
    from .recipe import load_recipe

    pairs = [setting.partition("=") for setting in settings]
    for setting, (_, equals, _) in zip(settings, pairs, strict=True):
        if not equals:
            raise InputError(f"--set {setting} is not understood: write --set FIELD=VALUE.")
    return load_recipe(name, {key: value for key, _, value in pairs})


def _device(name: str | None) -> torch.device:
    try:
        device = torch.device(name or ("cuda" if torch.cuda.is_available() else "cpu"))
    except RuntimeError as error:
        raise InputError(f"--device {name} is not understood: write cpu, cuda or cuda:0.") from error
    if device.type == "cuda" and not torch.cuda.is_available():
        raise InputError(f"--device {name}: this machine has no CUDA device, or torch was built without it; use cpu.")
    return device


def _report(result: dict, run: Path, as_json: bool) -> None:
    if as_json:
        click.echo(json.dumps(result, indent=2))
        return
    ap = result["ap"]
    for name, value in ap["by_class_11_point"].items():
        click.echo(f"  {name:16s} {'no objects' if value is None else f'{value:.3f}'}")
    eleven, every = ap["ap50_11_point"], ap["ap50_all_point"]
    click.echo(f"AP at IoU .5 on '{ap['split']}': {eleven:.3f} (11-point), {every:.3f} (all points)")
    click.echo(f"run: {run}")
