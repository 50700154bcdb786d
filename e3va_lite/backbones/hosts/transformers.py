"""Models of Hugging Face's transformers as hosts; imported where a model of that library is tuned, and not before."""

from itertools import pairwise
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers.modeling_outputs import BackboneOutput
from transformers.models.dinov2.modeling_dinov2 import Dinov2Backbone, Dinov2Layer
from transformers.models.swin.modeling_swin import (
    SwinBackbone,
    SwinLayer,
    SwinModel,
    SwinModelOutput,
    window_partition,
    window_reverse,
)
from transformers.utils.generic import can_return_tuple

from ...errors import InputError
from ..base import f_p1, f_p2
from ..vit import rows_of, to_map, to_tokens
from .base import Host, Stage, Stages


@f_p1.register
def _(block: SwinLayer, x: Tensor) -> Tensor:
    """The first half of :meth:`SwinLayer.forward`, without its changes to the layer's own window and shift."""
    _, height, width, _ = x.shape
    size, shift = block.window_size, block.shift_size
    if not block.always_partition and min(height, width) <= size:
        shift = 0
    x = F.pad(block.layernorm_before(x), (0, 0, 0, -width % size, 0, -height % size))  # (B, H', W', C)
    if shift:
        x = torch.roll(x, (-shift, -shift), dims=(1, 2))
    mask = block.get_attn_mask(*x.shape[1:3], dtype=x.dtype, device=x.device) if shift else None
    windows = block.attention(window_partition(x, size).flatten(1, 2), mask)[0]  # (B * windows, tokens, C)
    x = window_reverse(block.dropout(windows).unflatten(1, (size, size)), size, *x.shape[1:3])
    if shift:
        x = torch.roll(x, (shift, shift), dims=(1, 2))
    return block.drop_path(x[:, :height, :width])


@f_p2.register
def _(block: SwinLayer, x: Tensor) -> Tensor:
    return block.dropout(block.mlp(block.layernorm_after(x)))


@f_p1.register
def _(block: Dinov2Layer, x: Tensor) -> Tensor:
    attended = block.attention(block.norm1(to_tokens(x, 1)))[0]
    return to_map(block.drop_path(block.layer_scale1(attended)), 1, x.shape[2])


@f_p2.register
def _(block: Dinov2Layer, x: Tensor) -> Tensor:
    return block.drop_path(block.layer_scale2(block.mlp(block.norm2(x))))


class Front(nn.Module):
    """The embeddings of a Swin or a DINOv2; the class token is in rows above the map, see :mod:`..vit`."""

    def __init__(self, embeddings: nn.Module, prefix: int) -> None:
        super().__init__()
        self.embeddings, self.prefix = embeddings, prefix

    def forward(self, images: Tensor) -> Tensor:
        patch = self.embeddings.patch_embeddings.patch_size[1]
        if self.prefix:
            return to_map(self.embeddings(images), self.prefix, images.shape[3] // patch)
        tokens, size = self.embeddings(images)
        return tokens.unflatten(1, size)


class Merging(nn.Module):
    """A patch merging on a map, (B, H, W, C) -> (B, H/2, W/2, 2 C)."""

    def __init__(self, merging: nn.Module) -> None:
        super().__init__()
        self.merging = merging

    def forward(self, x: Tensor) -> Tensor:
        _, height, width, _ = x.shape
        return self.merging(x.flatten(1, 2), (height, width)).unflatten(1, (-(-height // 2), -(-width // 2)))


def swin_stages(swin: SwinModel, always_partition: bool) -> Stages:
    """The stages of a Swin.

    Args:
        always_partition: Shift windows even where a map is no larger than one.
    """
    for block in (block for layer in swin.encoder.layers for block in layer.blocks):
        block.dim, block.always_partition = block.layernorm_before.normalized_shape[0], always_partition
    mergings = [nn.Identity(), *(Merging(layer.downsample) for layer in swin.encoder.layers[:-1])]
    layers = [Stage(m, list(layer.blocks)) for m, layer in zip(mergings, swin.encoder.layers, strict=True)]
    return Stages(Front(swin.embeddings, prefix=0), layers)


def returns_maps_only(asked: dict[str, object], *but: str) -> None:
    """Raise for what a tuned backbone cannot return."""
    for name, value in asked.items():
        if value is not None and value is not False and name not in ("return_dict", *but):
            raise InputError(f"a backbone that is tuned returns its maps only: call it without {name}.")


def numbers_of(backbone: nn.Module) -> tuple[int, ...]:
    """The numbers of the stages that a backbone of transformers returns, from 1."""
    numbers = tuple(backbone.stage_names.index(name) for name in backbone.stage_names if name in backbone.out_features)
    if 0 in numbers:
        raise InputError(f"the stem of {type(backbone).__name__} is no stage: leave 'stem' out of out_features.")
    return numbers


class TunedSwinBackbone(Host, SwinBackbone):
    """The norms behind the stages are its own; ``hidden_states`` are None, even where a model asks for them."""

    KEPT: ClassVar = ("hidden_states_norms",)
    REFUSED: ClassVar = ("lora", "lst")

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        return swin_stages(self.swin, always_partition=True), numbers_of(self)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: object) -> BackboneOutput:
        returns_maps_only(kwargs, "output_hidden_states")  # models ask for them and then use the maps
        names = [name for name in self.stage_names if name in self.out_features]
        maps = [self.hidden_states_norms[n](m) for n, m in zip(names, self.maps_nhwc(pixel_values), strict=True)]
        return BackboneOutput(feature_maps=tuple(m.permute(0, 3, 1, 2).contiguous() for m in maps))


class TunedSwinModel(Host, SwinModel):
    """The last norm and the pooling are its own."""

    KEPT: ClassVar = ("layernorm", "pooler")
    REFUSED: ClassVar = ("lora", "lst")

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        return swin_stages(self, always_partition=False), (len(self.encoder.layers),)

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: object) -> SwinModelOutput:
        returns_maps_only(kwargs)
        tokens = self.layernorm(self.maps_nhwc(pixel_values)[-1].flatten(1, 2))
        pooled = None if self.pooler is None else self.pooler(tokens.transpose(1, 2)).flatten(1)
        return SwinModelOutput(last_hidden_state=tokens, pooler_output=pooled)


class TunedDinov2Backbone(Host, Dinov2Backbone):
    """The last norm is its own; ``hidden_states`` are None, even where a model asks for them."""

    KEPT: ClassVar = ("layernorm",)
    REFUSED: ClassVar = ("lora", "lst")

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        for block in self.encoder.layer:
            block.dim, block.prefix = self.config.hidden_size, 1
        ends = [0, *numbers_of(self)]  # a stage of transformers is one block
        pieces = [list(self.encoder.layer)[a:b] for a, b in pairwise(ends)]
        stages = [Stage(nn.Identity(), blocks) for blocks in pieces]
        return Stages(Front(self.embeddings, prefix=1), stages), tuple(range(1, len(stages) + 1))

    @can_return_tuple
    def forward(self, pixel_values: Tensor, **kwargs: object) -> BackboneOutput:
        returns_maps_only(kwargs, "output_hidden_states")  # models ask for them and then use the maps
        maps = self.maps_nhwc(pixel_values)
        if self.config.apply_layernorm:
            maps = [self.layernorm(m) for m in maps]
        if not self.config.reshape_hidden_states:
            return BackboneOutput(feature_maps=tuple(to_tokens(m, 1) for m in maps))
        maps = [m[:, rows_of(1, m.shape[2]) :] for m in maps]
        return BackboneOutput(feature_maps=tuple(m.permute(0, 3, 1, 2).contiguous() for m in maps))


HOSTS = {SwinBackbone: TunedSwinBackbone, SwinModel: TunedSwinModel, Dinov2Backbone: TunedDinov2Backbone}
