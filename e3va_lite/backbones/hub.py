"""timm's models by name, with or without weights from its hub."""

import timm
from torch import nn

from ..errors import InputError, unknown

# timm's plain names mean weights that were fine-tuned on ImageNet-1K; the paper starts from ImageNet-22K.
PAPER_TAG = ".ms_in22k"


def from_timm(name: str, pretrained: bool, options: dict) -> nn.Module:
    """timm's model of that name.

    Raises:
        InputError: For an unknown pretraining tag, or a hub that cannot be reached.
    """
    if "." not in name and name + PAPER_TAG in timm.list_pretrained(name + ".*"):
        name += PAPER_TAG
    try:
        return timm.create_model(name, pretrained=pretrained, **options)
    except RuntimeError as error:
        if not str(error).startswith("Invalid pretrained tag"):
            raise
        tags = [known.split(".")[1] for known in timm.list_pretrained(name.split(".")[0] + ".*")]
        raise unknown("pretraining tag", name.split(".", 1)[1], tags) from error
    except OSError as error:  # huggingface_hub's and urllib's errors are all of this family
        raise InputError(
            f"the weights of '{name}' could not be fetched from timm's hub ({type(error).__name__}): check the "
            "network, or download them elsewhere and name the file as the weights of the recipe."
        ) from error
