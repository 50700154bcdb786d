"""Graphs for deployment compute what the model computes, at sizes that they were not recorded with."""

import json
from dataclasses import asdict

import pytest
import torch
from click.testing import CliRunner
from torch import nn
from torchvision.models.detection.retinanet import RetinaNet

from e3va_lite import InputError, cli
from e3va_lite.backbones.weights import fingerprint
from e3va_lite.recipes.schema import load_recipe
from e3va_lite.training import checkpoint, deploy, graphs
from e3va_lite.training.engine import build_model
from e3va_lite.training.trained_model import open_run

SMALL = {
    "voc": ("voc-nano", {"fpn_channels": 16, "min_size": 128, "max_size": 160, "stages": [1, 2]}),
    "coco": ("coco-nano", {"fpn_channels": 16, "head_channels": 32}),
    "ade20k": ("ade20k-nano", {"head_channels": 16, "scale": [160, 128], "stages": [1, 2]}),
}


def a_run(folder, task="voc", method="e3va", **changes):
    """The folder of a run with random trained parameters, as if it had been trained; a detector finds many objects."""
    if task == "ade20k":
        pytest.importorskip("cv2", exc_type=ImportError)
    name, small = SMALL[task]
    recipe = load_recipe(name, {**small, "method": method, **changes})
    model = build_model(recipe, 6)
    about = {"classes": list("abcdef"), "category_ids": None, "weights": fingerprint(model.backbone.body.backbone)}
    with torch.no_grad():
        for parameter_name, p in model.named_parameters():
            if p.requires_grad and parameter_name.startswith("backbone.body."):
                p += 0.02 * torch.randn_like(p)
        if task == "voc":
            nn.init.normal_(model.head.classification_head.cls_logits.weight, std=0.1)
    folder.mkdir()
    (folder / "recipe.yaml").write_text(json.dumps(asdict(recipe)))
    checkpoint.write(folder / "last.safetensors", checkpoint.kept_state(model), {"about": about, "step": 7})
    return folder


@pytest.fixture
def run(tmp_path):
    return a_run(tmp_path / "run")


def assert_same(report):
    assert all(relative < 2e-5 for _, relative in report["differences"].values())


# The two formats; deploy itself compares, at two sizes that the graph was not recorded with -----------------------


def test_onnx_maps_of_any_batch_and_size(run, tmp_path):
    onnx, runtime = pytest.importorskip("onnx"), pytest.importorskip("onnxruntime")
    report = deploy.deploy(run, tmp_path / "x.onnx", "onnx", backbone_only=True)
    assert_same(report)
    assert report["differences"].keys() == {"stride4", "stride8"} and "objects" not in report
    session = runtime.InferenceSession(tmp_path / "x.onnx", providers=["CPUExecutionProvider"])
    body = open_run(run).model.eval().backbone.body
    for shape in ((3, 3, 33, 70), (1, 3, 112, 224)):
        images = torch.randn(shape)
        with torch.no_grad():
            for found, wanted in zip(session.run(None, {"images": images.numpy()}), body(images), strict=True):
                torch.testing.assert_close(torch.from_numpy(found), wanted, atol=1e-4, rtol=1e-4)
    (about,) = (json.loads(x.value) for x in onnx.load(tmp_path / "x.onnx").metadata_props if x.key == "e3va_lite")
    assert about["input"]["mean"] == pytest.approx([0.485, 0.456, 0.406], abs=1e-3)
    assert about["classes"] == list("abcdef") and about["made_from"]["step"] == 7


@pytest.mark.parametrize(("task", "method"), [("voc", "lora"), ("ade20k", "full")])
def test_onnx_of_whole_models(tmp_path, task, method):
    pytest.importorskip("onnxruntime")
    run = a_run(tmp_path / "run", task, method)
    report = deploy.deploy(run, tmp_path / "x.onnx", "onnx")
    assert_same(report)
    assert report["differences"].keys() == ({"boxes", "scores"} if task == "voc" else {"logits"})
    assert task == "ade20k" or report["objects"] > 50


def test_torch_export_maps_of_any_batch(run, tmp_path):
    assert_same(deploy.deploy(run, tmp_path / "x.pt2", "torch-export", backbone_only=True, size=(64, 96)))
    about = {"e3va_lite.json": ""}
    module = torch.export.load(tmp_path / "x.pt2", extra_files=about).module()
    images = torch.randn(3, 3, 64, 96)
    with torch.no_grad():
        for found, wanted in zip(module(images), open_run(run).model.eval().backbone.body(images), strict=True):
            torch.testing.assert_close(found, wanted, atol=1e-4, rtol=1e-4)
    assert json.loads(about["e3va_lite.json"])["input"]["size"] == [64, 96]


@pytest.mark.slow
@pytest.mark.parametrize("task", ["voc", "ade20k"])
def test_torch_export_of_whole_models_in_8_bits(tmp_path, task):
    run = a_run(tmp_path / "run", task, stages=[1, 2, 3, 4])
    report = deploy.deploy(run, tmp_path / "x.pt2", "torch-export", int8=True, size=(128, 160))
    assert_same(report)
    assert report["bytes"] < 0.5 * report["bytes_float32"] and all(0.001 < e < 0.02 for e in report["map_errors"])


# 8 bits ---------------------------------------------------------------------------------------------------------------


def test_8_bits_on_the_command_line(run):
    pytest.importorskip("onnxruntime")
    words = ["export", str(run), "--format", "onnx", "--backbone-only", "--json"]
    small, large = (
        json.loads(CliRunner().invoke(cli.cli, [*words, *more], catch_exceptions=False).stdout)
        for more in (["--int8"], ["--out", str(run / "float.onnx")])
    )
    assert_same(small)
    assert small["bytes"] == (run / "export.onnx").stat().st_size < 0.6 * large["bytes"]
    assert small["bytes_float32"] == pytest.approx(large["bytes"], rel=0.05)
    assert all(0.001 < error < 0.02 for error in small["map_errors"])


def test_only_frozen_linear_layers_become_8_bits(run):
    model = open_run(run).model
    graph, rounded = graphs.merged(model), graphs.merged(model)
    names = graphs.frozen_linears(graph, "e3va")
    graphs.to_int8(names, graph, rounded)
    changed = {name for name, p in rounded.named_parameters() if not torch.equal(p, model.get_parameter(name))}
    assert changed == {f"{name}.weight" for name in names} and all("adapters" not in name for name in names)
    for name in names:
        layer, weight = graph.get_submodule(name), model.get_submodule(name).weight
        assert ((layer.weight - weight).abs() <= 0.501 * layer.scale).all() and layer.codes.dtype == torch.int8
        assert (layer.codes.abs().amax(1) == 127).all()  # a scale per output channel


# What is exchanged in a graph -------------------------------------------------------------------------------------


@pytest.mark.parametrize("cells", [1, 2, 3, 6])
@pytest.mark.parametrize("size", [(2, 5), (7, 6), (13, 24)])
def test_average_pool(cells, size):
    x, pool = torch.randn(2, 3, *size), graphs.AveragePool(cells)
    torch.testing.assert_close(pool(x), nn.AdaptiveAvgPool2d(cells)(x))


def test_boxes_are_chosen_as_torchvision_does(run):
    model = open_run(run).model.eval()
    model.topk_candidates, model.detections_per_img = 40, 30
    outputs = {"cls_logits": [], "bbox_regression": []}
    anchors = []
    for count in (200, 12):
        outputs["cls_logits"] += [4 * torch.randn(1, count, 6) - 3]
        outputs["bbox_regression"] += [0.3 * torch.randn(1, count, 4)]
        corner = 80 * torch.rand(count, 2)
        anchors += [torch.cat([corner, corner + 10 + 40 * torch.rand(count, 2)], 1)]
    (wanted,) = RetinaNet.postprocess_detections(model, outputs, [anchors], [(90, 100)])
    (found,) = graphs.choose_boxes(model, outputs, [anchors], [(90, 100)])
    assert len(wanted["scores"]) == 30 and wanted["scores"][-1] > model.score_thresh
    for key in wanted:
        torch.testing.assert_close(found[key], wanted[key])
    model.detections_per_img = 1000  # now the threshold decides
    (wanted,) = RetinaNet.postprocess_detections(model, outputs, [anchors], [(90, 100)])
    (found,) = graphs.choose_boxes(model, outputs, [anchors], [(90, 100)])
    assert torch.equal(found["labels"], wanted["labels"])


# What is refused ------------------------------------------------------------------------------------------------------


def test_a_file_that_computes_something_else_is_not_kept(run, tmp_path, monkeypatch):
    def write(graph, names, path, *_):
        path.write_bytes(b"x")
        monkeypatch.setitem(deploy.READERS, "onnx", lambda *_: lambda images: [x + 0.05 for x in graph(images)])

    monkeypatch.setitem(deploy.WRITERS, "onnx", write)
    with pytest.raises(InputError, match=r"its stride4 differ from the model's by .* where 0.001 is the limit"):
        deploy.deploy(run, tmp_path / "x.onnx", "onnx", backbone_only=True)
    assert [path.name for path in tmp_path.iterdir()] == ["run"]

    def fail(*_):
        raise RuntimeError("no such operator\nand a page of stack")

    monkeypatch.setitem(deploy.WRITERS, "onnx", fail)
    with pytest.raises(InputError, match=r"e3va on swin_nano cannot be recorded .* \(no such operator\)"):
        deploy.deploy(run, tmp_path / "x.onnx", "onnx")
    assert [path.name for path in tmp_path.iterdir()] == ["run"]


def test_objects_are_compared_in_any_order():
    one = {"boxes": 100 * torch.rand(60, 4), "scores": torch.rand(60), "labels": torch.arange(60) % 3}
    order = torch.randperm(60)
    other = {key: x[order] for key, x in one.items()}
    for a, b in zip(*(x.values() for x in deploy.paired(other, one, "x")), strict=True):
        assert torch.equal(a, b)
    lost = {key: x[:59] for key, x in one.items()}
    assert len(deploy.paired(lost, one, "x")[0]["scores"]) == 59  # at a threshold
    for other in ({key: x[:50] for key, x in one.items()}, {**one, "labels": one["labels"] + 1}):
        for pair in ((other, one), (one, other)):
            with pytest.raises(InputError, match="was not written: in a scene"):
                deploy.paired(*pair, "x")
    none = {key: x[:0] for key, x in one.items()}
    assert len(deploy.paired(none, none, "x")[0]["scores"]) == 0
    with pytest.raises(InputError):
        deploy.paired(none, one, "x")


@pytest.mark.parametrize(
    ("task", "name", "format", "options", "said"),
    [
        ("voc", "x.onnx", "onx", {}, "unknown format 'onx': did you mean onnx"),
        ("voc", "x.pt2", "onnx", {}, "must end in .onnx"),
        ("voc", "x.pt2", "torch-export", {}, "needs --size HEIGHTxWIDTH"),
        ("coco", "x.onnx", "onnx", {}, "Cascade Mask R-CNN cannot be recorded.*take --backbone-only"),
        ("vit", "x.onnx", "onnx", {}, "position embedding .* take --format torch-export"),
        ("full", "x.onnx", "onnx", {"int8": True}, "full trains those of the backbone: leave it out"),
    ],
)
def test_what_cannot_be_written(tmp_path, task, name, format, options, said):
    pytest.importorskip("onnxruntime")
    changes = {"vit": {"backbone": "vit_tiny_patch16_224", "pretrained": False}, "full": {"method": "full"}}.get(
        task, {}
    )
    run = a_run(tmp_path / "run", "voc" if changes else task, **changes)
    with pytest.raises(InputError, match=said):
        deploy.deploy(run, tmp_path / name, format, **options)
    assert not (tmp_path / name).exists()


def test_a_missing_package_and_an_existing_file(run, monkeypatch):
    def export(*words):
        return str(CliRunner().invoke(cli.cli, ["export", str(run), *words]).exception)

    (run / "export.pt2").write_bytes(b"mine")
    assert "exists: choose another place." in export("--format", "torch-export", "--size", "64x64")
    assert (run / "export.pt2").read_bytes() == b"mine"
    assert "--int8 and --size are for graphs" in export("--int8")
    monkeypatch.setattr(deploy, "find_spec", lambda name: None)
    assert export("--format", "onnx") == "--format onnx needs onnx and onnxruntime: pip install onnx onnxruntime"
