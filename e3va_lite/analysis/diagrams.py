"""Figures 1 to 5 of the paper's subject, drawn from live models: what is coloured is what their traces say.

Every function returns a ``matplotlib.figure.Figure``: a notebook shows it, ``figure.savefig`` writes it. The models may
be on the meta device.
"""

from collections.abc import Callable, Iterable
from pathlib import Path

from matplotlib.figure import Figure
from timm.models.swin_transformer import SwinTransformer
from timm.models.swin_transformer_v2 import SwinTransformerV2
from torch import Tensor, nn, zeros

from ..adapters import LowRankAdapter
from ..backbones.base import stage_dims, trainable_parameters
from ..backbones.swin import NANO
from ..errors import InputError
from ..highway import E3VA, STRUCTURES
from ..methods.inside import ThroughBackbone, beside_block
from ..methods.registry import METHODS
from .drawing import INK, LEGEND, NOTE, Picture, canvas
from .gradient_path import Block, Trace, trace
from .gradient_path_report import FIGURES, equations, on_meta
from .plots import COLOURS, HIGHWAY

SWINS = (SwinTransformer, SwinTransformerV2)
EMBED = 3.0  # where the patch embedding stands, and the highway begins
BARS = "a bar is as long as its longest path"


def save(folder: Path, methods: Iterable[str], name: str, size: tuple[int, int] = (64, 64)) -> None:
    """Write all figures into a folder, as ``gradient_path_report.FIGURES``.

    Args:
        folder: Made where missing; what is there under these names is replaced.
        methods: For figures 1 and 5, with options if wanted: ``"e3va:structure=chained"``. The others show E3VA itself.
        name: A Swin; ``size``: height and width of the one image, pixels.

    Raises:
        InputError: For an unknown method, option or backbone, or one that the paper's figures do not show.
    """
    backbones = {spec: on_meta(spec, name, size)[0] for spec in methods}
    _check(backbones)
    highways = {structure: on_meta(f"e3va:structure={structure}", name, size)[0] for structure in STRUCTURES}
    standard, image = on_meta("e3va:adapter=standard", name, size)
    adapters = {"standard": standard, "dual low-rank": highways["parallel"]}
    figures = (
        figure1(backbones, image),
        figure2(highways["parallel"], image),
        figure3(highways, image),
        figure4({label: backbone.adapters[2][0][0] for label, backbone in adapters.items()}),
        figure5(backbones, image),
        lengths(),
    )
    folder.mkdir(parents=True, exist_ok=True)
    for file, figure in zip(FIGURES, figures, strict=True):
        figure.savefig(folder / file)


def _check(backbones: dict[str, nn.Module], stage: int = 1) -> None:
    """The drawings show what the paper has: its methods, on a Swin or a Swin V2, and a stage that runs."""
    for label, backbone in backbones.items():
        if not isinstance(backbone, ThroughBackbone | E3VA) or not isinstance(backbone.backbone, SWINS):
            name = getattr(backbone, "name", type(backbone).__name__)
            raise InputError(f"figures are drawn for the paper's methods on a Swin, not for {label} on {name}.")
        if not 1 <= stage <= backbone.last_stage:
            raise InputError(f"{label} has no stage {stage}: take one from 1 to {backbone.last_stage}.")


def _note(backbones: dict[str, nn.Module], images: Tensor) -> str:
    names = dict.fromkeys(getattr(backbone, "name", "Swin") for backbone in backbones.values())
    return f"{', '.join(names)}; images {' × '.join(map(str, images.shape))}"


# Figures 3 and 5: one block


def figure5(backbones: dict[str, nn.Module], images: Tensor, stage: int = 3) -> Figure:
    """Figure 5: the last Swin block of a stage, as each of the backbones runs it.

    Args:
        backbones: By label, any of :func:`e3va_lite.build_backbone`'s.
        images: Float (B, 3, H, W), on the backbones' device.
        stage: From 1; one that the backbones run.

    Raises:
        InputError: For a backbone that is not one of the paper's methods on a Swin, or that does not run the stage.
    """
    return _blocks("One Swin block: the gradient's path through it", backbones, images, stage)


def figure3(backbones: dict[str, nn.Module], images: Tensor, stage: int = 3) -> Figure:
    """Figure 3: how a block's two adapters meet. As :func:`figure5`, for highways of different structures."""
    return _blocks("Two adapters on the highway: how they meet decides how long the path is", backbones, images, stage)


def _blocks(title: str, backbones: dict[str, nn.Module], images: Tensor, stage: int) -> Figure:
    _check(backbones, stage)
    traces = {label: trace(backbone, images) for label, backbone in backbones.items()}
    longest = max(found.longest_path_per_stage[stage - 1] for found in traces.values())
    widths = [8.8 if isinstance(b, E3VA) else 6.4 if _adapters_of(b) == "beside" else 4.8 for b in backbones.values()]
    note = f"the last block of stage {stage}; {_note(backbones, images)}"
    figure, axes = canvas(title, note, max(sum(widths), 14) + 0.4, 15.0)
    axes.text(0.6, 0.6, f"(11)  {equations(mathtext=True)['(11) corrected']};  $m$ counts the others", color=NOTE)
    axes.text(0.6, 1.2, BARS, fontsize=9, color=NOTE)
    left = 0.4
    for (label, backbone), width in zip(backbones.items(), widths, strict=True):
        found = traces[label]
        block = [block for block in found.blocks if block.stage == stage][-1]
        picture = Picture(axes, left + 2.1, 4.1, *_parts_of(found, block))
        attention = "MSA, LoRA" if hasattr(backbone, "updates") else "W/SW-MSA"
        norms_last = isinstance(backbone.backbone, SwinTransformerV2)
        _draw_stream(picture, _adapters_of(backbone), attention, norms_last)
        if isinstance(backbone, E3VA):
            structure = next(name for name, join in STRUCTURES.items() if join is backbone.join)
            _draw_highway(picture, structure, *(("norm1", "norm2") if norms_last else ("attn", "mlp")))
        middle = width / 2 - 2.1
        picture.text(middle, 10.65, label, fontsize=12, color=INK, va="baseline")
        picture.text(middle, 10.2, f"{trainable_parameters(backbone) / 1e6:.2f} M trained", va="baseline")
        counts = "no adapters" if not block.m else f"m = {block.m[0]} to adapter 1, {block.m[1]} to adapter 2"
        kept = f"{block.bytes_on_path / 2**10:,.0f} KiB kept for this block"
        length = found.longest_path_per_stage[stage - 1]
        picture.text(middle, -0.6, f"{kept}\n{counts}")
        picture.text(middle, -1.65, f"longest path in stage {stage}: {length} links")
        picture.bar(middle - 2, -2.25, 4.0 * length / max(longest, 1))
        left += width
    return figure


def _parts_of(found: Trace, block: Block) -> tuple[dict[str, bool], dict[str, bool]]:
    """What the gradient reaches, and where it ends, in one block: by the names of its parts."""
    prefix = f"backbone.layers.{block.stage - 1}.blocks.{block.block - 1}."
    names = {part: prefix + part for part in ("norm1", "attn", "norm2", "mlp")}
    names |= {f"a{number}": name for number, name in enumerate(block.adapters, start=1)}
    reached = {part: _has(found.modules, name) for part, name in names.items()}
    reached |= {"l": block.stream_reached, "e": block.input_reached, "e_out": block.links_from_loss is not None}
    reached |= dict.fromkeys(("sum2", "l_out"), block.output_reached)
    trained = {part: _has(found.parameters, name) for part, name in names.items()}
    trained["attn"] |= _has(found.parameters, f"updates.{found.blocks.index(block)}")  # LoRA's, beside q and v
    return reached, trained


def _has(names: tuple[str, ...], part: str) -> bool:
    """Whether a part of the model, or something in it, is among the names."""
    return any(f"{name}.".startswith(f"{part}.") for name in names)


def _adapters_of(backbone: nn.Module) -> str | None:
    """Where the adapters stand in the stream."""
    if isinstance(backbone, E3VA) or not len(backbone.extra):
        return None
    return "beside" if backbone.run_block is beside_block else "inside"


def _draw_stream(picture: Picture, adapters: str | None, attention: str, norms_last: bool) -> None:
    """The block itself, equation (5), with ``adapters`` "inside" it (6), "beside" its parts, or None; forward is up.

    With ``norms_last`` (Swin V2) the norms stand behind attention and MLP.
    """
    picture.box("l", 0, 0, "$l_i$", 0.9, tensor=True)
    # The sum's number, the layer, its input, and the heights of layer, fork of the residual, and sum.
    halves = ((1, "attn", attention, "l", 1.2, 0.6, 4.4), (2, "mlp", "MLP", "sum1", 5.4, 4.85, 8.6))
    for number, layer, text, source, y, low, high in halves:
        first, last = order = (layer, f"norm{number}") if norms_last else (f"norm{number}", layer)
        for height, part in zip((y, y + 1.1), order, strict=True):
            picture.box(part, 0, height, text if part == layer else f"LN{'₁₂'[number - 1]}")
        picture.lines(f"{source} {first} {last}")
        adapter = f"a{number}"
        if adapters == "inside":
            picture.box(adapter, 0, y + 2.2, f"adapter {number}")
            picture.line(last, adapter)
            last = adapter
        elif adapters == "beside":
            picture.box(adapter, 2.6, y + 1.1, f"adapter {number}")
            picture.line(source, adapter, (0, low), (2.6, low))
        picture.plus(f"sum{number}", 0, high, source, last, *([adapter] if adapters == "beside" else []))
        picture.line(last, f"sum{number}")
        picture.line(source, f"sum{number}", (0, low), (-1.5, low), (-1.5, high))
        if adapters == "beside":
            picture.line(adapter, f"sum{number}", (2.6, high))
    picture.box("l_out", 0, 9.6, "$l_{i+1}$", 0.9, tensor=True)
    picture.line("sum2", "l_out")


def _draw_highway(picture: Picture, structure: str, tap1: str, tap2: str) -> None:
    """The highway at the right of the block, equation (8) or another structure; the taps are layers of the block."""
    road = 5.3
    picture.box("e", road, 0, "$e_i$", 0.9, tensor=True)
    picture.box("e_out", road, 9.6, "$e_{i+1}$", 0.9, tensor=True)
    if structure == "chained":
        picture.plus("join1", road, 2.3, "e", tap1)
        picture.box("a1", road, 3.6, "adapter 1")
        picture.plus("join2", road, 6.5, "a1", tap2)
        picture.box("a2", road, 7.8, "adapter 2")
        picture.lines("e join1 a1 join2 a2 e_out", f"{tap1} join1", f"{tap2} join2")
    elif structure == "stacked":
        picture.box("a1", 2.3, 2.3, "adapter 1")
        picture.plus("join1", 2.3, 6.5, "a1", tap2)
        picture.box("a2", 3.85, 6.5, "adapter 2")
        picture.plus("join2", road, 6.5, "e", "a2")
        picture.lines("e join2 e_out", f"{tap1} a1 join1", f"{tap2} join1 a2 join2")
    else:
        for number, y, below in ((1, 2.3, "e"), (2, 6.5, "join1")):
            picture.box(f"a{number}", 2.8, y, f"adapter {number}")
            picture.plus(f"join{number}", road, y, below, f"a{number}")
        picture.lines("e join1 join2 e_out", f"{tap1} a1 join1", f"{tap2} a2 join2")


# Figures 1 and 2: the whole network


def figure1(backbones: dict[str, nn.Module], images: Tensor) -> Figure:
    """Figure 1: the network from the image to the loss, a row for each of the backbones.

    Args:
        backbones: By label, any of :func:`e3va_lite.build_backbone`'s.
        images: Float (B, 3, H, W), on the backbones' device.

    Raises:
        InputError: For a backbone that is not one of the paper's methods on a Swin.
    """
    _check(backbones)
    traces = {label: trace(backbone, images) for label, backbone in backbones.items()}
    longest = max(found.longest_path for found in traces.values())
    heights = [7.9 if isinstance(backbone, E3VA) else 5.6 for backbone in backbones.values()]
    title = "The whole network: the gradient's path back from the loss"
    figure, axes = canvas(title, f"{_note(backbones, images)}; {BARS}", 26.4, sum(heights), 0.46)
    bottom = sum(heights)
    for (label, backbone), height in zip(backbones.items(), heights, strict=True):
        bottom -= height
        found = traces[label]
        picture = Picture(axes, 0.6, bottom + 1.1, *_network_of(found, backbone))
        _draw_network(picture, backbone, _stage, stage_width=2.0, road=2.5 if isinstance(backbone, E3VA) else 0)
        picture.text(0, height - 1.75, label, fontsize=12, color=INK, ha="left", va="baseline")
        numbers = (
            f"longest path {found.longest_path} links",
            f"{trainable_parameters(backbone) / 1e6:.2f} M trained",
            f"{found.backbone_activations_reached} outputs of the backbone passed",
            f"{found.bytes_on_path / 2**20:.1f} MiB kept",
        )
        picture.text(0, height - 2.35, "     ".join(numbers), ha="left", va="baseline")
        picture.bar(0, height - 2.85, 20 * found.longest_path / max(longest, 1))
    return figure


def figure2(backbone: E3VA, images: Tensor) -> Figure:
    """Figure 2: E3VA as a whole, with the last block of every stage: the highway above the frozen stream.

    Args:
        backbone: Of the structure ``parallel``.
        images: Float (B, 3, H, W), on the backbone's device.

    Raises:
        InputError: For anything but an E3VA of that structure on a Swin.
    """
    _check({"this model": backbone})
    if getattr(backbone, "join", None) is not STRUCTURES["parallel"]:
        raise InputError("figure 2 is drawn for E3VA with the structure 'parallel': figure 3 shows the others.")
    found = trace(backbone, images)
    title = "E3VA: the stream $l$ below is only run forward, what is trained stands on the highway $e$ above"
    reductions = "the stream's own, frozen" if backbone.reductions is None else "copies of the stream's, trained"
    note = f"{_note({'': backbone}, images)}; the highway's reductions are {reductions}"
    figure, axes = canvas(title, note, 10.4 + 8.5 * backbone.last_stage, 8.0, 0.4)
    picture = Picture(axes, 0.6, 1.9, *_network_of(found, backbone))
    for number in range(1, backbone.last_stage + 1):
        reached, trained = _parts_of(found, [block for block in found.blocks if block.stage == number][-1])
        picture.reached |= {f"{part}_{number}": passed for part, passed in reached.items()}
        picture.trained |= {f"{part}_{number}": ends for part, ends in trained.items()}
    _draw_network(picture, backbone, _stage_in_detail, stage_width=6.2, road=3.4)
    return figure


def _network_of(found: Trace, backbone: nn.Module) -> tuple[dict[str, bool], dict[str, bool]]:
    """As :func:`_parts_of`, for the parts of the whole network."""
    own = backbone.reductions if isinstance(backbone, E3VA) else None
    names = {"embed": ["backbone.patch_embed"]}
    for number in range(1, backbone.last_stage + 1):
        layer = f"backbone.layers.{number - 1}"
        blocks = {index: block for index, block in enumerate(found.blocks) if block.stage == number}
        names[f"s{number}"] = [f"{layer}.blocks.{block.block - 1}" for block in blocks.values()]
        names[f"a{number}"] = [name for block in blocks.values() for name in block.adapters]
        names[f"a{number}"] += [f"updates.{index}" for index in blocks]  # LoRA's
        names[f"r{number}"] = [f"{layer}.downsample" if own is None else f"reductions.{number - 1}"]
        names[f"n{number}"] = [f"norms.{number}"]
    trained = {part: any(_has(found.parameters, name) for name in of) for part, of in names.items()}
    reached = {part: any(_has(found.modules, name) for name in of) or trained[part] for part, of in names.items()}
    # They are not part of the model that was traced; they are trained in every method.
    return reached | {"neck": True, "loss": True}, trained | {"neck": True}


def _draw_network(picture: Picture, backbone: nn.Module, draw_stage: Callable, stage_width: float, road: float) -> None:
    """From the image to the loss, forward to the right; at the height ``road`` the highway, or 0 without one.

    ``draw_stage(picture, backbone, number, x, road, stream, highway)`` draws a stage from ``x`` on, behind the parts
    ``stream`` and ``highway``, and returns its own last parts.
    """
    picture.box("image", 0.6, 0, "image", 1.2, tensor=True)
    picture.box("embed", EMBED, 0, "patch\nembedding", 2.0, 0.95)
    picture.line("image", "embed")
    right = 5.0 + (stage_width + 2.3) * backbone.last_stage
    picture.box("neck", right - 0.2, road + 2.0, "neck, head", 2.0)
    picture.box("loss", right + 2.2, road + 2.0, "loss", 1.2, tensor=True)
    picture.line("neck", "loss")
    stream = highway = "embed"
    for number in range(1, backbone.last_stage + 1):
        x = 5.0 + (stage_width + 2.3) * (number - 1)
        if number > 1 and road:
            picture.reached[f"l{number}"] = picture.reached[stream]  # run on the stream, the same layers or others
            picture.box(f"l{number}", x - 1.15, 0, "reduce", 1.3)
            picture.lines(f"{stream} l{number}")
            stream = f"l{number}"
        if number > 1:
            picture.box(f"r{number}", x - 1.15, road, "reduce", 1.3)
            picture.lines(f"{highway} r{number}")
            highway = f"r{number}"
        stream, highway = draw_stage(picture, backbone, number, x, road, stream if road else highway, highway)
        if str(number) in backbone.norms:
            x = picture.parts[highway][0] - picture.x
            picture.box(f"n{number}", x, road + 1.2, "norm", 1.2)
            picture.line(highway, f"n{number}")
            picture.line(f"n{number}", "neck", (x, road + 2.0))


def _stage(
    picture: Picture, backbone: nn.Module, number: int, x: float, road: float, stream: str, highway: str
) -> tuple:
    """A stage as one box, with what a method has added to its blocks; on a highway, where that meets it."""
    name, extra, blocks = f"s{number}", f"a{number}", len(backbone.backbone.layers[number - 1].blocks)
    text = "LoRA" if hasattr(backbone, "updates") else f"{2 * blocks} adapters"
    picture.box(name, x + 1, 0, f"stage {number}\n{blocks} blocks", 2.0, 0.95)
    picture.line(stream, name)
    if not road:
        if picture.trained[extra]:
            picture.box(extra, x + 1, -0.66, text, 2.0, 0.44)
        return name, name
    chained = backbone.join is STRUCTURES["chained"]
    picture.box(extra, x + 1, road if chained else 1.3, text, 2.0)
    picture.line(name, extra)
    last = extra if chained else f"p{number}"
    if not chained:
        picture.plus(last, x + 1, road, highway, extra)
        picture.line(extra, last)
    picture.line(highway, last, *([(EMBED, road)] if highway == "embed" else []))
    return name, last


def _stage_in_detail(
    picture: Picture, backbone: E3VA, number: int, x: float, road: float, stream: str, highway: str
) -> tuple:
    """One block of the stage: equation (7) on the stream, equation (8) on the highway."""
    order = -1 if isinstance(backbone.backbone, SwinTransformerV2) else 1  # which norms behind the layers
    for part, tap, layers, middle in ((1, "attn", ("LN₁", "W/SW-MSA"), x + 1.0), (2, "mlp", ("LN₂", "MLP"), x + 4.2)):
        text = "\n".join(layers[::order])
        tap, total, adapter, join = (f"{name}_{number}" for name in (tap, f"sum{part}", f"a{part}", f"join{part}"))
        picture.box(tap, middle, 0, text, 1.9, 0.95)
        picture.plus(total, middle + 1.6, 0, stream, tap)
        picture.lines(f"{stream} {tap} {total}")
        fork = middle - 1.3
        picture.line(stream, total, (fork, 0), (fork, -0.85), (middle + 1.6, -0.85))
        picture.box(adapter, middle, 1.8, f"adapter {part}", 1.9)
        picture.plus(join, middle, road, highway, adapter)
        picture.lines(f"{tap} {adapter} {join}")
        picture.line(highway, join, *([(EMBED, road)] if highway == "embed" else []))
        stream, highway = total, join
    blocks, channels = len(backbone.adapters[number - 1]), stage_dims(backbone.backbone)[number - 1]
    picture.text(x + 2.8, -1.15, f"stage {number}: {blocks} such blocks, {channels} channels")
    return stream, highway


# Figure 4: adapters


def figure4(adapters: dict[str, nn.Module]) -> Figure:
    """Figure 4: adapters from inside, with the dimensions that they have.

    Args:
        adapters: By label, ``StandardAdapter`` or ``LowRankAdapter``, e.g. ``backbone.adapters[2][0][0]``.
    """
    title = r"Adapters from inside: $A(x) = x + U(\mathrm{GeLU}(D(x)))$"
    note = "widths grow with the square root of the dimension; biases are counted, not drawn"
    widths = [16.0 if isinstance(adapter, LowRankAdapter) else 9.5 for adapter in adapters.values()]
    figure, axes = canvas(title, note, sum(widths), 11.4, legend=LEGEND[:2])
    left = 0.0
    for (label, adapter), width in zip(adapters.items(), widths, strict=True):
        halves = {"D": adapter.down, "U": adapter.up}
        trained = {name: any(p.requires_grad for p in half.parameters()) for name, half in halves.items()}
        _draw_adapter(Picture(axes, left + width / 2 - 0.8, 1.9, {}, trained), label, adapter)
        left += width
    return figure


def _draw_adapter(picture: Picture, label: str, adapter: nn.Module) -> None:
    """Forward is up; the two branches stand side by side, each on all of its input."""
    low_rank = isinstance(adapter, LowRankAdapter)
    if low_rank:
        (middle, double), n = adapter.down.s.shape, adapter.down.t.shape[1]
        rank, columns, total = double // 2, (-2.3, 2.3), "sum, "
        formula = rf"$2 \cdot 2\alpha(m + n) + m + n$;  full $D$ and $U$ of this $m$: {2 * middle * n + middle + n:,}"
    else:
        middle, n = adapter.down.weight.shape
        rank, columns, total, formula = None, (0.0,), "", "$2mn + m + n$"
    edge = columns[-1] + 2.2

    def projection(name: str, low: float, takes: int, gives: int, rows: str, cols: str) -> None:
        steps = [(rf"${name}$: ${rows} \times {cols}$", takes, gives)]
        if low_rank:
            steps = [
                (rf"$t_1, t_2$ of ${name}$: $\alpha \times {cols}$", takes, rank),
                (rf"$s_1, s_2$ of ${name}$: ${rows} \times \alpha$", rank, gives),
            ]
        height = 2.8 / len(steps)
        for start, (text, below, above) in zip((low, low + height), steps, strict=False):
            picture.text(edge + 0.2, start + height / 2, f"{text} = {above} × {below}", ha="left", va="center")
            for column in columns:
                widths = (4 * (below / n) ** 0.5, 4 * (above / n) ** 0.5)
                picture.trapezoid(name, column, start, start + height - 0.03, widths)

    picture.text(0, 9.0, label, fontsize=12, color=INK, va="baseline")
    picture.box("x", 0, 0, f"$x$,  $n$ = {n}", 2 * edge, 0.5, tensor=True)
    projection("D", 0.3, n, middle, "m", "n")
    picture.box("gelu", 0, 3.4, f"{total}GeLU,  $m$ = {middle}", 2 * edge, 0.5, tensor=True)
    projection("U", 3.7, middle, n, "n", "m")
    picture.box("u", 0, 6.8, f"{total}$n$ = {n}", 2 * edge, 0.5, tensor=True)
    picture.plus("sum", 0, 7.6, "x")
    picture.box("out", 0, 8.4, "$A(x)$", 1.6, 0.5, tensor=True)
    picture.lines("u sum out")
    picture.line("x", "sum", (-edge - 0.5, 0), (-edge - 0.5, 7.6))
    count = sum(p.numel() for p in adapter.parameters())
    picture.text(0, -0.6, f"{count:,} parameters: {formula}" + (rf";  $\alpha$ = {rank}" if low_rank else ""))


# The length of a stage

DENSE = {"strict_img_size": False, "always_partition": True}  # as create_swin builds it
CURVES = {
    "adapter": ("adapter", {}, COLOURS["adapter"], "-"),
    "full": ("full", {}, COLOURS["full"], "-"),
    "e3va, chained": ("e3va", {"structure": "chained", "rank": 1}, HIGHWAY, ":"),
    "e3va, stacked": ("e3va", {"structure": "stacked", "rank": 1}, HIGHWAY, "--"),
    "e3va, parallel": ("e3va", {"rank": 1}, HIGHWAY, "-"),
}


def stage_length(method: str, blocks: int, **options) -> int:
    """The longest path within stage 3 when it has that many blocks; widths do not matter, and are small."""
    swin = SwinTransformer(**NANO | {"embed_dim": 16, "depths": (1, 1, blocks, 1)}, **DENSE, drop_path_rate=0.0)
    return trace(METHODS[method](swin, (3,), **options), zeros(1, 3, 32, 32)).longest_path_per_stage[2]


def lengths(blocks: tuple[int, ...] = (2, 6, 12, 18, 24)) -> Figure:
    """The longest path within stage 3 over its number of blocks, for three methods and the highway's structures."""
    figure = Figure(figsize=(8, 4.8), dpi=150, facecolor="white")
    axes = figure.add_axes((0.09, 0.12, 0.68, 0.74))
    title = "The parallel highway's path is as long in a deep stage as in a short one"
    figure.text(0.02, 0.93, title, fontsize=13, color=INK)
    curves = {
        label: [stage_length(method, n, **options) for n in blocks] for label, (method, options, *_) in CURVES.items()
    }
    top = max(map(max, curves.values()))
    place = -top
    for label, values in sorted(curves.items(), key=lambda item: item[1][-1]):
        *_, colour, style = CURVES[label]
        axes.plot(blocks, values, style, color=colour, linewidth=2.2, marker="o", markersize=4, clip_on=False)
        place = max(values[-1], place + 0.055 * top)  # labels of near curves stand above one another
        text = (f"{label}: {values[-1]}", (blocks[-1], place), (9, 0))
        axes.annotate(*text, textcoords="offset points", va="center", color=INK)
    axes.set(xticks=blocks, xlim=(0, blocks[-1]), ylim=(0, 1.05 * top))
    axes.set_xlabel("blocks of stage 3 (Swin-T 6; Swin-S, -B, -L 18)", color=INK)
    axes.set_ylabel("links on the longest path within the stage", color=INK)
    axes.spines[["top", "right"]].set_visible(False)
    return figure
