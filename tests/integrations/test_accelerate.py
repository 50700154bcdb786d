"""accelerate: prepared, trained with accumulated gradients, unwrapped and saved."""

import pytest
import timm
import torch
from torch import nn

import e3va_lite

accelerate = pytest.importorskip("accelerate")


def segmenter():
    torch.manual_seed(0)
    swin = timm.create_model(
        "swin_tiny_patch4_window7_224", features_only=True, out_indices=(1,), strict_img_size=False, embed_dim=16,
        depths=(2, 2), num_heads=(1, 2),
    )  # fmt: skip

    class Segmenter(nn.Module):
        def __init__(self):
            super().__init__()
            self.backbone, self.head = swin, nn.Linear(32, 2)

        def forward(self, images):
            return self.head(self.backbone(images)[0])  # (B, H/8, W/8, classes)

    return Segmenter()


@pytest.mark.parametrize("mixed_precision", ["no", "bf16"])
def test_accelerate(tmp_path, mixed_precision):
    model, data = segmenter(), [(torch.randn(3, 64, 96), torch.randint(2, (8, 12))) for _ in range(8)]

    e3va_lite.tune(model, rank=2)
    accelerate.state.AcceleratorState._reset_state(reset_partial_state=True)  # two accelerators in one process
    accelerator = accelerate.Accelerator(cpu=True, mixed_precision=mixed_precision, gradient_accumulation_steps=2)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    model, optimizer, loader = accelerator.prepare(model, optimizer, torch.utils.data.DataLoader(data, batch_size=2))
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    for images, labels in loader:
        with accelerator.accumulate(model):
            loss = nn.functional.cross_entropy(model(images).flatten(0, 2), labels.flatten())
            accelerator.backward(loss)
            optimizer.step()
            optimizer.zero_grad()
    e3va_lite.Tuning(accelerator.unwrap_model(model)).save_pretrained(tmp_path)

    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert {name for name, p in model.named_parameters() if p.requires_grad} == moved
    again, images = segmenter(), torch.randn(1, 3, 64, 64)
    e3va_lite.from_pretrained(again, tmp_path)
    plain = accelerator.unwrap_model(model, keep_fp32_wrapper=False)
    assert torch.equal(again.eval()(images), plain.eval()(images))
