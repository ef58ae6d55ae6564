"""From a prompt to token ids: quoted text goes in character by character, so that it can be drawn.

Source: ``LongCatImagePipeline._encode_prompt`` and ``split_quotation`` in diffusers.
"""

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

MAX_TOKENS = 512
QUOTE_PAIRS = (("'", "'"), ('"', '"'), ("‘", "’"), ("“", "”"))
TEXT_TO_IMAGE_PREFIX = (
    "<|im_start|>system\nAs an image captioning expert, generate a descriptive text prompt based on an image content, "
    "suitable for input to a text-to-image model.<|im_end|>\n<|im_start|>user\n"
)
SUFFIX = "<|im_end|>\n<|im_start|>assistant\n"

_QUOTED = re.compile("|".join(f"{re.escape(a)}[^{re.escape(a + b)}]*?{re.escape(b)}" for a, b in QUOTE_PAIRS))
# Starts only where a word does: else a run of n letters takes n² steps.
_CONTRACTION = re.compile(r"(?<![a-zA-Z])[a-zA-Z]+'[a-zA-Z]+")


@dataclass(frozen=True)
class PromptTokens:
    """Token ids of one prompt (without template and padding) and what happened on the way."""

    ids: tuple[int, ...]
    total: int
    quoted: tuple[str, ...]
    cut: str

    def report(self, notes: Sequence[str] = ()) -> str:
        """What was encoded, in both languages: token count, quoted text, notes, and the text that was cut off."""
        drawn = "  ".join(self.quoted) if self.quoted else "none 无"
        lines = [
            f"tokens 词元: {len(self.ids)} / {MAX_TOKENS}",
            f"quoted text, encoded character by character 引号文字（逐字编码）: {drawn}",
            *notes,
        ]
        return "\n".join([*lines, self.cut_report()] if self.cut else lines)

    def cut_report(self) -> str:
        """How many tokens were not encoded, and their text."""
        return (
            f"CUT 已截断: {self.total - MAX_TOKENS} tokens over the limit were not encoded "
            f"超出上限的词元未编码: {self.cut}"
        )


def split_quoted(prompt: str) -> list[tuple[str, bool]]:
    """Split a prompt into (part, is quoted); the parts always join back to the prompt.

    The apostrophe of a contraction ("don't") opens no quotation. Upstream hides contractions behind
    substitutes that contain each other, so a prompt with two different ones comes back corrupted, in an
    order that depends on the process's hash seed. Here they are hidden in order of appearance, without
    moving a character, and the parts are cut from the prompt itself.
    """
    hidden = prompt
    for word in dict.fromkeys(_CONTRACTION.findall(prompt)):
        hidden = hidden.replace(word, "\0" * len(word))
    ends = [0]
    for match in _QUOTED.finditer(hidden):
        ends += match.span()
    ends.append(len(prompt))
    parts = [prompt[start:end] for start, end in zip(ends, ends[1:], strict=False) if end > start]
    return [(part, _QUOTED.match(part) is not None) for part in parts]


def tokenize(tokenizer: Callable[..., Any], prompt: str) -> PromptTokens:
    """Token ids of a prompt, at most 512, with quoted text one character at a time.

    Args:
        tokenizer: the checkpoint's Qwen2 tokenizer.
    """
    ids: list[int] = []
    parts = split_quoted(prompt)
    for part, is_quoted in parts:
        for piece in part if is_quoted else (part,):
            ids += token_ids(tokenizer, piece)
    cut = tokenizer.decode(ids[MAX_TOKENS:]) if len(ids) > MAX_TOKENS else ""  # type: ignore[attr-defined]
    quoted = tuple(part for part, is_quoted in parts if is_quoted)
    return PromptTokens(tuple(ids[:MAX_TOKENS]), len(ids), quoted, cut)


def token_ids(tokenizer: Callable[..., Any], text: str) -> Sequence[int]:
    """Token ids of a text as it stands, without special tokens around it."""
    ids: Sequence[int] = tokenizer(text, add_special_tokens=False)["input_ids"]
    return ids
