"""Pretraining on photographs: their labels, and the tokens of a teacher.

Two questions can be asked of a photograph, each through a head that is thrown away afterwards:

* Which class is it? Asked of the pooled maps of several stages ("Deeply-Supervised Nets", Lee et al. 2015), so that
  the maps of fine stride learn, too. Every source of photographs has labels, and so heads, of its own.
* What does a frozen teacher make of it? The patch tokens of a Vision Transformer are targets for the maps of stages 3
  and 4, place by place, and its class token for the pooled map of stage 4 ("feature distillation").

Augmentation happens for whole batches on the device: a random crop, a flip, and changes of brightness and contrast. It
depends on seed and step alone, so that an interrupted run goes on exactly as it would have.
"""

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Self

import torch
import torch.nn.functional as F
from timm.data import IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD
from torch import Tensor, nn

from ..backbones.base import embed, f_p1, f_p2, freeze, to_nchw
from ..backbones.vit import create_vit, rows_of, vit_names
from ..backbones.weights import fingerprint
from ..datasets.photographs import Photographs, held_out
from ..errors import unknown

LABELLED_STAGES = (2, 3, 4)
DISTILLED_STAGES = (3, 4)
DISTILL_WEIGHT = 5.0  # of each of the teacher's losses, 1 - cosine similarity, beside the labels' cross-entropy
SCALE = (0.25, 1.0)  # share of an image's area that a random crop takes
RATIO = (3 / 4, 4 / 3)
JITTER = 0.3  # brightness and contrast change by up to this share


def normalise(images: Tensor) -> Tensor:
    """Images in 0..1 with ImageNet's statistics, as for every other Swin: what is fed downstream must be fed here."""
    mean, std = (torch.tensor(values, device=images.device) for values in (IMAGENET_DEFAULT_MEAN, IMAGENET_DEFAULT_STD))
    return (images - mean[:, None, None]) / std[:, None, None]


def augment(pixels: Tensor, size: int, generator: torch.Generator) -> Tensor:
    """Random crops, flips, brightness and contrast: uint8 (B, 3, S, S) -> float (B, 3, size, size) in 0..1.

    Args:
        generator: On the CPU, so that the same seed gives the same crops on every device.
    """
    count = len(pixels)
    draws = torch.rand(7, count, generator=generator)
    area = SCALE[0] + (SCALE[1] - SCALE[0]) * draws[0]
    aspect = (torch.tensor(RATIO).log()[0] * (1 - 2 * draws[1])).exp()
    width, height = ((area * aspect).sqrt().clamp(max=1), (area / aspect).sqrt().clamp(max=1))
    x, y = (2 * draws[2] - 1) * (1 - width), (2 * draws[3] - 1) * (1 - height)  # the crop's centre, in -1..1
    flip = torch.where(draws[4] < 0.5, -1.0, 1.0)
    zero = torch.zeros(count)
    affine = torch.stack([flip * width, zero, x, zero, height, y], dim=1).view(count, 2, 3).to(pixels.device)
    grid = F.affine_grid(affine, [count, 3, size, size], align_corners=False)
    images = F.grid_sample(pixels.float() / 255, grid, padding_mode="reflection", align_corners=False)
    brightness, contrast = (1 + JITTER * (2 * draws[5:] - 1)).to(pixels.device)[:, :, None, None, None]
    mean = images.mean(dim=(1, 2, 3), keepdim=True)
    return ((mean + contrast * (images - mean)) * brightness).clamp(0, 1)


def epoch_positions(count: int, batch: int, step: int, seed: int) -> Tensor:
    """Positions of a step's images in ``count`` images: every epoch is a permutation of its own, int64 (batch,)."""
    wanted = torch.arange(step * batch, (step + 1) * batch)
    positions = torch.empty_like(wanted)
    for epoch in wanted.div(count, rounding_mode="floor").unique().tolist():
        generator = torch.Generator().manual_seed(seed * 1_000_003 + epoch)
        here = wanted.div(count, rounding_mode="floor") == epoch
        positions[here] = torch.randperm(count, generator=generator)[wanted[here] - epoch * count]
    return positions


class Teacher(nn.Module):
    """A frozen Vision Transformer of timm whose tokens are targets.

    Args:
        name: timm's name, e.g. ``vit_small_patch14_dinov2``.
        weights: A local file in timm's naming. Default: timm's pretrained weights, from its hub.

    Raises:
        InputError: For an unknown name, a hub that cannot be reached, or weights that do not fit.
    """

    def __init__(self, name: str, weights: str | Path | None = None) -> None:
        super().__init__()
        if name.split(".")[0] not in vit_names():
            raise unknown("teacher", name, vit_names())
        self.name = name
        self.vit = freeze(create_vit(name, pretrained=weights is None, weights=weights))
        self.patch = self.vit.patch_embed.patch_size[0]
        self.width = self.vit.embed_dim

    def train(self, mode: bool = True) -> Self:
        return super().train(False)  # frozen is a mode, too

    @torch.no_grad()
    def forward(self, images: Tensor) -> tuple[Tensor, Tensor]:
        """Normalised images (B, 3, S, S) -> patch tokens (B, D, S/8, S/8) and class token (B, D), both of norm 1.

        The images are enlarged so that there is one token per 8 pixels. Tokens are those of the last block but one: the
        last is shaped by the teacher's own pretext task.
        """
        side = self.patch * (images.shape[-1] // 8)
        x = embed(self.vit, F.interpolate(images, (side, side), mode="bicubic", antialias=True))
        for block in self.vit.layers[0].blocks[:-1]:
            x = x + f_p1(block, x)
            x = x + f_p2(block, x)
        x = F.normalize(F.layer_norm(x.float(), (self.width,)), dim=-1)
        rows = rows_of(self.vit.num_prefix_tokens, x.shape[2])
        return to_nchw(x[:, rows:]), x[:, 0, 0]


class PhotographObjective(nn.Module):
    """Pretraining on photographs; :mod:`~e3va_lite.experiments.pretrain` says what an objective offers.

    Args:
        backbone: Every stage's map with a trained norm, as ``build_backbone("full", ...)`` gives it.
        sources: Photographs, each source with labels of its own.
        size: Pixels per side of a training image.
        teacher: Its tokens are targets, where there is one.
    """

    def __init__(
        self,
        backbone: nn.Module,
        sources: Sequence[Photographs],
        size: int,
        teacher: Teacher | None = None,
    ) -> None:
        super().__init__()
        self.backbone, self.sources, self.size, self.teacher = backbone, sources, size, teacher
        widths = dict(enumerate(backbone.out_channels, start=1))
        self.heads = nn.ModuleList(
            nn.ModuleDict({str(stage): nn.Linear(widths[stage], len(source.classes)) for stage in LABELLED_STAGES})
            for source in sources
        )
        if teacher is not None:
            self.projections = nn.ModuleDict(
                {str(stage): nn.Conv2d(widths[stage], teacher.width, 1) for stage in DISTILLED_STAGES}
            )
            self.class_projection = nn.Linear(widths[4], teacher.width)
        self.splits = [held_out(source) for source in sources]
        self.pixels = [source.pixels for source in sources]

    def to(self, device: torch.device) -> Self:
        """Also moves the photographs, where they take less than half of a GPU's free memory."""
        if torch.device(device).type == "cuda":
            free, _ = torch.cuda.mem_get_info(device)
            if sum(pixels.numel() for pixels in self.pixels) < free / 2:
                self.pixels = [pixels.to(device) for pixels in self.pixels]
        return super().to(device)

    def _shares(self, batch: int) -> list[int]:
        """Images of each source in a batch, in proportion to their numbers, at least one each."""
        counts = torch.tensor([len(train) for train, _ in self.splits], dtype=torch.float64)
        ends = (counts.cumsum(0) / counts.sum() * batch).round().long().tolist()
        shares = [max(1, end - start) for start, end in zip([0, *ends[:-1]], ends, strict=True)]
        shares[shares.index(max(shares))] += batch - sum(shares)
        return shares

    def batches(self, start: int, steps: int, batch: int, seed: int, device: torch.device) -> Iterator[list[Tensor]]:
        shares = self._shares(batch)
        for step in range(start, steps):
            generator = torch.Generator().manual_seed(seed * 1_000_003 + step)
            images, labels = [], []
            for source, pixels, (train, _), share in zip(self.sources, self.pixels, self.splits, shares, strict=True):
                positions = train[epoch_positions(len(train), share, step, seed)]
                chosen = pixels[positions.to(pixels.device)].to(device, non_blocking=True)
                images.append(augment(chosen, self.size, generator))
                labels.append(source.labels[positions].to(device))
            yield [torch.cat(images), *labels]

    def losses(self, images: Tensor, *labels: Tensor) -> dict[str, Tensor]:
        images = normalise(images)
        with torch.autocast(images.device.type, torch.bfloat16, enabled=images.device.type == "cuda"):
            maps = dict(enumerate(self.backbone(images), start=1))
            losses, start = {}, 0
            for source, target, heads in zip(self.sources, labels, self.heads, strict=True):
                own = slice(start, start + len(target))
                start += len(target)
                of_stages = [
                    F.cross_entropy(head(maps[int(stage)][own].mean(dim=(2, 3))), target)
                    for stage, head in heads.items()
                ]
                losses[source.root.name] = sum(of_stages) / len(of_stages) * len(target) / len(images)
            if self.teacher is not None:
                tokens, class_token = self.teacher(images)
                for stage, project in self.projections.items():
                    guess = project(maps[int(stage)])
                    target = F.adaptive_avg_pool2d(tokens, guess.shape[-2:])
                    off = 1 - F.cosine_similarity(guess.float(), target.float(), dim=1).mean()
                    losses[f"tokens {stage}"] = DISTILL_WEIGHT * off
                guess = self.class_projection(maps[4].mean(dim=(2, 3)))
                off = 1 - F.cosine_similarity(guess.float(), class_token.float(), dim=1).mean()
                losses["class token"] = DISTILL_WEIGHT * off
        return losses

    @torch.no_grad()
    def accuracy(self, seed: int, device: torch.device) -> tuple[float, dict[str, object]]:
        """Share of held-out photographs whose class is named rightly, by source; by the last labelled stage's head."""
        self.eval()
        shares = {}
        for source, pixels, (_, kept), heads in zip(self.sources, self.pixels, self.splits, self.heads, strict=True):
            right = 0
            for positions in kept.split(100) if len(kept) else ():
                images = pixels[positions.to(pixels.device)].to(device).float() / 255
                images = F.interpolate(images, (self.size, self.size), mode="bilinear", antialias=True)
                stage, head = list(heads.items())[-1]
                named = head(self.backbone(normalise(images))[int(stage) - 1].mean(dim=(2, 3))).argmax(dim=1)
                right += (named.cpu() == source.labels[positions]).sum().item()
            shares[source.root.name] = round(right / max(1, len(kept)), 4)
        return sum(shares.values()), {"accuracy_held_out": shares}

    def card(self) -> dict[str, object]:
        card: dict[str, object] = {
            "sources": [
                {"folder": source.root.name}
                | source.about()
                | {"classes": len(source.classes), "photographs": len(train), "held_out": len(kept)}
                for source, (train, kept) in zip(self.sources, self.splits, strict=True)
            ],
            "pixels": self.size,
        }
        if self.teacher is not None:
            card["teacher"] = {"name": self.teacher.name, "fingerprint": fingerprint(self.teacher.vit)}
        return card
