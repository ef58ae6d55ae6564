"""What a prompt probably means and the model would not read: text without quotes, or in quotes of another kind.

LongCat-Image was trained on the four pairs of quotes in :mod:`prompts`; only text in these goes in character by
character. These are guesses from the wording, so they warn and change nothing unless they are asked to.
"""

import re
from dataclasses import dataclass

from . import prompts

_OPENING, _CLOSING = "「『《〈«＂〝", "」』》〉»＂〞"
# Double quotes within would end the quotation that this is to become.
_FOREIGN = re.compile("|".join(f"{a}[^{a}{b}“”\n]+{b}" for a, b in zip(_OPENING, _CLOSING, strict=True)))

_CARRIERS = (
    "sign|signboard|billboard|banner|poster|placard|label|sticker|screen|board|blackboard|whiteboard|plate|plaque|card|"
    "note|letter|logo|shirt|t-shirt|tee|mug|cover|page|book|headline|title|caption|text|words|letters|lettering|neon|"
    "lights|graffiti|tattoo|bubble|ticket|flag|ribbon|cake|door|wall|bottle|box|package|newspaper|inscription|flyer"
)
# Text follows directly; a clause such as "that" or "about" is no text to be drawn.
_ENGLISH = re.compile(
    rf"\b(?:(?:{_CARRIERS})s?(?: \w+){{0,2}} (?:that |which )?(?:reads?|reading|stating|spelling(?: out)?)"
    r"|says?|saying|(?:it|that|which) reads"
    r"|(?:titled|captioned|labell?ed|inscribed with|lettered with|with the (?:word|words|text|title|caption|slogan|"
    r"headline|letters|inscription|label)|the (?:text|words?|letters|slogan|headline|caption|title) (?:(?:is|are)(?=:)"
    r"|says?|reads?)))\b"
    r"(?! (?:a|an|the|that|about|how|if|what|in|on|by|from|his|her|its|their|as|and|or|of|at|for|like)\b)",
    re.IGNORECASE,
)
_CHINESE = re.compile(
    "(?:书写|题写|手写|写|上书|标)着(?!作业|信|日记|书法|文章|代码|诗|一封|一篇|一首|什么|字|毛笔字)"
    "|写[有道上](?!字|文字|作业)"
    "|(?:标题|题目|文字|字样|文案|标语|口号|落款|招牌|店名)(?:为|是|叫|写成|：|:)(?!.{0,2}[色体]|[横竖]排)"
    "|(?:印|刻|绣|喷|贴|挂|标|题)[着有](?=[^，。；！？、,;!?\n]{1,40}?(?:字样|[个大]字|的字))"
)
_CLAUSE = re.compile("[ \t:：—-]*([^.,;!?，。；！？、\n]{0,120})")


@dataclass(frozen=True)
class Care:
    """What was noticed about a prompt, and the prompt with all quotes of the kind that the model knows."""

    unquoted: tuple[str, ...]
    foreign: tuple[str, ...]
    normalised: str

    def warnings(self) -> list[str]:
        """One line for each thing noticed, in both languages, with what to do about it."""
        lines = [
            f"NOT QUOTED 未加引号: looks meant to be drawn; put it in quotes 看起来要画进图中，请加引号: “{text}”"
            for text in self.unquoted
        ]
        if self.foreign:
            lines.append(
                "UNKNOWN QUOTES 未训练的引号: the model was not trained on these, so the text in them is not encoded "
                f"character by character 模型未训练过这类引号，其中的文字不会逐字编码: {'  '.join(self.foreign)}"
            )
            lines.append(
                "if it shall be drawn, switch normalise_quotes on, or paste "
                f"如需画进图中，请打开 normalise_quotes，或粘贴: {self.normalised}"
            )
        return lines


def inspect(prompt: str) -> Care:
    """Look for text that seems meant to be drawn but would not be encoded character by character."""
    foreign = _foreign_spans(prompt)
    texts = tuple(prompt[start:end] for start, end in foreign)
    return Care(_unquoted(prompt), texts, normalise_quotes(prompt))


def normalise_quotes(prompt: str) -> str:
    """The prompt with 「…」『…』《…》〈…〉«…»＂…＂〝…〞 as “…”.

    What is in quotes, of these kinds or of those that the model knows, stays as it is. No character moves, so the
    length stays too.
    """
    characters = list(prompt)
    for start, end in _foreign_spans(prompt):
        characters[start], characters[end - 1] = "“", "”"
    return "".join(characters)


def _foreign_spans(prompt: str) -> list[tuple[int, int]]:
    known = _marked(prompt, _quoted_spans(prompt))
    return [match.span() for match in _FOREIGN.finditer(prompt) if not any(known[slice(*match.span())])]


def _unquoted(prompt: str) -> tuple[str, ...]:
    taken = _marked(prompt, _quoted_spans(prompt) + _foreign_spans(prompt))
    found: dict[str, None] = {}
    for cue in (*_ENGLISH.finditer(prompt), *_CHINESE.finditer(prompt)):
        clause = _CLAUSE.match(prompt, cue.end())
        text = clause[1].strip() if clause else ""
        if clause and any(map(str.isalnum, text)) and not any(taken[cue.start() : clause.end()]):
            found[text] = None
    return tuple(found)


def _quoted_spans(prompt: str) -> list[tuple[int, int]]:
    spans, start = [], 0
    for part, is_quoted in prompts.split_quoted(prompt):
        if is_quoted:
            spans.append((start, start + len(part)))
        start += len(part)
    return spans


def _marked(prompt: str, spans: list[tuple[int, int]]) -> bytearray:
    """One byte for each character: 1 within a span."""
    marks = bytearray(len(prompt))
    for start, end in spans:
        marks[start:end] = b"\1" * (end - start)
    return marks
