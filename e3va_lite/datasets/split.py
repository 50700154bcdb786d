"""Divide a folder without lists into a training and an evaluation split; images stay where they are."""

import json
from pathlib import Path

import numpy as np

from ..errors import InputError
from .check import first_of_copies
from .images import SUFFIXES, files_by_name, folders_of


def split_dataset(
    recipe, root: Path, share: float, seed: int, source: str | None = None, overwrite: bool = False
) -> dict[str, list[str]]:
    """Write the lists, or COCO's JSON files, of the recipe's two splits.

    Images of the same bytes go to the same split. Of a folder of masks or XML files, images without one are left out.

    Args:
        recipe: Says where the files are and what the splits are called. In its folders there must be no ``{split}``.
        root: Folder of the dataset.
        share: Of the images that become the evaluation split.
        seed: Another one draws other images.
        source: For COCO: the JSON file below the root that is to be divided.
        overwrite: Replace lists that are there.

    Returns:
        The files that were written, with the names of their images.

    Raises:
        InputError: For folders that are missing or empty, and for lists that are there already.
    """
    root, splits = Path(root), (recipe.train_split, recipe.eval_split)
    if splits[0] == splits[1] or any(mark in name for name in splits for mark in "+/"):
        raise InputError(f"splits {' and '.join(splits)} cannot be files: --set train_split=train, eval_split=val.")
    if "{split}" in recipe.images:
        raise InputError(f"images={recipe.images} is a folder per split already: --set images=FOLDER for one of all.")
    as_json = recipe.task == "coco" or getattr(recipe, "annotations", "").endswith(".json")
    if as_json:
        content = _coco(root, source)
        folder = root / recipe.images
        images = {str(entry.get("file_name")): folder / str(entry.get("file_name")) for entry in content["images"]}
        pattern = recipe.annotations
    else:
        what = "masks" if recipe.task == "ade20k" else "annotations"
        suffix = recipe.mask_suffix if recipe.task == "ade20k" else ".xml"
        pattern = recipe.listing or ("{split}.txt" if recipe.task == "ade20k" else "ImageSets/Main/{split}.txt")
        pictures, annotations = folders_of(root, "{split}", images=recipe.images, **{what: getattr(recipe, what)})
        kinds = (recipe.image_suffix,) if recipe.task == "ade20k" else SUFFIXES
        annotated = files_by_name(annotations, (suffix,))
        images = {name: path for name, path in files_by_name(pictures, kinds).items() if name in annotated}
    if "{split}" not in pattern:
        raise InputError(f"'{pattern}' is one file for both splits: put {{split}} into its name.")
    files = [root / pattern.replace("{split}", name) for name in splits]
    for file in files:
        if file.exists() and not overwrite:
            raise InputError(f"'{file}' exists: pass --overwrite to replace it.")
    parts = _drawn(images, share, seed)
    for file, names in zip(files, parts, strict=True):
        file.parent.mkdir(parents=True, exist_ok=True)
        text = json.dumps(_part(content, names)) if as_json else "\n".join(names)
        file.write_text(text + "\n", encoding="utf-8")
    return {str(file): names for file, names in zip(files, parts, strict=True)}


def _drawn(images: dict[str, Path], share: float, seed: int) -> tuple[list[str], list[str]]:
    """Names for training and for evaluation."""
    first = first_of_copies([path for path in images.values() if path.is_file()])
    groups = {name: str(first.get(path, path)) for name, path in images.items()}
    order = np.random.default_rng(seed).permutation(sorted(set(groups.values()))).tolist()
    if len(order) < 2:
        raise InputError(f"{len(order)} different images cannot be divided: check the folders, or add images.")
    held_out = set(order[: min(max(1, round(share * len(order))), len(order) - 1)])
    names = sorted(groups)
    return [n for n in names if groups[n] not in held_out], [n for n in names if groups[n] in held_out]


def _coco(root: Path, source: str | None) -> dict:
    there = [root / source] if source else sorted([*root.glob("*.json"), *root.glob("annotations/*.json")])
    if len(there) != 1 or not there[0].is_file():
        names = ", ".join(path.relative_to(root).as_posix() for path in there) or "none"
        raise InputError(f"which file below '{root}' is to be divided? There is {names}: give --source FILE.")
    from .coco import read_content

    return read_content(there[0])


def _part(content: dict, names: list[str]) -> dict:
    chosen = set(names)
    images = [entry for entry in content["images"] if str(entry.get("file_name")) in chosen]
    ids = {str(entry.get("id")) for entry in images}
    objects = [entry for entry in content["annotations"] if str(entry.get("image_id")) in ids]
    return {**content, "images": images, "annotations": objects}
