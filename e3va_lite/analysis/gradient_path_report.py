"""What ``e3va gradpath`` reports: the gradient's path in several methods side by side, and equations (11) and (12)."""

import textwrap
from dataclasses import asdict

import torch
from torch import Tensor, nn

from ..backbones.base import trainable_parameters
from ..methods.registry import build_backbone, parse_method
from .gradient_path import trace
from .text_table import text_table

METHODS = ("full", "adapter", "e3va")  # the three of Figures 1 and 5
FIGURES = ("figure1.png", "figure2.png", "figure3.png", "figure4.png", "figure5.png", "lengths.png")

# What a report says below its table.
LEGEND = (
    "parameters, activations: how many of the backbone the gradient reaches, reductions that the highway runs itself "
    "left out.",
    "longest path: the most links between the loss and a parameter. A link is an operation that changes the gradient; "
    "additions and views only hand it on. Two links are the stand-in loss's own; neck and head would add the same to "
    "every method.",
    "MiB kept: what autograd saves for the backward pass, parameters not counted. It grows with the image; lengths do "
    "not.",
    "m: the links between a block's output and its adapter's, the factors of equation (11).",
)

# Label, for a terminal, for matplotlib. Jacobians stand in the order of the path, from the output to the parameter.
_EQUATIONS = (
    (
        "(11) as printed",
        "∂l[i+1]/∂f_A = ∂l[i+1]/∂f_i^1 ∂f_i^1/∂f_i^2 ... ∂f_i^m/∂f_A",
        r"$\frac{\partial l_{i+1}}{\partial f_A} = \frac{\partial l_{i+1}}{\partial f_i^1}\;"
        r"\frac{\partial f_i^1}{\partial f_i^2}\;\cdots\;\frac{\partial f_i^m}{\partial f_A}$",
    ),
    (
        "(11) corrected",
        "∂l[i+1]/∂f_A = Σ_p J(p,1) J(p,2) ... J(p,m_p), the sum over all paths p from l[i+1] to f_A; an addition has "
        "J = I, and so the residual's path gives I",
        r"$\frac{\partial l_{i+1}}{\partial f_A} = \sum_{p}\; J_{p,1}\,J_{p,2}\,\cdots\,J_{p,m_p}$"
        "  over all paths $p$; additions have $J = I$",
    ),
    (
        "(12) as printed",
        "∂L/∂θ_i = ∂L/∂l[i+1] ∂l[i+1]/∂f_A ∂f_A/∂θ_i = ∂L/∂l[i+1] (∂l[i+1]/∂f_i^1 ... ∂f_i^m/∂f_A) Σ_k ∂f_A/∂θ_i^k",
        r"$\frac{\partial L}{\partial \theta_i} = \frac{\partial L}{\partial l_{i+1}}\left("
        r"\frac{\partial l_{i+1}}{\partial f_i^1}\,\cdots\,\frac{\partial f_i^m}{\partial f_A}\right)"
        r"\sum_{k=1}^{n}\frac{\partial f_A}{\partial \theta_i^k}$",
    ),
    (
        "(12) corrected",
        "∂L/∂θ_i^k = ∂L/∂l[i+1] ∂l[i+1]/∂f_A ∂f_A/∂θ_i^k for each k = 1 ... n; the gradient is the vector of these, "
        "not their sum",
        r"$\frac{\partial L}{\partial \theta_i^k} = \frac{\partial L}{\partial l_{i+1}}\,"
        r"\frac{\partial l_{i+1}}{\partial f_A}\,\frac{\partial f_A}{\partial \theta_i^k}$  for each $k = 1 \ldots n$",
    ),
)


def on_meta(spec: str, name: str, size: tuple[int, int] = (64, 64)) -> tuple[nn.Module, Tensor]:
    """A backbone and one image on the meta device: the graph of a training step, and no memory.

    Args:
        spec: A method, with options if wanted: ``"e3va"``, ``"e3va:structure=chained,rank=16"``.
        name: A Swin.
        size: Height and width of the image, pixels.

    Raises:
        InputError: For an unknown method, option or backbone.
    """
    method, options = parse_method(spec)
    with torch.device("meta"):
        return build_backbone(method, name, **options), torch.empty(1, 3, *size)


def measure(spec: str, name: str, size: tuple[int, int] = (64, 64)) -> dict:
    """The trace of one method as a row, for the terminal and for JSON: settings, counts, lengths and blocks.

    Args:
        spec: A method, with options if wanted; ``name``: a Swin; ``size``: of the one image, see :func:`on_meta`.
    """
    backbone, image = on_meta(spec, name, size)
    found = asdict(trace(backbone, image))
    del found["parameters"], found["modules"]  # hundreds of names
    settings = {"method": spec, "backbone": name, "size": list(size), "batch": 1}
    return settings | {"trainable_parameters": trainable_parameters(backbone)} | found


def as_text(rows: list[dict]) -> str:
    """The report for a terminal: methods side by side, and block by block where it is a single one."""

    def mib(part: dict) -> str:
        return f"{part['bytes_on_path'] / 2**20:.2f}"

    def links(count: int | None) -> str:
        return "-" if count is None else str(count)

    height, width = rows[0]["size"]
    header = ["method", "parameters", "activations", "nodes", "longest path", "in stages 1 2 3 4", "MiB kept"]
    counts = ("backbone_parameters_reached", "backbone_activations_reached", "nodes", "longest_path")
    methods = [
        [row["method"], *(str(row[key]) for key in counts), " ".join(map(str, row["longest_path_per_stage"])), mib(row)]
        for row in rows
    ]
    lines = [f"the gradient's path through {rows[0]['backbone']}, one image of {height}x{width}, float32"]
    lines.append(text_table(header, methods))
    if len(rows) == 1:
        blocks = [
            [
                f"stage {block['stage']} block {block['block']}",
                links(block["links_from_loss"]),
                *map(links, block["m"] or (None, None)),
                mib(block),
            ]
            for block in rows[0]["blocks"]
        ]
        lines += ["", text_table(["", "links from the loss", "m, adapter 1", "m, adapter 2", "MiB kept"], blocks)]
    for notes in (LEGEND, [f"{label}: {text}" for label, text in equations().items()]):
        lines += ["", *(textwrap.fill(note, 110, subsequent_indent="  ") for note in notes)]
    return "\n".join(lines)


def equations(mathtext: bool = False) -> dict[str, str]:
    """Equations (11) and (12) as printed, each with its corrected form beside it, by label.

    The printed (11) is the product along one path; with residual connections there are several, and the derivative is
    the sum of their products. The printed (12) adds up the components of the gradient. For E3VA read e[i+1] for l[i+1].

    Args:
        mathtext: As matplotlib draws it, not as a terminal prints it.
    """
    return {label: drawn if mathtext else plain for label, plain, drawn in _EQUATIONS}
