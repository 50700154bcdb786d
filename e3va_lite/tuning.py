"""One line around somebody else's model: its backbone is tuned, and everything around it stays as it was.

>>> tuning = e3va_lite.tune(model, rank=8)  # finds the backbone, freezes it, puts a highway beside it
>>> tuning.print_trainable_parameters()
>>> ...  # train the model as ever, with your own loop
>>> tuning.save_pretrained("boats")
>>> tuning = e3va_lite.from_pretrained(new_model, "boats")

The model is changed in place, as by PEFT's ``inject_adapter_in_model``: it is the same object of the same class with
the same inputs and outputs, and at first it computes what it computed before. :class:`Tuning` is a handle beside it.
Neck and head are trained as their ``requires_grad`` says.
"""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from torch import Tensor, nn

from .backbones.hosts.base import Host, find
from .backbones.weights import fingerprint
from .errors import InputError
from .files import check_place, replacing
from .methods.registry import attach, check_options
from .training import checkpoint

CONFIG, ADAPTERS, REST = "e3va_config.json", "e3va_adapters.safetensors", "e3va_rest.safetensors"
FIRST = "default"  # the name of the first adapter, as PEFT's


def tune(model: nn.Module, method: str = "e3va", backbone: str | None = None, **options: object) -> "Tuning":
    """Tune the backbone inside a model with one of the fine-tuning methods; the model is changed in place.

    Found are timm's Swin, Swin V2, plain ViT and DINOv3, torchvision's Swin, and transformers' ``SwinBackbone``,
    ``SwinModel`` and ``Dinov2Backbone``, see :data:`e3va_lite.backbones.hosts.base.SUPPORTED`.

    Args:
        model: A model with such a backbone in it, or the backbone itself.
        method: See :func:`e3va_lite.build_backbone`.
        backbone: The name of the module to look into, where there are several backbones.
        **options: Options of the method: ``rank``, ``memory`` and so on.

    Returns:
        A handle with ``print_trainable_parameters``, ``save_pretrained``, ``add_adapter``, ``set_adapter`` and
        ``disable``. It is not the model: go on with ``model``.

    Raises:
        InputError: If there is no supported backbone or several, or the method does not allow an option. The model is
            then as it was.
    """
    check_options(method, options)
    name, host, kind = find(model, backbone)
    stages, numbers = kind.take_apart(host)
    return _install(model, name, kind, stages, numbers, method, options)


def from_pretrained(model: nn.Module, folder: str | Path, backbone: str | None = None, rest: bool = True) -> "Tuning":
    """Tune a model as :meth:`Tuning.save_pretrained` found it, and load what was saved.

    Args:
        model: A model with the same pretrained backbone, not yet tuned. Changed in place.
        folder: The folder.
        backbone: As in :func:`tune`.
        rest: Load what was trained outside the backbone, too; False where the new model has another head.

    Raises:
        InputError: For a folder that holds no adapters, or those of another backbone, other pretrained weights or, with
            ``rest``, another model. The model is then as it was.
    """
    folder = Path(folder)
    config = _read_config(folder)
    check_options(config["method"], config["options"])
    name, host, kind = find(model, backbone)
    stages, numbers = kind.take_apart(host)
    _check_backbone(folder, config, kind, numbers, fingerprint(stages))
    tensors, _ = checkpoint.read(folder / ADAPTERS)
    others = _rest_of(folder, model) if rest else {}
    tuning = _install(model, name, kind, stages, numbers, config["method"], config["options"])
    for key, value in _fitting(folder, tensors, live := tuning._values()).items():
        live[key].copy_(value)
    model.load_state_dict(others, strict=False)
    return tuning


class Tuning:
    """What :func:`tune` did to a model: a report, its adapters by name, and their files.

    The handle has no state of its own: ``Tuning(copy_of_the_model)`` is that of a copy, an EMA's for example.

    Args:
        model: A model that :func:`tune` or :func:`from_pretrained` changed.
        name: The name of the tuned module in it, where there are several.

    Raises:
        InputError: If nothing in the model is tuned, or several backbones are and none is named.
    """

    def __init__(self, model: nn.Module, name: str | None = None) -> None:
        tuned = {n: m for n, m in model.named_modules() if isinstance(m, Host) and name in (None, n)}
        if len(tuned) != 1:
            raise InputError(
                f"{len(tuned)} tuned backbones are in {type(model).__name__}"
                + (f": name one of {', '.join(map(repr, tuned))}." if tuned else ": call e3va_lite.tune(model) first.")
            )
        self.model = model
        ((self.name, self.host),) = tuned.items()
        self.tuned, self.bank = self.host.tuned, self.host.adapter_bank

    def __repr__(self) -> str:
        own = list(self.tuned.parameters())
        rest = [p for p in self.model.parameters() if not any(p is q for q in [*own, *self.bank.parameters()])]
        (trained, of), (other, of_others) = (
            (sum(p.numel() for p in some if p.requires_grad), sum(p.numel() for p in some)) for some in (own, rest)
        )
        method = self.tuned.built_with["method"]
        place = f"{_class_of(type(self.host))}" + (f" '{self.name}'" if self.name else "")
        return (
            f"{method} on {place}: {trained:,} of {of:,} parameters are trained ({100 * trained / of:.2f} %), and "
            f"{other:,} of the {of_others:,} around it"
        )

    def print_trainable_parameters(self) -> None:
        """Print how many parameters of the tuned backbone, and of the rest of the model, are trained."""
        print(self)

    @property
    def adapters(self) -> list[str]:
        """The names of all adapters; the one in use first."""
        return [self.bank.active, *self.bank.kept]

    def add_adapter(self, name: str) -> None:
        """Put a new adapter beside the others; it computes what the frozen backbone computes. Switch to it afterwards.

        Raises:
            InputError: If the name is taken, or is empty or has a dot in it.
        """
        if name in self.adapters or not name or "." in name:
            raise InputError(f"an adapter cannot be called '{name}': names are unique and without dots.")
        self.bank.kept[name] = self.bank.new(self.tuned)

    def set_adapter(self, name: str) -> None:
        """Switch to another adapter: its parameters take the place of those in use.

        They are others: an optimizer has to know them, too, and DistributedDataParallel has to wrap the model again.

        Raises:
            InputError: For an unknown name.
        """
        if name == self.bank.active:
            return
        if name not in self.bank.kept:
            raise InputError(f"there is no adapter '{name}': there are {', '.join(self.adapters)}.")
        parameters = self.bank.kept.pop(name)
        before = self.bank.install(self.tuned, dict(parameters.requires_grad_()))
        self.bank.kept[self.bank.active] = nn.ParameterDict(before).requires_grad_(False)
        self.bank.active = name

    @contextmanager
    def disable(self) -> Iterator[nn.Module]:
        """Inside this context the backbone computes what it computed before :func:`tune`; neck and head are unchanged.

        The model is as before when the context ends, after an exception, too.
        """
        parameters = self.bank.install(self.tuned, dict(self.bank.new(self.tuned)))
        try:
            yield self.model
        finally:
            self.bank.install(self.tuned, parameters)

    def merge(self) -> None:
        """Fold LoRA's updates into the backbone, which then computes the same without them; there is no way back.

        Raises:
            InputError: For any other method: an adapter that is no linear update cannot be part of a frozen layer.
        """
        if not hasattr(self.tuned, "merge"):
            raise InputError(f"{self.tuned.built_with['method']} cannot be merged into the backbone: only lora can.")
        if self.bank.kept:
            raise InputError("the backbone has several adapters: merge one where it is the only one.")
        self.tuned.merge()
        self.bank.names, self.bank.start = [], {}

    def save_pretrained(self, folder: str | Path, rest: bool = True) -> None:
        """Save the adapter in use: a folder of safetensors files and a JSON file, as a hub takes it.

        Args:
            folder: A new folder, or one to be written into.
            rest: Save what is trained outside the backbone, too (neck and head), and the buffers there.

        Raises:
            InputError: If the folder cannot be written, or if nothing of the backbone is trained.
        """
        folder = Path(folder)
        if not self.bank.names:
            raise InputError("nothing of the backbone is trained: there is no adapter to save.")
        check_place(folder, overwrite=True, folder=True)
        with self.disable():  # the pretrained values, for methods that train them
            digest = fingerprint(self.tuned.backbone)
        config = {
            "format": checkpoint.FORMAT,
            **self.tuned.built_with,
            "backbone": {"class": _class_of(type(self.host)), "fingerprint": digest},
        }
        folder.mkdir(parents=True, exist_ok=True)
        checkpoint.write(folder / ADAPTERS, self._values(), {})
        if rest and (others := _others(self.model, self.name)):
            checkpoint.write(folder / REST, others, {})
        else:
            (folder / REST).unlink(missing_ok=True)  # of an earlier save
        with replacing(folder / CONFIG) as unfinished:
            unfinished.write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")

    def load_adapter(self, folder: str | Path, name: str) -> None:
        """Load the adapter of a folder beside the others, under a name of its own. Switch to it afterwards.

        Raises:
            InputError: If the name is taken, or for a folder of another method, rank or backbone.
        """
        folder = Path(folder)
        config = _read_config(folder)
        mine = self.tuned.built_with
        for key in ("method", "stages", "options"):
            if config[key] != mine[key]:
                raise InputError(f"'{folder}' has the {key} {config[key]}, not {mine[key]}: tune a model of its own.")
        with self.disable():
            digest = fingerprint(self.tuned.backbone)
        _check_backbone(folder, config, type(self.host), tuple(mine["stages"]), digest)
        values = _fitting(folder, checkpoint.read(folder / ADAPTERS)[0], self._values())
        self.add_adapter(name)
        for key, value in values.items():
            self.bank.kept[name][_slashed(key)].data.copy_(value)

    def _values(self) -> dict[str, Tensor]:
        return {name: self.tuned.get_parameter(name).detach() for name in self.bank.names}


class AdapterBank(nn.Module):
    """The adapters that are not in use, by name, and the values with which all of them start.

    Args:
        tuned: The tuned backbone; what of it requires a gradient is the adapter.

    Attributes:
        names: The names in ``tuned`` of the parameters that make up an adapter.
        start: Their values before training. No buffers: DistributedDataParallel would send them at every step.
        active: The name of the adapter in use, whose parameters are in ``tuned`` itself.
        kept: The others.
    """

    def __init__(self, tuned: nn.Module) -> None:
        super().__init__()
        self.names = [name for name, p in tuned.named_parameters() if p.requires_grad]
        self.start = {name: tuned.get_parameter(name).detach().clone() for name in self.names}
        self.active = FIRST
        self.kept = nn.ModuleDict()

    def new(self, tuned: nn.Module) -> nn.ParameterDict:
        """The parameters of a new adapter, on the device of the one in use; none requires a gradient."""
        values = {name: value.to(tuned.get_parameter(name), copy=True) for name, value in self.start.items()}
        return nn.ParameterDict({_slashed(name): nn.Parameter(value, False) for name, value in values.items()})

    def install(self, tuned: nn.Module, parameters: dict[str, nn.Parameter]) -> dict[str, nn.Parameter]:
        """Put these parameters into the tuned backbone; returns those that were there."""
        before = {}
        for name in self.names:
            owner, _, leaf = name.rpartition(".")
            module = tuned.get_submodule(owner)
            before[_slashed(name)] = getattr(module, leaf)
            setattr(module, leaf, parameters[_slashed(name)])
        return before


def _install(model, name, kind, stages, numbers, method, options) -> Tuning:
    host = model.get_submodule(name)
    if method in kind.REFUSED:
        raise InputError(
            f"{method} is made for timm's own blocks, which {type(host).__name__} does not have: choose e3va, adapter "
            "or another method."
        )
    if "fpn_norm" in options:
        raise InputError("fpn_norm is no option here: the norms behind the stages are the model's own.")
    flags, modes = {p: p.requires_grad for p in host.parameters()}, {m: m.training for m in host.modules()}
    like = next(stages.parameters())
    try:
        tuned = attach(method, stages, numbers, options)
    except BaseException:
        for p, flag in flags.items():
            p.requires_grad_(flag)
        for module, mode in modes.items():
            module.training = mode
        raise
    for child in (child for child_name, child in tuned.named_children() if child_name != "backbone"):
        child.to(like)  # device and type of the backbone
    host.__class__ = kind
    host.install_tuned(tuned)
    host.add_module("adapter_bank", AdapterBank(tuned))
    tuned.train(host.training)
    return Tuning(model, name)


def _slashed(name: str) -> str:
    """A parameter's name as the name of another's child, which cannot have dots."""
    return name.replace(".", "/")


def _class_of(kind: type) -> str:
    """The class that a host had before it was tuned."""
    first = next(base for base in kind.__mro__ if not issubclass(base, Host) and issubclass(base, nn.Module))
    return f"{first.__module__.split('.')[0]}.{first.__name__}"


def _others(model: nn.Module, name: str) -> dict[str, Tensor]:
    """What training can change outside of a tuned backbone."""
    start = f"{name}." if name else ""
    inside = (f"{start}tuned.", f"{start}adapter_bank.")
    kept = checkpoint.kept_state(model)
    return {key: value.clone() for key, value in kept.items() if not key.startswith(inside)}  # tied ones apart


def _rest_of(folder: Path, model: nn.Module) -> dict[str, Tensor]:
    """The tensors of a folder for the rest of a model, checked against it."""
    if not (folder / REST).exists():
        return {}
    tensors, _ = checkpoint.read(folder / REST)
    state = model.state_dict()
    for key, value in tensors.items():
        if key not in state or state[key].shape != value.shape:
            raise InputError(
                f"'{folder}' was saved with another neck or head, first at '{key}': pass rest=False for the adapters "
                "alone."
            )
    return tensors


def _read_config(folder: Path) -> dict:
    try:
        config = json.loads((folder / CONFIG).read_text(encoding="utf-8"))
    except OSError:
        raise InputError(f"'{folder}' holds no {CONFIG}: give a folder that save_pretrained wrote.") from None
    except ValueError as error:
        raise InputError(f"'{folder / CONFIG}' is no JSON file ({error}): it is damaged.") from None
    if not isinstance(config, dict) or not {"method", "stages", "options", "backbone"} <= config.keys():
        raise InputError(f"'{folder / CONFIG}' was not written by this version of e3va_lite.")
    return config


def _fitting(folder: Path, tensors: dict[str, Tensor], wanted: dict[str, Tensor]) -> dict[str, Tensor]:
    """The tensors, if they have the names and shapes that are wanted."""
    for key in sorted({*tensors, *wanted}):
        if key not in tensors or key not in wanted or tensors[key].shape != wanted[key].shape:
            raise InputError(f"'{folder}' does not fit this backbone, first at '{key}'.")
    return tensors


def _check_backbone(folder: Path, config: dict, kind: type, numbers: tuple[int, ...], digest: str) -> None:
    about = config["backbone"]
    if about["class"] != _class_of(kind) or config["stages"] != list(numbers):
        raise InputError(
            f"'{folder}' belongs to the stages {config['stages']} of a {about['class']}, not to {list(numbers)} of a "
            f"{_class_of(kind)}."
        )
    if about["fingerprint"] != digest:
        raise InputError(
            f"'{folder}' was made with other pretrained weights (their digest begins with "
            f"{about['fingerprint'][:12]}): load those."
        )
