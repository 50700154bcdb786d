import json
from itertools import product

import pytest
import torch

from e3va_lite import build_backbone, trace
from e3va_lite.analysis.gradient_path_report import on_meta
from e3va_lite.analysis.isolation import random_functional
from e3va_lite.analysis.path_explorer import METHODS, Switched, paths, state
from e3va_lite.backbones.base import f_p1, f_p2

SIZE = (64, 64)
TUNED = {"full": "full", "adapter": "adapter:fpn_norm=trainable", "e3va": "e3va"}


@pytest.fixture(scope="module")
def data():
    return paths("swin_nano", SIZE)


def of_trace(found):
    """Links, parameters, activations and bytes."""
    reached = found.backbone_parameters_reached, found.backbone_activations_reached
    return found.longest_path, *reached, found.bytes_on_path


def of_figure(data, state):
    return tuple(data["states"][state][key] for key in ("links", "parameters", "activations", "bytes"))


@pytest.mark.parametrize(
    "method,switches",
    [("full", "000"), ("adapter", "100"), ("e3va", "110"), ("e3va", "100")],
)
def test_it_says_what_a_trace_of_the_method_says(data, method, switches):
    backbone, images = on_meta(TUNED[method], "swin_nano", SIZE)
    assert of_trace(trace(backbone, images)) == of_figure(data, f"{method}:{switches}")


@pytest.mark.parametrize("method,switches", [("full", "100"), ("adapter", "000"), ("e3va", "010")])
def test_freezing_is_what_it_does_to_a_model(data, method, switches):
    """A model of the package that somebody freezes or unfreezes; its highway has ``no_grad`` built in."""
    backbone, images = on_meta(TUNED[method], "swin_nano", SIZE)
    backbone.backbone.requires_grad_(switches[0] == "0")
    assert of_trace(trace(backbone, images)) == of_figure(data, f"{method}:{switches}")


@pytest.mark.parametrize("how,switches", [("detach", "101"), ("no_grad", "110")])
def test_cutting_is_what_it_does_to_a_model(data, how, switches):
    """Adapters of the package, with halves of blocks and reductions that somebody cuts off."""
    backbone, images = on_meta(TUNED["adapter"], "swin_nano", SIZE)

    def cut(function, *arguments):
        if how == "detach":
            return function(*arguments).detach()
        with torch.no_grad():
            return function(*arguments)

    def block_cut(block, x, a1, a2):
        x = x + a1(cut(f_p1, block, x))
        return x + a2(cut(f_p2, block, x))

    backbone.run_block = block_cut
    for stage in backbone.backbone.layers[1:]:
        stage.downsample.forward = lambda x, inner=stage.downsample.forward: cut(inner, x)
    *found, bytes_ = of_trace(trace(backbone, images))
    *expected, kept = of_figure(data, f"adapter:{switches}")
    assert found == expected
    # A trace counts what was kept for a moment, too, by the graph that is thrown away.
    assert bytes_ > kept if how == "detach" else bytes_ == kept


def test_links_and_bytes_add_up(data):
    """Along the longest path, and over all paths; and no part's paths keep more than all paths."""
    everything = data["parts"].index("")
    for found in data["states"].values():
        table = {int(target): rows for target, rows in data["tables"][found["table"]].items()}
        assert sum(links for _, links, _ in table[everything]) == found["links"]
        assert sum(size for *_, size in table[everything]) == found["bytes"]
        for target, rows in table.items():
            assert target == everything or target in {part for part, *_ in rows}
            assert sum(links for _, links, _ in rows) <= found["links"]
            assert sum(size for *_, size in rows) <= found["bytes"]


def test_a_pick_of_an_adapter(data):
    """On the highway the path to an adapter meets no half of a block; inside the backbone all that are above it."""

    def halves(state):
        found, names = data["states"][state], data["parts"]
        rows = data["tables"][found["table"]][names.index("a2b1.1")]
        return {names[part] for part, *_ in rows if names[part][0] == "s"}

    assert halves("e3va:110") == set()
    above = {f"s{stage}b{block}.{half}" for stage in (2, 3, 4) for block in (1, 2) for half in (1, 2)}
    assert halves("adapter:100") == above - {"s2b1.1"}


@pytest.mark.parametrize("method", METHODS)
def test_exact_means_the_same_gradients(data, method):
    """With numbers: in every state, whether all that is trained gets the gradient that it gets without a cut."""
    options = {} if method == "full" else {"fpn_norm": "trainable"}
    tuned = build_backbone(method, "swin_nano", **options)
    for name, p in tuned.named_parameters():
        if not name.startswith("backbone."):
            torch.nn.init.normal_(p, std=0.1)  # new adapters are the identity
    images = torch.randn(1, 3, *SIZE)
    gradients = {}
    for positions in product((False, True), repeat=3):
        model = Switched(tuned, *positions)
        trained = [p for p in model.parameters() if p.requires_grad]
        found = torch.autograd.grad(random_functional(model(images)), trained, allow_unused=True)
        gradients["".join(str(int(on)) for on in positions)] = [torch.zeros(()) if g is None else g for g in found]
    for switches, found in gradients.items():
        whole = gradients[f"{switches[0]}00"]
        same = all(a.shape == b.shape and torch.allclose(a, b, atol=1e-6) for a, b in zip(found, whole, strict=True))
        assert same == data["states"][f"{method}:{switches}"]["exact"], switches


def test_switches_that_change_nothing_share_a_table(data):
    tables = [found["table"] for found in data["states"].values()]
    assert len(set(tables)) == len(data["tables"]) < 12
    assert len(json.dumps(data)) < 150_000


def test_only_what_is_reached_is_a_target():
    with torch.device("meta"):
        model = Switched(build_backbone("full", "swin_nano"), freeze=True)
        found = state(model, torch.empty(1, 3, *SIZE))
    assert set(found["targets"]) == {"", "n1", "n2", "n3", "n4", "loss"}
    assert found["trained"] == {f"n{stage}": 2 for stage in range(1, 5)}
