"""Lightning: the tuned model in a LightningModule, with the Trainer's checkpoints and 16-bit autocast."""

import pytest
import timm
import torch
from torch import nn

import e3va_lite

lightning = pytest.importorskip("lightning")


class Classifier(lightning.LightningModule):
    def __init__(self, rank=2):
        super().__init__()
        self.save_hyperparameters()
        shape = {"embed_dim": 24, "depth": 2, "num_heads": 3}  # leave them out, and say pretrained=True, for DINOv2
        self.model = timm.create_model("vit_small_patch14_dinov2", img_size=56, num_classes=2, **shape)
        e3va_lite.tune(self.model, rank=rank)

    def training_step(self, batch, index):
        images, labels = batch
        return nn.functional.cross_entropy(self.model(images), labels)

    def configure_optimizers(self):
        return torch.optim.AdamW([p for p in self.parameters() if p.requires_grad], lr=1e-2)


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed"])
def test_a_lightning_module(tmp_path, precision):
    model = Classifier()
    data = [(torch.randn(3, 56, 56), torch.tensor(i % 2)) for i in range(8)]
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    trainer = lightning.Trainer(
        max_epochs=1, accelerator="cpu", precision=precision, default_root_dir=tmp_path, logger=False,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip
    trainer.fit(model, torch.utils.data.DataLoader(data, batch_size=4))

    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moved
    assert not any(".backbone." in name for name in moved)
    (path,) = tmp_path.rglob("*.ckpt")
    again = Classifier.load_from_checkpoint(path, weights_only=True)
    images = torch.randn(1, 3, 56, 56)
    assert torch.equal(again.model.eval()(images), model.model.eval()(images))
