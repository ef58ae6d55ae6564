"""Where training pictures come from: a folder on this machine, and what lies in it.

A graph can come from anywhere, so folders are read only below ComfyUI's input folder and the roots that the machine's
owner listed; a link that leads out of them is not followed.
"""

import hashlib
import os
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import torch

from ..errors import LongCatError
from . import captions
from .captions import Row
from .pictures import SUFFIXES
from .problems import Problem, UnusablePicture

MASKS = "masks"
REFERENCES = "references"
PRESERVED = "preserved"
MOST_FILES = 100_000
MOST_NAMED = 20

Content: TypeAlias = Path | torch.Tensor


@dataclass(frozen=True)
class Source:
    """A picture with its caption, before it was opened: files, or pixels (height, width, 3) in 0..1."""

    name: str
    picture: Content
    caption: str
    reference: Content | None = None
    mask: Content | None = None


def resolve_folder(name: str, roots: Sequence[Path]) -> Path:
    """The folder that a name from a graph stands for: below a root, or an absolute path below one.

    Raises:
        LongCatError: it is not there, or not below a root; both in the same words, so that nothing is told about
            folders elsewhere.
    """
    text = name.strip()
    for root in roots:
        place = Path(os.path.normpath(root / text)) if text and "\0" not in text else None
        if place is not None and inside(place, roots) and place.is_dir():
            return place.resolve()
    places = ", ".join(map(str, roots))
    there = ", ".join(_some_folders(roots)) or "-"
    raise LongCatError(
        f"There is no folder '{name}' below the folders that may be read: {places}. Found there: {there}. Put the "
        "pictures into a folder in ComfyUI's input folder and write its name, or have the machine's owner list another "
        "place in the environment variable LONGCAT_DATASET_ROOTS.",
        f"在允许读取的位置（{places}）下没有文件夹“{name}”。现有：{there}。请把图像放入 ComfyUI 的 input 文件夹下的"
        "一个文件夹并填写其名称，或由机器所有者在环境变量 LONGCAT_DATASET_ROOTS 中列出其他位置。",
    )


def inside(path: Path, roots: Sequence[Path]) -> bool:
    """Whether a path lies below a root, as it is written and with all links followed."""
    real_roots = [root.resolve() for root in roots]
    written = Path(os.path.normpath(path))
    # As written first: to resolve a network path would already be to reach for it.
    if not any(written.is_relative_to(os.path.normpath(root)) for root in (*roots, *real_roots)):
        return False
    try:
        return any(path.resolve().is_relative_to(root) for root in real_roots)
    except (OSError, RuntimeError):  # a loop of links
        return False


def scan(
    folder: Path, roots: Sequence[Path], reference_folder: Path | None = None
) -> tuple[list[Source], list[Problem]]:
    """The pictures of a folder and the folders in it, with captions, references and masks.

    A line of the folder's table counts before the files beside a picture. References and masks are in folders called
    ``references`` and ``masks`` in it, under the same names as the pictures, whatever their endings; what is in
    ``preserved`` is for :func:`preserved`. A table under another name is a problem, and is not read.

    Raises:
        LongCatError: there are no pictures, too many files, or a table that cannot be read.
    """
    files = _files(folder)
    companions = _Companions(folder, files, reference_folder)
    table = captions.find_table(folder)
    if table and not inside(table, roots):
        raise LongCatError(
            f"The table '{table.name}' is a link to a place outside the folders that may be read. Put the file itself "
            "there.",
            f"表格“{table.name}”是指向允许读取范围之外的链接。请放入文件本身。",
        )
    rows, problems = captions.read_table(table) if table else ([], [])
    reader = _Reader(folder, roots, companions)
    for row in rows:
        reader.add_row(row, table.name if table else "")
    named = reader.named
    for path in files:
        if path.suffix.lower() in SUFFIXES and not companions.owns(path) and path not in named:
            reader.add_file(path)
    if not reader.sources and not reader.problems and not problems:
        raise _no_pictures(folder)
    return reader.sources, _other_tables(folder, files, table) + problems + reader.problems


def preserved(folder: Path, roots: Sequence[Path]) -> tuple[list[Source], list[Problem]]:
    """The pictures in a folder's ``preserved``, which are not learnt but edited as before; they have no captions.

    Raises:
        LongCatError: there are too many files.
    """
    place = folder / PRESERVED
    paths = [path for path in _files(place) if path.suffix.lower() in SUFFIXES] if place.is_dir() else []
    found = [Source(f"{PRESERVED}/{path.name}", path, "") for path in paths if inside(path, roots)]
    outside = [Problem(f"{PRESERVED}/{path.name}", "outside") for path in paths if not inside(path, roots)]
    return found, outside


def from_batch(
    images: torch.Tensor,
    texts: str,
    references: torch.Tensor | None = None,
    masks: torch.Tensor | None = None,
) -> list[Source]:
    """The pictures of a batch.

    Args:
        images, references: (pictures, height, width, channels) in 0..1.
        texts: one caption for each picture, a line each, or one line for all.
        masks: (pictures or 1, height, width), 1 where the picture is learnt.

    Raises:
        LongCatError: there are not as many captions, references or masks as pictures.
    """
    count = len(images)
    lines = [line.strip() for line in texts.splitlines() if line.strip()]
    _check_count("captions", "描述", len(lines), (0, 1, count), count)
    _check_count("references", "参考图", count if references is None else len(references), (count,), count)
    _check_count("masks", "遮罩", 1 if masks is None else len(masks), (1, count), count)
    all_texts = lines * count if len(lines) == 1 else lines or [""] * count
    return [
        Source(
            f"#{index + 1}",
            images[index],
            text,
            None if references is None else references[index],
            None if masks is None else masks[index if len(masks) == count else 0],
        )
        for index, text in enumerate(all_texts)
    ]


def fingerprint(folders: Sequence[Path]) -> str:
    """A hash that changes when a file below some folders does: its name, size or time of change."""
    lines = []
    for folder in folders:
        for path in _files(folder):
            facts = path.stat() if path.exists() else path.lstat()
            lines.append(f"{path}:{facts.st_size}:{facts.st_mtime_ns}")
    return hashlib.sha256("\n".join(lines).encode("utf-8", "surrogateescape")).hexdigest()


class _Companions:
    """Pictures of the same names in the folders for references and masks."""

    def __init__(self, folder: Path, files: Sequence[Path], reference_folder: Path | None) -> None:
        if reference_folder == folder:
            raise LongCatError(
                f"The folder and the reference folder are both '{folder.name}'. Put the pictures before the edit into "
                "a folder of their own.",
                f"图像文件夹与参考图文件夹都是“{folder.name}”。请把编辑前的图像放入单独的文件夹。",
            )
        self._folders: tuple[Path, ...] = (folder / REFERENCES, folder / MASKS, folder / PRESERVED)
        references = reference_folder or self._folders[0]
        outside = _files(reference_folder) if reference_folder else files
        self.references = _by_name(references, outside)
        self.masks = _by_name(self._folders[1], files)
        if reference_folder and reference_folder.is_relative_to(folder):
            self._folders = (*self._folders, reference_folder)

    def owns(self, path: Path) -> bool:
        """Whether a file is a reference, a mask or a picture to preserve itself."""
        return any(path.is_relative_to(place) for place in self._folders)


class _Reader:
    """Collects sources and what was wrong on the way."""

    def __init__(self, folder: Path, roots: Sequence[Path], companions: _Companions) -> None:
        self._folder = folder
        self._roots = roots
        self._companions = companions
        self.sources: list[Source] = []
        self.problems: list[Problem] = []
        self.named: set[Path] = set()

    def add_row(self, row: Row, table: str) -> None:
        """A line of the table."""
        names = [name.replace("\\", "/") for name in (row.file, row.reference, row.mask) if name]
        places = [Path(os.path.normpath(self._folder / name)) for name in names]
        self.named.update(places)
        for path in places:
            if not inside(path, self._roots):
                self.problems.append(Problem(f"{table}:{row.line}", "outside", path.name))
                return
            if not path.is_file():
                self.problems.append(Problem(f"{table}:{row.line}", "no file", path.name))
                return
        others = iter(places[1:])
        self._add(places[0], row.caption, next(others) if row.reference else None, next(others) if row.mask else None)

    def add_file(self, path: Path) -> None:
        """A picture that no table names."""
        if inside(path, self._roots):
            self._add(path, "", None, None)
        else:
            self.problems.append(Problem(self._name(path), "outside"))

    def _add(self, path: Path, caption: str, reference: Path | None, mask: Path | None) -> None:
        name, key = self._name(path), _key(self._folder, path)
        reference = reference or self._companions.references.get(key)
        mask = mask or self._companions.masks.get(key)
        try:
            text = caption or captions.beside(path, lambda file: inside(file, self._roots))
        except UnusablePicture as error:
            self.problems.append(Problem(name, error.kind, error.detail))
            return
        if all(companion is None or inside(companion, self._roots) for companion in (reference, mask)):
            self.sources.append(Source(name, path, text, reference, mask))
        else:
            self.problems.append(Problem(name, "outside"))

    def _name(self, path: Path) -> str:
        name = path.relative_to(self._folder).as_posix() if path.is_relative_to(self._folder) else path.name
        # Half characters, of names in another encoding than the system's, cannot be shown.
        return name.encode("utf-8", "backslashreplace").decode("utf-8")


def _files(folder: Path) -> list[Path]:
    """Every visible file below a folder, sorted; links to folders are not followed.

    Raises:
        LongCatError: there are too many.
    """
    found: list[Path] = []
    for place, folders, names in os.walk(folder):
        folders[:] = sorted(name for name in folders if not name.startswith("."))
        found += [Path(place, name) for name in sorted(names) if not name.startswith(".")]
        if len(found) > MOST_FILES:
            raise LongCatError(
                f"'{folder.name}' holds more than {MOST_FILES:,} files. Choose the folder with the pictures "
                "themselves, or split it.",
                f"“{folder.name}”中的文件超过 {MOST_FILES:,} 个。请直接选择存放图像的文件夹，或将其拆分。",
            )
    return found


def _other_tables(folder: Path, files: Sequence[Path], table: Path | None) -> list[Problem]:
    """Files in a folder that look like a table of captions and are not called like one."""
    captioned = {path.with_suffix(".json") for path in files if path.suffix.lower() in SUFFIXES}
    return [
        Problem(path.name, "other table", ", ".join(captions.TABLES))
        for path in files
        if path.parent == folder
        and path.suffix.lower() in captions.TABLE_SUFFIXES
        and path not in captioned
        and path.is_file()
        and not (table and path.samefile(table))  # its name may be written otherwise where case does not count
    ]


def _some_folders(roots: Sequence[Path]) -> list[str]:
    """Names of the first folders directly below some roots."""
    found = [place for root in roots if root.is_dir() for place in root.iterdir() if place.is_dir()]
    return sorted(place.name for place in found if not place.name.startswith("."))[:MOST_NAMED]


def _by_name(folder: Path, files: Sequence[Path]) -> dict[PurePosixPath, Path]:
    pictures = [path for path in files if path.suffix.lower() in SUFFIXES and path.is_relative_to(folder)]
    return {_key(folder, path): path for path in reversed(pictures)}


def _key(folder: Path, path: Path) -> PurePosixPath:
    """What pictures of the same name have in common: the place in their folder, without the ending."""
    relative = path.relative_to(folder) if path.is_relative_to(folder) else Path(path.name)
    return PurePosixPath(relative.with_suffix("").as_posix())


def _check_count(en: str, zh: str, found: int, fitting: Sequence[int], pictures: int) -> None:
    if found not in fitting:
        raise LongCatError(
            f"There are {found} {en} for {pictures} pictures. Put as many as there are pictures, in their order, or "
            "one caption or mask for all.",
            f"{pictures} 张图像对应 {found} 个{zh}。请提供与图像数量相同的{zh}并按顺序排列；"
            "描述和遮罩也可以只提供一个。",
        )


def _no_pictures(folder: Path) -> LongCatError:
    endings = ", ".join(sorted(SUFFIXES))
    return LongCatError(
        f"There is no picture in '{folder.name}'. Expected files ending in {endings}, with their captions in .txt "
        "files of the same names.",
        f"“{folder.name}”中没有图像。应为以 {endings} 结尾的文件，描述写在同名的 .txt 文件中。",
    )
