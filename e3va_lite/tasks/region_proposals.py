"""The first stage of the Cascade Mask R-CNN: boxes that may have an object, out of torchvision's parts.

The network is that of Faster R-CNN (Ren et al. 2015).
"""

import torch
from torch import Tensor
from torch.nn import functional as F
from torchvision.models.detection._utils import Matcher
from torchvision.models.detection.image_list import ImageList
from torchvision.models.detection.rpn import RegionProposalNetwork, RPNHead

from .detection import Anchors, Coder, at_least_float32, init_narrow, mean_count


class ProposalNetwork(RegionProposalNetwork):
    """Torchvision's, with the settings of Swin's configuration in mmdetection and other names of the two losses.

    These are divided by the number of samples in the batch, summed over all processes.

    Args:
        anchors: Of the levels that the proposals come from.
        channels: Width of the levels and of the head.
        proposals: Boxes per image in evaluation, at most; in training twice as many.
    """

    def __init__(self, anchors: Anchors, channels: int, proposals: int):
        most = {"training": 2 * proposals, "testing": proposals}
        super().__init__(
            anchors,
            _ProposalHead(channels, anchors.num_anchors_per_location()[0]),
            fg_iou_thresh=0.7,
            bg_iou_thresh=0.3,
            batch_size_per_image=256,
            positive_fraction=0.5,
            pre_nms_top_n=most,
            post_nms_top_n=most,
            nms_thresh=0.7,
        )
        self.box_coder = Coder(self.box_coder.weights)
        self.proposal_matcher = _Matcher(0.7, 0.3, allow_low_quality_matches=True)

    def forward(
        self, images: ImageList, features: dict[str, Tensor], targets: list[dict] | None = None
    ) -> tuple[list[Tensor], dict[str, Tensor]]:
        boxes, losses = super().forward(images, features, targets)
        names = {"loss_objectness": "rpn_objectness", "loss_rpn_box_reg": "rpn_box"}
        return boxes, {names[name]: loss for name, loss in losses.items()}

    def compute_loss(
        self, objectness: Tensor, pred_bbox_deltas: Tensor, labels: list[Tensor], regression_targets: list[Tensor]
    ) -> tuple[Tensor, Tensor]:
        """Objectness (A, 1) and offsets (A, 4) of all anchors of the batch against labels: 1, 0, or -1 for neither."""
        positive, negative = (torch.cat(chosen).bool() for chosen in self.fg_bg_sampler(labels))
        sampled = positive | negative
        count = mean_count(sampled.sum(), sampled.device)
        numbers = torch.stack([sampled.sum(), positive.sum()]).tolist()  # in one transfer
        sampled, positive = (x.nonzero_static(size=n)[:, 0] for x, n in zip((sampled, positive), numbers, strict=True))
        wanted, offsets = torch.cat(labels), torch.cat(regression_targets)
        object_loss = F.binary_cross_entropy_with_logits(
            objectness[sampled, 0], wanted[sampled].to(objectness.dtype), reduction="sum"
        )
        box_loss = F.smooth_l1_loss(
            pred_bbox_deltas[positive], offsets[positive].to(pred_bbox_deltas.dtype), beta=1 / 9, reduction="sum"
        )
        return object_loss / count, box_loss / count


class _ProposalHead(RPNHead):
    """Torchvision's, with outputs in float32 at least, since boxes are decoded in their precision."""

    def __init__(self, channels: int, anchors: int):
        super().__init__(channels, anchors)
        init_narrow(self.conv[0][0])

    def forward(self, x: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        logits, offsets = super().forward(x)
        return [at_least_float32(y) for y in logits], [at_least_float32(y) for y in offsets]


class _Matcher(Matcher):
    """Torchvision's, but a box keeps its best anchor only from the lower threshold on.

    Otherwise, a box that overlaps no anchor at all would be matched to every anchor.
    """

    def set_low_quality_matches_(self, matches: Tensor, all_matches: Tensor, match_quality_matrix: Tensor) -> None:
        best = match_quality_matrix.max(dim=1, keepdim=True).values
        kept = ((match_quality_matrix == best) & (best >= self.low_threshold)).any(dim=0)
        matches.copy_(torch.where(kept, all_matches, matches))
