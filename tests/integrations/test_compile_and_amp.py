"""torch.compile, torch.export, tracing, ONNX, torch.func and automatic mixed precision, with nothing to be switched."""

import io
import warnings

import pytest
import timm
import torch

import e3va_lite

MODES = [("e3va", {"memory": mode}) for mode in ("store", "compress", "recompute")] + [("fixed", {})]


def small(method="e3va", **options):
    """A stage of two blocks, the second of which shifts its windows, in the default mode of the method."""
    model = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, out_indices=(0,), strict_img_size=False, embed_dim=16,
        depths=(2,), num_heads=(2,),
    )  # fmt: skip
    if method == "e3va":
        options = {"rank": 2, **options}
    tuning = e3va_lite.tune(model, method, **options)
    with torch.no_grad():
        for name in tuning.bank.names:
            tuning.tuned.get_parameter(name).add_(0.1)
    return model.eval()


def assert_same(found, expected):
    for a, b in zip(found, expected, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(("method", "options"), MODES)
def test_compile_has_no_graph_breaks_without_gradients(method, options):
    model, images = small(method, **options), torch.randn(1, 3, 40, 44)
    torch._dynamo.reset()
    with torch.no_grad():
        compiled = torch.compile(model, backend="eager", fullgraph=True)  # fullgraph: a break would be an error
        assert_same(compiled(images), model(images))


@pytest.mark.slow
def test_a_compiled_model_can_be_trained():
    model, images = small(), torch.randn(1, 3, 40, 44)
    torch._dynamo.reset()
    gradients = []
    for run in (model.train(), torch.compile(model, backend="eager")):
        model.zero_grad()
        sum(m.square().sum() for m in run(images)).backward()
        gradients.append([p.grad.clone() for p in model.parameters() if p.requires_grad])
    assert_same(*gradients)


@pytest.mark.parametrize(("method", "grad"), [("e3va", True), ("e3va", False), ("fixed", False)])
def test_export_with_a_dynamic_batch(method, grad):
    model = small(method)
    with torch.set_grad_enabled(grad):
        exported = torch.export.export(
            model, (torch.randn(2, 3, 40, 44),), dynamic_shapes=({0: torch.export.Dim("batch")},)
        )
    images = torch.randn(5, 3, 40, 44)
    assert_same(exported.module()(images), model(images))


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize(("method", "options"), MODES)
def test_trace(method, options):
    model, images = small(method, **options), torch.randn(2, 3, 40, 44)
    with torch.no_grad():
        traced = torch.jit.trace(model, images, check_trace=False)
        assert_same(traced(images), model(images))


@pytest.mark.parametrize(("method", "options"), MODES[1:])
def test_the_older_onnx_exporter(method, options):
    pytest.importorskip("onnx")
    runtime = pytest.importorskip("onnxruntime")
    model, file = small(method, **options), io.BytesIO()
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            model, (torch.randn(2, 3, 40, 44),), file, dynamo=False, input_names=["images"],
            dynamic_axes={"images": {0: "batch"}},
        )  # fmt: skip
    images = torch.randn(5, 3, 40, 44)
    session = runtime.InferenceSession(file.getvalue(), providers=["CPUExecutionProvider"])
    assert_same([torch.from_numpy(x) for x in session.run(None, {"images": images.numpy()})], model(images))


def test_torch_func():
    model, images = small(), torch.randn(3, 3, 40, 44)
    with torch.no_grad():
        each = torch.func.vmap(lambda image: model(image[None])[0][0])(images)
        assert_same([each], model(images))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_automatic_mixed_precision(dtype):
    model, images = small(), torch.randn(2, 3, 40, 44)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-3)
    scaler = torch.amp.GradScaler("cpu")
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for _ in range(2):
        with torch.autocast("cpu", dtype):
            loss = sum(m.float().square().mean() for m in model.train()(images))
        optimizer.zero_grad()
        scaler.scale(loss).backward()
        scaler.step(optimizer)
        scaler.update()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == {name for name, p in model.named_parameters() if p.requires_grad}
    assert {p.dtype for p in model.parameters()} == {torch.float32}
