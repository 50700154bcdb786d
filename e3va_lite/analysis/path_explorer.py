"""The gradient's paths as a figure to be played with: pick a part, and freeze, detach, or turn gradients off.

Three networks (the backbone fully trained, with adapters inside it, with a highway) are written here once more, with
switches, and every position of the switches is traced. The norms before the neck are trained in all of them.
"""

from collections import Counter
from collections.abc import Callable
from itertools import product

import torch
from torch import Tensor, nn

from ..backbones.base import embed, f_p1, f_p2
from ..highway import E3VA
from ..methods.registry import build_backbone
from .gradient_path import changes, longest_links, trace
from .interactive import Interactive
from .isolation import next_nodes, random_functional, tensors_in
from .plots import colour

SWITCHES = {
    "freeze": "requires_grad = False for every pretrained parameter",
    "no_grad": "the pretrained layers run inside torch.no_grad()",
    "detach": "what the pretrained layers compute is detached: y.detach()",
}
LAYOUTS = {"full": "plain", "adapter": "inside", "e3va": "highway"}  # where the adapters are
METHODS = tuple(LAYOUTS)


class Switched(nn.Module):
    """A backbone of one of ``METHODS``, with switches, whose graph's nodes are marked with the part that made them.

    Args:
        tuned: What :func:`e3va_lite.build_backbone` returns; its adapters, norms and reductions are used, and its
            pretrained parameters frozen or not.
        freeze, no_grad, detach: See ``SWITCHES``. The last two concern what is computed on the stream: patch
            embedding, halves of blocks, and reductions; the highway's reductions and the norms are left alone.

    Attributes:
        part: The part of every node, of those that a forward pass made; named as by
            :func:`e3va_lite.analysis.film_strip.part_of`, and ``+s1b1.1`` for the sum behind a part.
    """

    def __init__(self, tuned: nn.Module, freeze: bool = False, no_grad: bool = False, detach: bool = False) -> None:
        super().__init__()
        self.tuned, self.backbone, self.no_grad, self.detach = tuned, tuned.backbone, no_grad, detach
        self.backbone.requires_grad_(not freeze)
        self.highway = isinstance(tuned, E3VA)
        self.part: dict[object, str] = {}

    @property
    def passed_by_design(self) -> list[nn.Module]:
        return self.tuned.passed_by_design if self.highway else []

    def pretrained(self, part: str, function: Callable[..., Tensor], *arguments: object) -> Tensor:
        """What a function of the pretrained backbone gives, as the switches say."""
        with torch.set_grad_enabled(not self.no_grad):
            y = function(*arguments)
        return self.mark(part, y.detach() if self.detach else y)

    def mark(self, part: str, y: Tensor) -> Tensor:
        """Say that all nodes behind a tensor that are not marked yet belong to a part."""
        todo = [y.grad_fn]
        while todo:
            node = todo.pop()
            if node is not None and node not in self.part:
                self.part[node] = part
                todo += next_nodes(node)
        return y

    def forward(self, images: Tensor) -> list[Tensor]:
        """(B, 3, H, W) -> one map (B, C_i, H/s_i, W/s_i) per stage."""
        self.part = {}
        l = e = self.pretrained("embed", embed, self.backbone, images)  # (B, H, W, C)
        extra, maps = iter(getattr(self.tuned, "extra", ())), []
        for number, stage in enumerate(self.backbone.layers, start=1):
            if self.highway:
                e = self.mark(f"r{number}", self.tuned.reduction(number - 1)(e))
            l = self.pretrained(f"lr{number}" if self.highway else f"r{number}", stage.downsample, l)
            for index, block in enumerate(stage.blocks):
                adapters = self.tuned.adapters[number - 1][index] if self.highway else next(extra, ())
                for half, f_p in enumerate((f_p1, f_p2), start=1):
                    place = f"{number}b{index + 1}.{half}"
                    y = self.pretrained(f"s{place}", f_p, block, l)
                    changed = self.mark(f"a{place}", adapters[half - 1](y)) if len(adapters) else y
                    if self.highway:
                        e = self.mark(f"+a{place}", e + changed)  # equation (8)
                        changed = y
                    l = self.mark(f"+s{place}", l + changed)  # equations (5) to (7)
            norm = self.tuned.norms[str(number)]
            maps.append(self.mark(f"n{number}", norm(e if self.highway else l).permute(0, 3, 1, 2).contiguous()))
        return maps


def path_explorer(name: str = "swin_nano", size: tuple[int, int] = (224, 224)) -> Interactive:
    """The gradient's paths in three networks and under three switches, as a figure, from traces on the meta device.

    Args:
        name: A Swin.
        size: Height and width of the one image, pixels.
    """
    found = paths(name, size)
    kept = {method: found["states"][f"{method}:100"]["bytes"] / 2**20 for method in METHODS}
    summary = ", ".join(f"{method} {mib:.1f} MiB" for method, mib in kept.items())
    return Interactive("path_explorer", found, f"Kept for the gradient's paths with a frozen backbone: {summary}.")


def paths(name: str, size: tuple[int, int]) -> dict:
    """The figure as plain data.

    Returns:
        ``states``: by ``METHOD:`` and a 0 or 1 for each of ``SWITCHES`` what :func:`state` says; instead of ``targets``
        their place in ``tables``, where each table stands once, and parts are places in ``parts``. ``exact`` says
        whether the gradient has all paths that it has with only the first of the switches.
    """
    states, tables, parts = {}, [], {}
    for method, positions in product(METHODS, product((False, True), repeat=len(SWITCHES))):
        with torch.device("meta"):
            options = {} if method == "full" else {"fpn_norm": "trainable"}
            model = Switched(build_backbone(method, name, **options), *positions)
            found = state(model, torch.empty(1, 3, *size))
        table = {
            parts.setdefault(target, len(parts)): [[parts.setdefault(p, len(parts)), *row] for p, row in of.items()]
            for target, of in found.pop("targets").items()
        }
        if table not in tables:
            tables.append(table)
        key = "".join(str(int(on)) for on in positions)
        found["table"] = tables.index(table)
        states[f"{method}:{key}"] = found
        found["exact"] = found["table"] == states[f"{method}:{key[0]}00"]["table"]
    blocks = [len(stage.blocks) for stage in model.backbone.layers]
    return {
        "setting": f"{name}, one image of {size[0]} × {size[1]} pixels, float32",
        "blocks": blocks,
        "norms": list(range(1, len(blocks) + 1)),
        "methods": [{"name": method, "colour": colour(method), "layout": LAYOUTS[method]} for method in METHODS],
        "switches": SWITCHES,
        "parts": list(parts),
        "tables": tables,
        "states": states,
    }


def state(model: Switched, images: Tensor) -> dict:
    """What the gradient meets in a network whose switches are set.

    Returns:
        Of :func:`e3va_lite.trace` ``links`` (of the longest path), ``parameters`` and ``activations`` (how many of the
        backbone are reached); ``bytes``, kept at the end of the forward pass, without the loss's; ``trained``, the
        tensors by part that a gradient ends in; ``unreached``, how many others require one. And ``targets``: for every
        part that the gradient reaches, and "" for all of them, the parts on its paths from the loss, with the links of
        the longest path to the part's farthest node and the bytes that are kept on all paths, each storage at the first
        part that keeps it.
    """
    losses = []

    def loss(output: list[Tensor]) -> Tensor:
        losses.append(model.mark("loss", random_functional(output)))
        return losses[-1]

    found = trace(model, images, loss=loss)
    longest = longest_links(losses[0].grad_fn)
    owned = {t.untyped_storage()._cdata for t in (*model.parameters(), *model.buffers(), images)}
    kept = {
        node: {storage: size for storage, size in saved(node, images.device).items() if storage not in owned}
        if part != "loss"
        else {}
        for node, part in model.part.items()
    }
    names = {id(p): name for name, p in model.named_parameters()}
    ends = {node: names[id(node.variable)] for node in model.part if hasattr(node, "variable")}
    trained: dict[str, int] = {}
    for node in ends:
        trained[model.part[node]] = trained.get(model.part[node], 0) + 1
    requires = sum(p.requires_grad for p in model.parameters())
    return {
        "links": found.longest_path,
        "parameters": found.backbone_parameters_reached,
        "activations": found.backbone_activations_reached,
        "bytes": sum({k: size for of in kept.values() for k, size in of.items()}.values()),
        "trained": trained,
        "unreached": requires - len(found.parameters),
        "targets": targets(model.part, longest, kept),
    }


def saved(node: object, device: torch.device) -> dict[int, int]:
    """What a node of the graph keeps for the backward pass on the device: bytes of storages, by their address.

    A Python number that is multiplied with a meta tensor is kept as well, on the CPU; it is not counted.
    """
    kept = [getattr(node, name) for name in dir(node) if name.startswith("_saved_")]
    storages = [t.untyped_storage() for t in tensors_in(kept) if t.device == device]
    return {storage._cdata: storage.nbytes() for storage in storages}


def targets(
    part: dict[object, str], longest: dict[object, int], kept: dict[object, dict[int, int]]
) -> dict[str, dict[str, tuple[int, int]]]:
    """The entry ``targets`` of :func:`state`.

    Args:
        part: Of every node; longest: the most links to every node that is reached; kept: storages of every node.
    """
    above: dict[object, list[object]] = {node: [] for node in longest}
    for node in longest:
        for below in next_nodes(node):
            above[below].append(node)
    ends: dict[str, list[object]] = {"": list(longest)}
    for node in longest:
        ends.setdefault(part[node], []).append(node)
    found = {}
    for target, nodes in ends.items():
        node, on_paths = max(nodes, key=longest.get), set(nodes)
        todo = list(on_paths)
        while todo:
            new = set(above[todo.pop()]) - on_paths
            on_paths |= new
            todo += new
        links, bytes_, seen = Counter(), Counter(), set()
        while longest[node]:
            node = next(n for n in above[node] if longest[n] + changes(n) == longest[node])
            links[part[node]] += changes(node)
        for n in part:  # in the order of the forward pass
            if n in on_paths:
                bytes_[part[n]] += sum(size for storage, size in kept[n].items() if storage not in seen)
                seen |= kept[n].keys()
        found[target] = {place: (links[place], size) for place, size in bytes_.items()}
    return found
