"""What a dataset on disk holds, what it would teach, and what is wrong with it: shared by all layouts."""

import difflib
import hashlib
import os
from collections import Counter, defaultdict
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from ..errors import InputError

SMALLEST = 32  # pixels, the coarsest stride of a Swin
UNREADABLE = (OSError, SyntaxError, ValueError, Image.DecompressionBombError)  # what Pillow raises for broken files


class Problem(NamedTuple):
    """One finding. ``fatal``: training would stop at it; else it is harmless, or what it concerns is left out."""

    kind: str  # what is wrong, the same words for all of its kind
    where: str  # file, and object if there are several in it
    fatal: bool


class BadFile(InputError):
    """A file that cannot be used; ``problem`` is what a check of the files calls it."""

    problem: Problem


def bad_file(kind: str, where: str, message: str) -> BadFile:
    """The error for a fatal problem."""
    error = BadFile(message)  # one argument: worker processes send errors by pickle
    error.problem = Problem(kind, where, True)
    return error


class Walk:
    """One pass over the files of a split, which finds everything that training could stumble over.

    A dataset raises the first of ``errors`` and warns of some of ``problems``; a check lists all of these.
    """

    def __init__(self) -> None:
        self.problems: list[Problem] = []
        self.errors: list[InputError] = []  # those behind the fatal problems

    def note(self, kind: str, where: str) -> None:
        """Add a harmless problem."""
        self.problems.append(Problem(kind, where, False))

    def refuse(self, kind: str, where: str, message: str = "") -> None:
        """Add a fatal problem."""
        self.problems.append(Problem(kind, where, True))
        self.errors.append(
            InputError(message or f"{kind}, first {where}: 'e3va data check' lists all to be corrected.")
        )

    @contextmanager
    def refusing(self) -> Iterator[None]:
        """Go on after a file that cannot be used, which becomes a fatal problem."""
        try:
            yield
        except BadFile as error:
            self.problems.append(error.problem)
            self.errors.append(error)


@dataclass
class Contents:
    """What a split holds, as training would see it."""

    images: list[Path]
    classes: list[str]
    source: str  # where the class list comes from
    taught: Counter  # targets by class, after all cleaning: objects, or images that show the class in their mask
    left_out: Counter = field(default_factory=Counter)  # objects by (class, reason)
    groups: set[str] = field(default_factory=set)  # names of supercategories
    without_annotation: list[Path] = field(default_factory=list)  # image files that nothing names
    hint: str = ""  # what helps if nothing is taught
    unit: str = "objects"

    def teaching_problems(self) -> list[Problem]:
        """Classes that the split, used for training, would not teach; a fatal problem if it teaches none at all."""
        reasons = Counter()
        for (_, reason), count in self.left_out.items():
            reasons[reason] += count
        if not self.taught.total():
            why = f"{reasons.total()} {self.unit} are left out ({_listed(reasons)})" if reasons else f"no {self.unit}"
            if reasons["other classes"]:
                why += f"; the classes asked for are {', '.join(self.classes[:5])}"
            return [Problem("training splits that teach nothing", f"{why}{self.hint}", True)]
        problems = []
        for name in (name for name in self.classes if not self.taught[name]):
            why = Counter({reason: n for (other, reason), n in self.left_out.items() if other == name})
            near = difflib.get_close_matches(name, {other for other, _ in self.left_out} - set(self.classes))
            note = f" ({_listed(why)})" if why else f" (did you mean {near[0]}?)" if near else ""
            note = " (a group of other classes: choose classes without it)" if name in self.groups else note
            problems.append(Problem(f"classes without {self.unit} to learn from", f"{name}{note}", False))
        for rare, common in _alike(self.taught):
            where = f"{rare} ({self.taught[rare]}) and {common} ({self.taught[common]})"
            problems.append(Problem("classes with nearly the same name", where, False))
        return problems

    def require_something_to_learn(self, where: str) -> list[str]:
        """What a training set should warn of.

        Raises:
            InputError: If it teaches nothing.
        """
        problems = self.teaching_problems()
        for problem in problems:
            if problem.fatal:
                raise InputError(f"there is nothing to train on in {where}: {problem.where}.")
        return counted(problems, dict.fromkeys(problem.kind for problem in problems))

    def summary(self) -> list[str]:
        """Lines of text: images, classes with their source, targets of each, and what is left out."""
        shown = ", ".join(f"{name} {self.taught[name]:,}" for name in self.classes if self.taught[name])
        absent = sum(not self.taught[name] for name in self.classes)
        lines = [f"  {len(self.images):,} images, {self.taught.total():,} {self.unit}"]
        lines.append(f"  {len(self.classes)} classes, {self.source}: {shown}{f'; {absent} without any' * bool(absent)}")
        reasons: dict[str, Counter] = defaultdict(Counter)
        for (name, reason), count in self.left_out.items():
            reasons[reason][name] += count
        lines += [f"  left out, {reason}: {_listed(names)}" for reason, names in reasons.items()]
        return lines


class Findings(list):
    """The problems of a split, and as ``contents`` what it holds; None where that cannot be known."""

    def __init__(self, problems: Iterable[Problem] = (), contents: Contents | None = None) -> None:
        super().__init__(problems)
        self.contents = contents


def check_dataset(recipe, root: Path, check: Callable[..., Findings]) -> dict[str, Findings]:
    """The findings of a recipe's splits by name, and what only shows when they are seen together.

    Args:
        recipe: With ``train_split`` and ``eval_split``.
        root: Folder of the dataset.
        check: Of the recipe's task: it lists the findings of one split.
    """
    splits = {split: check(recipe, root, split) for split in dict.fromkeys((recipe.train_split, recipe.eval_split))}
    train, held_out = splits[recipe.train_split], splits[recipe.eval_split]
    if train.contents and not any(problem.fatal for problem in train):
        train += train.contents.teaching_problems()
    known = {split: found.contents.images for split, found in splits.items() if found.contents}
    if train is held_out:
        train.append(Problem("splits that are used for training and evaluation", recipe.train_split, False))
    elif train.contents and held_out.contents:
        both = {_real(path) for path in train.contents.images}
        for path in held_out.contents.images:
            if _real(path) in both:
                held_out.append(Problem("images that the training split has, too", str(path), False))
    held_out += _copies(known)
    named = {_real(path) for paths in known.values() for path in paths}
    unnamed = {p: None for found in splits.values() if found.contents for p in found.contents.without_annotation}
    held_out += [
        Problem("image files that no annotation names", str(path), False)
        for path in unnamed
        if _real(path) not in named
    ]
    return splits


def first_of_copies(paths: Iterable[Path]) -> dict[Path, Path]:
    """For files that have the same bytes as an earlier one: that one. Links to one file are no copies."""
    by_size = defaultdict(dict)
    for path in paths:
        by_size[path.stat().st_size].setdefault(_real(path), path)
    first: dict[str, Path] = {}
    copies = {}
    for path in (path for alike in by_size.values() if len(alike) > 1 for path in alike.values()):
        other = first.setdefault(hashlib.sha256(path.read_bytes()).hexdigest(), path)
        if other is not path:
            copies[path] = other
    return copies


def _copies(images: dict[str, list[Path]]) -> list[Problem]:
    """Different files of the same bytes, within a split and across splits."""
    splits = {path: split for split, paths in images.items() for path in paths if os.path.isfile(path)}
    problems = []
    for path, other in first_of_copies(splits).items():
        place = "within a split" if splits[other] == splits[path] else "across splits"
        problems.append(Problem(f"images that are copies of another file, {place}", f"{path} of {other}", False))
    return problems


def _real(path: Path) -> str:
    try:
        return os.path.realpath(path)
    except (OSError, ValueError):  # no file can have that name
        return str(path)


def _alike(counts: Counter) -> list[tuple[str, str]]:
    """Pairs of class names, the rarer first, that differ in case, signs or a slip of the pen."""
    names = [name for name, count in counts.most_common() if count]
    pairs = []
    for place, common in enumerate(names):
        for rare in names[place + 1 :]:
            plain, other = ("".join(filter(str.isalnum, name.casefold())) for name in (common, rare))
            slip = len(other) > 4 and counts[rare] * 20 <= counts[common]
            if plain == other or (slip and difflib.SequenceMatcher(None, plain, other).ratio() > 0.85):
                pairs.append((rare, common))
    return pairs


def counted(problems: list[Problem], kinds: Iterable[str], short: Callable[[str], str] = str) -> list[str]:
    """Per kind that occurs: how often, and its first three places, each made ``short``."""
    lines = []
    for kind in kinds:
        places = [short(problem.where) for problem in problems if problem.kind == kind]
        if places:
            first = list(dict.fromkeys(places))
            lines.append(f"{kind}: {len(places)} ({', '.join(first[:3])}{', ...' if len(first) > 3 else ''})")
    return lines


def _listed(counts: Counter) -> str:
    return ", ".join(f"{name} {count:,}" for name, count in counts.most_common(10))


def repeated(kind: str, places: Iterable[tuple[object, str]], fatal: bool = False) -> list[Problem]:
    """A problem for everything that comes a second time: ``places`` are pairs of a thing and where it is."""
    seen, problems = set(), []
    for thing, where in places:
        if thing in seen:
            problems.append(Problem(kind, where, fatal))
        seen.add(thing)
    return problems


def report(problems: list[Problem], shown: int = 3) -> str:
    """The problems as text: what training would stop at first, a count per kind, and its first ``shown`` places."""
    places: dict[tuple[bool, str], list[str]] = {}
    for problem in problems:
        places.setdefault((not problem.fatal, problem.kind), []).append(problem.where)
    lines = []
    for (harmless, kind), wheres in sorted(places.items()):
        lines.append(f"  {'no obstacle' if harmless else 'stops training'}: {kind}: {len(wheres)}")
        lines += [f"    {where}" for where in wheres[:shown]]
        if len(wheres) > shown:
            lines.append(f"    ... and {len(wheres) - shown} more")
    return "\n".join(lines)
