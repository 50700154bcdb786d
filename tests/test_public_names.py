"""Everything that a user can name, in full: a name, a command or an option that is lost by accident is noticed here."""

from importlib import import_module

import click
import pytest

import e3va_lite
from e3va_lite.cli import cli

PACKAGE = (
    "E3VA IsolationError InputError LowRankAdapter METHODS StandardAdapter Tuning assert_isolated build_backbone "
    "from_pretrained ledger load_adapters load_backbone save_adapters trace tune"
)

#: What README.md, data/README.md, the notebooks and the course take from the modules themselves.
MODULES = {
    "adapters": "LowRankAdapter LowRankLinear StandardAdapter",
    "analysis.cost": "interleaved_seconds memory_of memory_table time_table with_method",
    "analysis.diagrams": "figure1 figure2 figure3 figure4 figure5 lengths",
    "analysis.fit_on_gpu": "CARDS FIRST dry_peak fit_table",
    "analysis.gradient_path_report": "on_meta",
    "analysis.leaks": "KINDS PLACES STAGES answer confirm findings suspect",
    "analysis.isolation": "random_functional reached_by_graph walk",
    "analysis.memory": "CATEGORIES",
    "analysis.notebook": "kinds results_folder reveal show",
    "analysis.plots": "ledgers_figure memory_figure table_figures",
    "analysis.training_step": "build_step",
    "backbones.base": "trainable_parameters",
    "backbones.registry": "FAMILIES",
    "backbones.swin": "NANO create_swin embed f_p1 f_p2",
    "backbones.swin_v2": "",
    "datasets.shapes": "write_scenes",
    "experiments.claims": "DESIGN",
    "experiments.jsonl": "read_lines",
    "experiments.paper_tables": "OVERHEAD SWIN_B SWIN_L parameter_table printed printed_value",
    "experiments.report": "photographs_figure summarise",
    "experiments.report_text": "claim_table cost_table",
    "experiments.significance": "difference interval",
    "experiments.studies": "ABLATIONS",
    "highway": "E3VA MEMORY REDUCTIONS STRUCTURES",
    "methods.inside": "plain_block serial_block",
    "methods.registry": "METHODS OTHERS build_backbone parse_method",
    "recipes.schema": "load_recipe",
    "tasks.registry": "task_module",
    "training.engine": "build_model evaluate fit machine",
    "training.export": "export load_exported",
    "training.pictures": "picture",
    "training.predict": "load_image picture",
    "training.runs": "train",
}

TRAIN = (
    "--root --recipe --method --backbone --memory --set --weights --init --out --resume --cache --device --strict "
    "--overwrite --json"
)
COST = "--recipe --backbone --methods --size --precision --checkpointing --memory --set"
COMMANDS = {
    "params": "--backbone --json",
    "compare": "--method --seeds --root --recipe --set --data --out --memory --device --overwrite --json",
    "bench": "--out --minutes --quick --device --overwrite --json",
    "gradpath": "--method --backbone --size --figures --overwrite --json",
    "memory": f"{COST} --batch-size --dry-run --modules --figure --device --overwrite --json",
    "time": f"{COST} --batch-size --rounds --device --json",
    "fit": f"{COST} --gpu --overhead --json",
    "tables": "--table --times --figures --overwrite --json",
    "train voc": TRAIN,
    "train coco": TRAIN,
    "train coco-boxes": TRAIN,
    "train ade20k": TRAIN,
    "eval": "RUN --root --split --best --weights --device --strict --json",
    "predict": "RUN IMAGES... --out --threshold --annotations --skip-bad --best --weights --device --overwrite --json",
    "export": "RUN --format --out --backbone-only --int8 --size --best --weights --json",
    "reproduce": "--part --arm --seeds --quick --photographs --set --data --out --jobs --costs --cache --device",
    "report": "LINES... --out --price",
    "pretrain": (
        "BACKBONE --images --generated --teacher --teacher-weights --out --steps --batch --lr --size --ema --no-ema "
        "--seed --workers --cache --device --overwrite --json"
    ),
    "probe": (
        "BACKBONES... --images --weights --known --named --every --size --teacher --teacher-weights --linear --cache "
        "--device --json"
    ),
    "data shapes": "OUT --layout --train --val --size --world --seed --overwrite",
    "data check": "RECIPE ROOT --set --shown",
    "data split": "RECIPE ROOT --set --share --seed --source --overwrite",
}


def test_the_package_has_all_its_names_and_no_others():
    assert set(e3va_lite.__all__) == set(PACKAGE.split())


@pytest.mark.parametrize("module", MODULES)
def test_documented_names_are_where_the_documents_take_them_from(module):
    found = import_module(f"e3va_lite.{module}")
    assert [name for name in MODULES[module].split() if not hasattr(found, name)] == []


def spelt(parameter: click.Parameter) -> list[str]:
    """An option's names, or an argument's in capitals, with dots where it may be repeated."""
    if isinstance(parameter, click.Option):
        return [*parameter.opts, *parameter.secondary_opts]
    return [parameter.name.upper() + "..." * (parameter.nargs == -1)]


def commands(group: click.Group, *above: str) -> dict[str, set[str]]:
    """The options and arguments of every command, those of groups included."""
    found = {}
    for name, command in group.commands.items():
        if isinstance(command, click.Group):
            found |= commands(command, *above, name)
        else:
            found[" ".join((*above, name))] = {name for parameter in command.params for name in spelt(parameter)}
    return found


def test_the_console_has_all_its_commands_and_options_and_no_others():
    assert commands(cli) == {name: set(options.split()) for name, options in COMMANDS.items()}
    assert {name for parameter in cli.params for name in spelt(parameter)} == {"--version"}
