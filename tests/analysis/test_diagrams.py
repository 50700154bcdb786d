"""The drawings: they follow the live model, and can be read."""

import contextlib
import itertools
import types

import pytest
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import same_color
from matplotlib.patches import FancyArrowPatch, FancyBboxPatch
from matplotlib.text import Text

from e3va_lite import InputError, build_backbone, highway
from e3va_lite.analysis import diagrams
from e3va_lite.analysis.drawing import FORWARD, GRADIENT, TRAINED
from e3va_lite.analysis.gradient_path import trace
from e3va_lite.analysis.gradient_path_report import on_meta
from tests.analysis.test_gradient_path import leak_into_stage_4

pytestmark = pytest.mark.filterwarnings("error", "ignore:rank=")
NAME, IMAGE = "swin_nano", torch.empty(1, 3, 64, 64, device="meta")
SPECS = (
    "full", "fixed", "bitfit", "norm", "partial1", "adapter", "lora", "adaptformer", "lorand", "e3va", "e3va++",
    "e3va:structure=stacked", "e3va:structure=chained", "e3va:adapter=standard,reduction=trainable",
)  # fmt: skip


def backbone(spec):
    return on_meta(spec, NAME)[0]


def shapes(figure):
    """The shapes of a drawing that shows one backbone, by the name of the part."""
    return {patch.get_gid(): patch for patch in figure.axes[0].patches if patch.get_gid()}


def travelled(patch):
    colour = patch.get_edgecolor()
    assert same_color(colour, GRADIENT) or same_color(colour, FORWARD)
    return same_color(colour, GRADIENT)


def trained(patch):
    return same_color(patch.get_facecolor(), TRAINED)


def legible(figure):
    """No text leaves the figure, its box, or lies on another text."""
    renderer = FigureCanvasAgg(figure).get_renderer()
    figure.draw(renderer)
    width, height = figure.bbox.width, figure.bbox.height
    texts = [*figure.texts, *(text for legend in figure.legends for text in legend.get_texts())]
    texts += [text for axes in figure.axes for text in (*axes.texts, axes.xaxis.label, axes.yaxis.label)]
    texts = [text for text in texts if text.get_text()]
    extents = {text.get_text() + f" ({i})": text.get_window_extent(renderer) for i, text in enumerate(texts)}
    for text, extent in extents.items():
        inside = extent.x0 >= 0 and extent.y0 >= 0 and extent.x1 <= width and extent.y1 <= height
        assert inside, f"'{text}' leaves the figure"
        for box in figure.findobj(FancyBboxPatch):
            frame = box.get_window_extent(renderer)
            if box.get_gid() and frame.contains((extent.x0 + extent.x1) / 2, (extent.y0 + extent.y1) / 2):
                assert frame.x0 <= extent.x0 and extent.x1 <= frame.x1, f"'{text}' leaves its box"
    for (one, a), (other, b) in itertools.combinations(extents.items(), 2):
        assert not a.overlaps(b), f"'{one}' lies on '{other}'"


@pytest.mark.parametrize("spec", SPECS)
def test_every_method_can_be_drawn_and_read(spec):
    for draw in (diagrams.figure1, diagrams.figure5):
        legible(draw({spec: backbone(spec)}, IMAGE))


def test_side_by_side():
    three = {spec: backbone(spec) for spec in ("full", "adapter", "e3va")}
    for draw in (diagrams.figure1, diagrams.figure5):
        figure = draw(three, IMAGE)
        legible(figure)
        bars = [patch.get_width() for patch in figure.axes[0].patches if patch.get_gid() == "length"]
        key = "longest_path" if draw is diagrams.figure1 else "longest_path_per_stage"
        found = [getattr(trace(one, IMAGE), key) for one in three.values()]
        lengths = found if draw is diagrams.figure1 else [stages[2] for stages in found]
        assert [bar / bars[1] for bar in bars] == pytest.approx([length / lengths[1] for length in lengths])


def test_the_structures_side_by_side():
    legible(diagrams.figure3({name: backbone(f"e3va:structure={name}") for name in highway.STRUCTURES}, IMAGE))


@pytest.mark.parametrize("reduction", highway.REDUCTIONS)
def test_the_whole_of_e3va(reduction):
    figure = diagrams.figure2(backbone(f"e3va:reduction={reduction}"), IMAGE)
    legible(figure)
    parts = shapes(figure)
    assert trained(parts["r2"]) == (reduction == "trainable")
    for stage in range(1, 5):
        assert not travelled(parts[f"attn_{stage}"]) and not travelled(parts[f"sum2_{stage}"])
        assert travelled(parts[f"a1_{stage}"]) and trained(parts[f"a1_{stage}"]) and travelled(parts[f"join2_{stage}"])


@pytest.mark.parametrize("spec", ["e3va:structure=chained", "adapter"])
def test_figure_2_is_for_the_parallel_highway(spec):
    with pytest.raises(InputError, match="structure 'parallel'"):
        diagrams.figure2(backbone(spec), IMAGE)


BLOCK = ("l", "norm1", "attn", "sum1", "norm2", "mlp", "sum2", "l_out")


@pytest.mark.parametrize(
    ("spec", "passes", "trains"),
    [
        ("full", BLOCK, {"norm1", "attn", "norm2", "mlp"}),
        ("adapter", (*BLOCK, "a1", "a2"), {"a1", "a2"}),
        ("lora", BLOCK, {"attn"}),
        ("norm", BLOCK, {"norm1", "norm2"}),
        ("e3va", ("e", "a1", "a2", "join1", "join2", "e_out"), {"a1", "a2"}),
        ("e3va:structure=chained", ("e", "a1", "a2", "join1", "join2", "e_out"), {"a1", "a2"}),
        ("fixed", (), set()),
    ],
)
def test_the_block_is_coloured_as_it_is_traced(spec, passes, trains):
    parts = {name: patch for name, patch in shapes(diagrams.figure5({spec: backbone(spec)}, IMAGE)).items()}
    boxes = {name for name in parts if ">" not in name and name != "length"}
    assert {name for name in boxes if travelled(parts[name])} == set(passes)
    assert {name for name in boxes if trained(parts[name])} == trains
    for name in parts:
        if ">" in name:  # a line between two parts, and the arrow's way along it
            source, target = name.split(">")
            assert travelled(parts[name]) == ({source, target} <= set(passes))


V2 = "swinv2_tiny_window8_256"


@pytest.mark.parametrize("spec", ["full", "adapter", "adaptformer", "e3va"])
def test_a_swin_v2_norms_behind_its_attention(spec):
    live = on_meta(spec, V2)[0]
    figure = diagrams.figure5({spec: live}, IMAGE)
    legible(figure)
    parts = shapes(figure)
    assert {"l>attn", "attn>norm1", "sum1>mlp", "mlp>norm2"} <= set(parts)
    assert not {"norm1>attn", "norm2>mlp", "attn>sum1", "attn>a1"} & set(parts)
    assert (f"norm1>{'sum1' if spec in ('full', 'adaptformer') else 'a1'}") in parts
    assert travelled(parts["l"]) == (spec != "e3va")
    for draw in (diagrams.figure1, *([diagrams.figure3] if spec == "e3va" else [])):
        legible(draw({spec: live}, IMAGE))


@pytest.mark.parametrize("name", [NAME, V2])
def test_the_gradient_of_the_last_block_alone_ends_in_it(name):
    last = trace(on_meta("partial1", name)[0], IMAGE).blocks[-1]
    assert not last.stream_reached and not last.input_reached


@pytest.mark.parametrize(
    ("draw", "spec", "name", "options", "sentence"),
    [
        *((draw, "lst", NAME, {}, "not for lst on") for draw in ("figure1", "figure2", "figure3", "figure5")),
        ("figure5", "losa", NAME, {}, "not for losa on"),
        ("figure5", "e3va", "vit_tiny_patch16_224", {}, "not for e3va on vit_tiny_patch16_224"),
        ("figure5", "full", NAME, {"stage": 5}, "full has no stage 5: take one from 1 to 4"),
        ("figure3", "e3va", NAME, {"stage": 0}, "e3va has no stage 0"),
    ],
)
def test_what_is_not_drawn_is_one_sentence(draw, spec, name, options, sentence):
    live = on_meta(spec, name)[0]
    live = live if draw == "figure2" else {spec: live}
    with pytest.raises(InputError, match="not for this model on" if draw == "figure2" else sentence):
        getattr(diagrams, draw)(live, IMAGE, **options)


def test_arrows_turn_where_the_gradient_goes():
    full, e3va = (shapes(diagrams.figure5({spec: backbone(spec)}, IMAGE)) for spec in ("full", "e3va"))
    for parts, back in ((full, True), (e3va, False)):
        line = parts["norm1>attn"]
        assert isinstance(line, FancyArrowPatch)
        (_, start), (_, end) = line._path_original.vertices
        assert (end < start) == back


def test_another_flag_is_another_drawing():
    """One module of a frozen backbone is trained: its box changes, and the way from the loss to it."""
    live = backbone("fixed")
    assert not any(travelled(p) for name, p in shapes(diagrams.figure5({"": live}, IMAGE)).items() if name != "length")
    live.backbone.layers[2].blocks[1].mlp.fc2.requires_grad_()
    parts = shapes(diagrams.figure5({"": live}, IMAGE))
    assert trained(parts["mlp"]) and travelled(parts["mlp"]) and travelled(parts["l_out"])
    assert not travelled(parts["norm2"]) and not travelled(parts["sum1"]) and not travelled(parts["sum1>sum2"])
    network = shapes(diagrams.figure1({"": live}, IMAGE))
    assert [travelled(network[f"s{stage}"]) for stage in range(1, 5)] == [False, False, True, True]
    assert [trained(network[f"s{stage}"]) for stage in range(1, 5)] == [False, False, True, False]


def test_a_leak_is_seen(monkeypatch):
    """Without ``no_grad`` and with one flag on, a gradient runs down the stream: the drawing shows it."""
    live = backbone("e3va")
    live.backbone.patch_embed.proj.bias.requires_grad_()
    assert not travelled(shapes(diagrams.figure5({"": live}, IMAGE))["attn"])
    monkeypatch.setattr(highway, "torch", types.SimpleNamespace(no_grad=contextlib.nullcontext))
    parts = shapes(diagrams.figure5({"": live}, IMAGE))
    assert travelled(parts["attn"]) and travelled(parts["l"]) and travelled(parts["attn>a1"])
    assert travelled(shapes(diagrams.figure1({"": live}, IMAGE))["embed"])


def test_the_stream_of_a_leak_is_coloured_as_far_as_the_loss_depends_on_it():
    """Stage 4's stream starts from the highway: its last block's output is used by nobody."""
    live = leak_into_stage_4(backbone("e3va"))
    figure = diagrams.figure5({"": live}, IMAGE, stage=4)
    parts = shapes(figure)
    assert travelled(parts["l"]) and travelled(parts["mlp"]) and travelled(parts["mlp>a2"])
    assert not travelled(parts["l_out"]) and not travelled(parts["sum2"]) and not travelled(parts["mlp>sum2"])
    kept = trace(live, IMAGE).blocks[-1].bytes_on_path
    assert any(f"{kept / 1024:,.0f} KiB kept" in text.get_text() for text in figure.findobj(Text))


@pytest.mark.parametrize("draw", [diagrams.figure1, diagrams.figure5])
def test_a_bar_says_what_it_is(draw):
    texts = " ".join(text.get_text() for text in draw({"full": backbone("full")}, IMAGE).findobj(Text))
    assert diagrams.BARS in texts and "longest path" in texts


def test_the_network_is_coloured_as_it_is_traced():
    adapter, e3va = (shapes(diagrams.figure1({spec: backbone(spec)}, IMAGE)) for spec in ("adapter", "e3va"))
    for stage in range(1, 5):
        assert travelled(adapter[f"s{stage}"]) and not trained(adapter[f"s{stage}"]) and trained(adapter[f"a{stage}"])
        assert not travelled(e3va[f"s{stage}"]) and travelled(e3va[f"a{stage}"]) and trained(e3va[f"n{stage}"])
    assert not travelled(adapter["embed"]) and not travelled(e3va["embed"]) and not travelled(e3va["embed>p1"])
    assert travelled(e3va["r2"]) and not travelled(e3va["l2"]) and not trained(e3va["r2"])


def test_fewer_stages():
    for method in ("adapter", "e3va"):
        with torch.device("meta"):
            live = build_backbone(method, NAME, stages=(2, 3))
        parts = shapes(diagrams.figure1({method: live}, IMAGE))
        assert {"n2", "n3", "s1"} <= set(parts) and not {"n1", "n4", "s4"} & set(parts)


def test_adapters_are_drawn_with_their_dimensions():
    adapters = {spec: backbone(spec).adapters[2][0][0] for spec in ("e3va", "e3va:adapter=standard")}
    figure = diagrams.figure4(adapters)
    legible(figure)
    texts = " ".join(text.get_text() for text in figure.findobj(Text))
    n, m, rank = 160, 80, 8
    for part in (
        f"= {n} × {rank}",
        f"= {rank} × {m}",
        f"= {m} × {rank}",
        f"= {rank} × {n}",
        "= 160 × 32",
        "= 32 × 160",
    ):
        assert part in texts
    assert f"{2 * 2 * rank * (m + n) + m + n:,} parameters" in texts and f"{2 * 32 * n + 32 + n:,} parameters" in texts
    assert f"{2 * m * n + m + n:,}" in texts  # what full matrices would take
    adapters["e3va"].up.requires_grad_(False)
    assert not trained(shapes(diagrams.figure4({"": adapters["e3va"]}))["U"])


def test_lengths_over_depth():
    figure = diagrams.lengths(blocks=(1, 3))
    legible(figure)
    curves = {tuple(line.get_ydata()) for line in figure.axes[0].lines}
    assert curves == {(17, 51), (11, 33), (10, 30), (10, 10), (5, 5)}
