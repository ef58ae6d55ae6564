"""What can be wrong with a training picture or its caption, in words.

A picture that cannot be used is left out and named; the run goes on as long as something is left.
"""

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Kind:
    """One thing that can be wrong, in both languages.

    Attributes:
        skipped: the picture is left out for it.
        first: it is listed before all others, since it may be the cause of them.
    """

    en: str
    zh: str
    skipped: bool = False
    first: bool = False


KINDS = {
    "other table": Kind(
        "is not read: a table of captions has one of these names", "未读取：描述表格须使用以下名称之一", first=True
    ),
    "unreadable": Kind("cannot be read", "无法读取", skipped=True),
    "too large": Kind("is larger than the limit", "超过大小上限", skipped=True),
    "too small": Kind("is too small for its bucket", "对于其分桶过小", skipped=True),
    "too long": Kind("is too long: most of it would be cropped away", "过于狭长：大部分会被裁掉", skipped=True),
    "outside": Kind("lies outside the folders that may be read", "位于允许读取的文件夹之外", skipped=True),
    "no caption": Kind("has no caption", "没有描述文本", skipped=True),
    "bad caption": Kind("has a caption file that cannot be read", "描述文件无法读取", skipped=True),
    "bad line": Kind("is a line that cannot be read", "该行无法读取", skipped=True),
    "no file": Kind("names a picture that is not there", "所指的图像不存在", skipped=True),
    "no reference": Kind("has no picture to edit (reference), others have", "缺少参考图，而其他图像有", skipped=True),
    "bad reference": Kind("has a reference that cannot be used", "参考图无法使用", skipped=True),
    "bad mask": Kind("has a mask that cannot be used", "遮罩无法使用", skipped=True),
    "only trigger": Kind("has no caption, is trained with the trigger word alone", "没有描述文本，仅以触发词训练"),
    "duplicate": Kind("is the same picture as", "与此图像相同："),
    "enlarged": Kind("is enlarged", "被放大"),
    "cropped": Kind("loses much to cropping", "裁剪损失较多"),
    "other ratio": Kind(
        "has a reference of another ratio, which is cropped differently", "参考图比例不同，裁剪方式不同"
    ),
    "not quoted": Kind(
        "has text in its caption that looks meant to be drawn; put it in quotes", "描述中有看似要画出的文字，请加引号"
    ),
    "foreign quotes": Kind(
        "has quotes in its caption that the model was not trained on; use “…”", "描述中的引号模型未训练过，请用“…”"
    ),
    "cut": Kind("has a caption over 512 tokens, the rest is cut off", "描述超过 512 个词元，其余被截断"),
    "animated": Kind("has several frames, the first is taken", "含多帧，取第一帧"),
    "transparent": Kind("has transparency, is put on white", "含透明度，以白色为底"),
    "grey": Kind("is greyscale, gets three equal channels", "为灰度图，转换为三个相同通道"),
    "16 bit": Kind("has 16 bits a channel, is reduced to 8", "每通道 16 位，降为 8 位"),
    "CMYK": Kind("is CMYK, is converted to RGB without its colour profile", "为 CMYK，不使用色彩配置文件转换为 RGB"),
}


@dataclass(frozen=True)
class Problem:
    """One thing that is wrong with one picture or table line.

    Attributes:
        name: the file relative to the dataset's folder, or ``table:line``.
        kind: a key of :data:`KINDS`.
        detail: numbers, text or cause; empty if the kind says it all.
    """

    name: str
    kind: str
    detail: str = ""

    @property
    def skipped(self) -> bool:
        """Whether the picture is left out."""
        return KINDS[self.kind].skipped

    @property
    def text(self) -> str:
        """One line in both languages."""
        kind = KINDS[self.kind]
        mark = "SKIPPED 已跳过: " if kind.skipped else ""
        detail = f" ({self.detail})" if self.detail else ""
        return f"{mark}{self.name} {kind.en} {kind.zh}{detail}"


class UnusablePicture(Exception):
    """A picture or caption that cannot be used; becomes a :class:`Problem` of the file that it belongs to."""

    def __init__(self, kind: str, detail: str = "") -> None:
        super().__init__(f"{kind}: {detail}")
        self.kind = kind
        self.detail = detail


def listed(problems: Sequence[Problem], most: int = 200) -> list[str]:
    """The problems as lines, what may be the cause and what was left out first, and how many more there are."""
    order = sorted(problems, key=lambda problem: (not KINDS[problem.kind].first, not problem.skipped))
    lines = [problem.text for problem in order]
    more = [f"… and {len(lines) - most} more 还有 {len(lines) - most} 项"] if len(lines) > most else []
    return lines[:most] + more
