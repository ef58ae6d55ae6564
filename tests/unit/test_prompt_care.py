"""Text that would not be read character by character is noticed, and quotes can be normalised without loss."""

import random

import pytest
from diffusers.pipelines.longcat_image.system_messages import SYSTEM_PROMPT_EN, SYSTEM_PROMPT_ZH

from longcat_pack.longcat_backend import prompt_care, prompts

ALPHABET = "「」『』《》〈〉«»＂〝〞“”‘’'\"ab红。 \n🐱"


def random_prompts() -> list[str]:
    rng = random.Random(4)
    return ["".join(rng.choices(ALPHABET, k=rng.randrange(0, 24))) for _ in range(5000)]


@pytest.mark.parametrize(
    ("prompt", "text"),
    [
        ("a shop sign that says OPEN", "OPEN"),
        ("a cat says hello, at night", "hello"),
        ("a neon sign reading open 24 hours", "open 24 hours"),
        ("a poster titled Summer Jazz", "Summer Jazz"),
        ("a mug with the words best dad.", "best dad"),
        ("a banner with the text: SALE", "SALE"),
        ('the sign says "A" and the label reads B', "B"),
        ("牌子上写着欢迎光临，背景是海", "欢迎光临"),
        ("海报标题为春天的故事，背景是草地", "春天的故事"),
        ("标语：节约用水", "节约用水"),
        ("印有欢迎光临字样的门", "欢迎光临字样的门"),
    ],
)
def test_text_that_looks_meant_to_be_drawn_is_noticed(prompt: str, text: str) -> None:
    care = prompt_care.inspect(prompt)
    assert care.unquoted == (text,)
    (warning,) = care.warnings()
    assert text in warning and "put it in quotes" in warning and "请加引号" in warning


@pytest.mark.parametrize(
    "prompt",
    [
        "a shop sign that says 'OPEN'",
        "a sign saying in red letters “open 24 hours”",
        'a sign that says: "don\'t walk"',
        "牌子上写着“欢迎光临”",
        "牌子上写着红色大字“欢迎光临”",
        "a girl reading a book near a sign",
        "a book that reads like a novel",
        "一个写着作业的女孩",
        "印有花纹的衬衫",
        "她写着毛笔字",
        "“你好”在中央，文字为白色斜体",
        "the text 'A' is red, the letters are large",
        "a red star",
        "",
    ],
)
def test_quoted_text_and_other_meanings_are_left_alone(prompt: str) -> None:
    assert prompt_care.inspect(prompt).warnings() == []


@pytest.mark.parametrize(
    ("prompt", "foreign", "normalised"),
    [
        ("写着「你好」的牌子", ("「你好」",), "写着“你好”的牌子"),
        ("海报《春天》和『夏天』", ("《春天》", "『夏天』"), "海报“春天”和“夏天”"),
        ("「他说『好』」", ("「他说『好』」",), "“他说『好』”"),
        ("a sign «don't»", ("«don't»",), "a sign “don't”"),
        ("＂双引号＂〝旧式〞", ("＂双引号＂", "〝旧式〞"), "“双引号”“旧式”"),
    ],
)
def test_quotes_of_other_kinds_are_noticed_and_normalised(
    prompt: str, foreign: tuple[str, ...], normalised: str
) -> None:
    care = prompt_care.inspect(prompt)
    assert (care.foreign, care.normalised) == (foreign, normalised)
    assert care.unquoted == ()
    text = "\n".join(care.warnings())
    assert normalised in text and "normalise_quotes" in text and "引号" in text
    assert prompt_care.inspect(normalised).warnings() == []


@pytest.mark.parametrize("prompt", ["“「a」”", "'《a》'", "「a", "「」", "“a”", "「a\nb」"])
def test_quotes_within_known_quotes_and_halves_are_left_alone(prompt: str) -> None:
    assert prompt_care.normalise_quotes(prompt) == prompt
    assert prompt_care.inspect(prompt).foreign == ()


def test_normalising_moves_no_character_and_reaches_every_span() -> None:
    touched = 0
    for prompt in random_prompts():
        care = prompt_care.inspect(prompt)
        pairs = zip(prompt, care.normalised, strict=True)
        assert all(a == b or (a in "「『《〈«＂〝」』》〉»〞" and b in "“”") for a, b in pairs), repr(prompt)
        assert prompt_care.inspect(care.normalised).foreign == (), repr(prompt)
        quoted = [part for part, is_quoted in prompts.split_quoted(care.normalised) if is_quoted]
        for span in care.foreign:
            assert f"“{span[1:-1]}”" in quoted, repr(prompt)
            touched += 1
    assert touched > 500


def test_nothing_changes_for_a_prompt_without_quotes_of_other_kinds() -> None:
    for prompt in random_prompts():
        if not set(prompt) & set("「『《〈«＂〝"):
            assert prompt_care.normalise_quotes(prompt) == prompt


@pytest.mark.parametrize("pattern", ["a", "“", "'", "「", "「《", "写着", "sign says ", "「a」", "'a'写着b,"])
def test_long_prompts_take_no_more_than_linear_work(pattern: str) -> None:
    """Quadratic work on so many characters would not end within the life of a test run."""
    prompt = pattern * (400_000 // len(pattern))
    assert len(prompt_care.inspect(prompt).normalised) == len(prompt)


def test_the_official_examples_raise_no_warning() -> None:
    """Captions in LongCat's own instructions for rewriting, where all text to be drawn is quoted."""
    lines = [*SYSTEM_PROMPT_EN.replace("\n   ", "").splitlines(), *SYSTEM_PROMPT_ZH.splitlines()]
    captions = [line for line in lines if "Rewrite Output:" in line or len(line) > 150]
    assert len(captions) > 15
    for caption in captions:
        assert prompt_care.inspect(caption).warnings() == [], caption
