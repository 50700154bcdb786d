"""What the hosts have in common: the stages of their backbone, and a search for them in a model.

A *host* is the module of another library that holds a backbone and returns its maps: timm's ``FeatureListNet``,
torchvision's ``SwinTransformer``, transformers' ``SwinBackbone`` and so on. Its patch embedding, blocks and reductions
are used as they are, in the host's own order of operations, so that a new tuned backbone computes what the host
computed. After that the host is still the same object, with the same inputs and outputs: its class becomes a subclass
that answers from the maps of the tuned backbone, its child ``tuned``. What follows the blocks in a host (a final norm,
a head) stays where it was.
"""

from importlib import import_module
from typing import ClassVar

from torch import Tensor, nn

from ...errors import InputError
from ..base import FPNNorms, embed, fpn_norms, stage_dims

SUPPORTED = (
    "timm's Swin, Swin V2, plain ViT (DINOv2 too) and DINOv3, as classifiers or with features_only=True; torchvision's "
    "SwinTransformer, or its features in an IntermediateLayerGetter (BackboneWithFPN has one); transformers' "
    "SwinBackbone, SwinModel and Dinov2Backbone"
)


class Stage(nn.Module):
    """A reduction and the blocks after it, see :mod:`e3va_lite.backbones.base`."""

    def __init__(self, downsample: nn.Module, blocks: list[nn.Module]) -> None:
        super().__init__()
        self.downsample, self.blocks = downsample, nn.ModuleList(blocks)


class Stages(nn.Module):
    """The backbone of a host, as :mod:`e3va_lite.backbones.base` asks for it.

    Args:
        front: Images to tokens, (B, 3, H, W) -> (B, H', W', C).
        layers: The stages.
    """

    def __init__(self, front: nn.Module, layers: list[Stage]) -> None:
        super().__init__()
        self.front, self.layers = front, nn.ModuleList(layers)


class OwnMaps(FPNNorms):
    """No norms: the host has its own, or none. Maps go to the host as they leave the stages, in NCHW."""

    def __init__(self, backbone: Stages, stages: tuple[int, ...]) -> None:
        nn.ModuleDict.__init__(self, {str(stage): nn.Identity() for stage in stages})
        self.stages = stages
        dims = stage_dims(backbone)
        self.out_channels = [dims[stage - 1] for stage in stages]
        self.strides = self.divisor = None  # the host's affair


@embed.register
def _(backbone: Stages, images: Tensor) -> Tensor:
    return backbone.front(images)


@fpn_norms.register
def _(backbone: Stages, stages: tuple[int, ...], trainable: bool) -> FPNNorms:
    return OwnMaps(backbone, stages)


class Host:
    """Mixed into the class of a module that holds a backbone.

    Attributes:
        KEPT: The children that stay in the host.
        REFUSED: Methods that cannot be used on this host's blocks.
    """

    KEPT: ClassVar[tuple[str, ...]] = ()
    REFUSED: ClassVar[tuple[str, ...]] = ()

    def take_apart(self) -> tuple[Stages, tuple[int, ...]]:
        """The stages of the host's backbone, and the numbers (from 1) of those whose maps the host returns.

        It is called before the host's class is changed, and changes nothing that the host computes.

        Raises:
            InputError: For a host in a variant that is not supported.
        """
        raise NotImplementedError

    def install_tuned(self, tuned: nn.Module) -> None:
        """Put the tuned backbone in the place of what was taken apart."""
        for name in [name for name in self._modules if name not in self.KEPT]:
            del self._modules[name]
        self._parameters.clear()
        self._buffers.clear()
        self.add_module("tuned", tuned)

    def maps_nhwc(self, images: Tensor) -> list[Tensor]:
        """The maps of the tuned backbone, (B, H, W, C) each."""
        return [x.permute(0, 2, 3, 1) for x in self.tuned(images)]


def hosts(model: nn.Module) -> dict[type, type[Host]]:
    """The classes that can be hosts in this model, and what each of them becomes."""
    rooms = ["timm", "torchvision"]
    if any(type(module).__module__.startswith("transformers.") for module in model.modules()):
        rooms.append("transformers")
    return {kind: host for room in rooms for kind, host in import_module(f".{room}", __package__).HOSTS.items()}


def find(model: nn.Module, name: str | None = None) -> tuple[str, nn.Module, type[Host]]:
    """The one host in a model: its name, the module, and the class that it becomes.

    Args:
        name: Where to look; everywhere if not given.

    Raises:
        InputError: If there is no such module, or no host or several in it.
    """
    modules = dict(model.named_modules())
    if name is not None and name not in modules:
        children = ", ".join(child for child, _ in model.named_children())
        raise InputError(f"{type(model).__name__} has no module '{name}' (its children are {children}).")
    known = hosts(model)
    inside = {n: m for n, m in modules.items() if name in (None, "") or n == name or n.startswith(f"{name}.")}
    if done := [n or type(m).__name__ for n, m in inside.items() if isinstance(m, Host)]:
        raise InputError(f"the backbone in '{done[0]}' is tuned already: add_adapter puts a further adapter beside it.")
    found = [n for n, m in inside.items() if type(m) in known]
    found = [n for n in found if not any(n != other and (other == "" or n.startswith(f"{other}.")) for other in found)]
    if len(found) > 1:
        raise InputError(f"there are several backbones: pass backbone=, one of {', '.join(map(repr, found))}.")
    if not found:
        raise _nothing(inside)
    return found[0], modules[found[0]], known[type(modules[found[0]])]


def _nothing(inside: dict[str, nn.Module]) -> InputError:
    """No host: say where blocks of a known backbone were seen, if they were."""
    kinds = ("SwinTransformerStage", "SwinTransformerBlock", "SwinTransformerBlockV2", "EvaBlock", "SwinLayer")
    seen = [name for name, module in inside.items() if type(module).__name__ in kinds]
    if not seen:
        return InputError(f"no backbone that can be tuned was found; supported are {SUPPORTED}.")
    above = [m for n, m in inside.items() if seen[0].startswith(n) and n not in seen]
    kind = next(
        (type(m).__name__ for m in reversed(above) if not type(m).__module__.startswith("torch.nn")), "the model"
    )
    return InputError(
        f"blocks of a backbone were found in '{seen[0]}', but what {kind} makes of them is not known; supported are "
        f"{SUPPORTED}."
    )
