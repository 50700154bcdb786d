"""Hugging Face: the Trainer on UPerNet with a Swin backbone, and other models with one."""

import pytest
import torch
from safetensors.torch import load_file

import e3va_lite
from e3va_lite.analysis.isolation import random_functional

transformers = pytest.importorskip("transformers")
pytest.importorskip("accelerate")  # the Trainer needs it

SWIN = {"embed_dim": 16, "depths": [2, 2, 2, 2], "num_heads": [1, 2, 4, 8], "window_size": 7}


def upernet():
    torch.manual_seed(0)
    stages = ["stage1", "stage2", "stage3", "stage4"]
    backbone = transformers.SwinConfig(**SWIN, out_features=stages)
    config = transformers.UperNetConfig(
        backbone_config=backbone, hidden_size=16, num_labels=3, auxiliary_in_channels=64, auxiliary_channels=8
    )
    return transformers.UperNetForSemanticSegmentation(config)


class Scenes(torch.utils.data.Dataset):
    def __len__(self):
        return 8

    def __getitem__(self, i):
        labels = torch.zeros(64, 96, dtype=torch.int64)
        labels[:, i * 8 :] = i % 3
        return {"pixel_values": torch.randn(3, 64, 96) + labels, "labels": labels}


def test_the_trainer_on_a_segmenter(tmp_path):
    model = upernet()

    tuning = e3va_lite.tune(model, rank=2)
    arguments = transformers.TrainingArguments(
        output_dir=tmp_path / "run", num_train_epochs=1, per_device_train_batch_size=2, learning_rate=1e-2,
        use_cpu=True, report_to=[], save_strategy="epoch", disable_tqdm=True,
    )  # fmt: skip
    trainer = transformers.Trainer(model, arguments, train_dataset=Scenes())
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    result = trainer.train()
    tuning.save_pretrained(tmp_path / "adapters")

    assert result.training_loss > 0
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert any("adapters" in name for name in moved) and not any("tuned.backbone" in name for name in moved)
    again, images = upernet(), torch.randn(1, 3, 64, 96)
    e3va_lite.from_pretrained(again, tmp_path / "adapters")
    assert torch.equal(again.eval()(images).logits, model.eval()(images).logits)

    resumed = upernet()  # the Trainer's own checkpoints hold everything
    e3va_lite.tune(resumed, rank=2)
    (checkpoint,) = (tmp_path / "run").glob("checkpoint-*/model.safetensors")
    resumed.load_state_dict(load_file(checkpoint))
    assert torch.equal(resumed.eval()(images).logits, model.eval()(images).logits)


def test_no_gradient_reaches_the_swin_of_a_segmenter():
    model = upernet().eval()
    images = torch.randn(1, 3, 64, 96)
    with torch.no_grad():
        before = model(images).logits
        tuning = e3va_lite.tune(model, rank=2)
        torch.testing.assert_close(model(images).logits, before, atol=1e-5, rtol=1e-5)
    assert tuning.name == "backbone" and isinstance(model.backbone, transformers.SwinBackbone)
    e3va_lite.assert_isolated(model.backbone, images, loss=lambda output: random_functional(output.feature_maps))


def test_a_classifier_and_what_cannot_be_asked_of_it():
    model = transformers.SwinForImageClassification(transformers.SwinConfig(**SWIN, num_labels=3)).eval()
    images = torch.randn(2, 3, 224, 224)
    with torch.no_grad():
        before = model(images).logits
        tuning = e3va_lite.tune(model, rank=2)
        torch.testing.assert_close(model(images).logits, before, atol=1e-5, rtol=1e-5)
    assert tuning.name == "swin"
    loss = model.train()(images, labels=torch.tensor([0, 2])).loss
    loss.backward()
    assert all(p.grad is None for p in tuning.tuned.backbone.parameters())
    with pytest.raises(e3va_lite.InputError, match="its maps only: call it without output_hidden_states"):
        model(images, output_hidden_states=True)


def test_a_dense_predictor_on_dinov2():
    stages = ["stage1", "stage2", "stage3", "stage4"]
    shape = {"hidden_size": 24, "num_hidden_layers": 4, "num_attention_heads": 3, "image_size": 56, "patch_size": 14}
    backbone = transformers.Dinov2Config(**shape, out_features=stages, reshape_hidden_states=False)
    config = transformers.DPTConfig(
        backbone_config=backbone, neck_hidden_sizes=[8, 8, 16, 16], fusion_hidden_size=8, hidden_size=24
    )
    model = transformers.DPTForDepthEstimation(config).eval()
    images = torch.randn(1, 3, 56, 56)
    with torch.no_grad():
        before = model(images).predicted_depth
        tuning = e3va_lite.tune(model, rank=2)
        torch.testing.assert_close(model(images).predicted_depth, before, atol=1e-5, rtol=1e-5)
    model.train()(images).predicted_depth.sum().backward()
    assert all(p.grad is None for p in tuning.tuned.backbone.parameters())
    assert all(p.grad is not None for p in tuning.tuned.adapters.parameters())
