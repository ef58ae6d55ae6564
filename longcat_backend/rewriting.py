"""A short prompt to a full caption: LongCat's own instruction, answered by its language model.

Source: ``LongCatImagePipeline.rewire_prompt`` in diffusers, from which the instructions come too.
"""

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from diffusers.pipelines.longcat_image.pipeline_longcat_image import get_prompt_language
from diffusers.pipelines.longcat_image.system_messages import SYSTEM_PROMPT_EN, SYSTEM_PROMPT_ZH
from torch import nn
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, PreTrainedTokenizerBase
from transformers.generation import RepetitionPenaltyLogitsProcessor, TemperatureLogitsWarper

from . import prompts
from .checkpoints import Checkpoint, FolderCheckpoint, audit, build
from .errors import LongCatError
from .text_encoder import TextEncoder, check_characters

AUTO, ENGLISH, CHINESE = "auto", "en", "zh"
LANGUAGES = (AUTO, ENGLISH, CHINESE)
HEAD = "lm_head.weight"
# Far more than a picture takes; beyond it the work grows with the square of the length.
LONGEST_PROMPT = 4 * prompts.MAX_TOKENS

_QUESTIONS = {
    ENGLISH: (SYSTEM_PROMPT_EN, "\nUser Input: {}\nRewritten prompt:"),
    CHINESE: (SYSTEM_PROMPT_ZH, "\n用户输入为：{}\n改写后的prompt为："),
}
# Of the published checkpoint, for files that carry none.
_CHAT = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n<|im_start|>user\n{}<|im_end|>\n"
    "<|im_start|>assistant\n"
)
_REPETITION_PENALTY = 1.05
_TEMPLATES = ("chat_template.jinja", "chat_template.json")


@dataclass(frozen=True)
class Rewrite:
    """A new prompt."""

    text: str
    tokens: int
    complete: bool  # the writer came to its end, not to the limit


@dataclass(frozen=True)
class Generation:
    """How a checkpoint wants its text generated: the tokens that end it, and the penalty on repeated tokens."""

    stop: frozenset[int]
    repetition_penalty: float


@dataclass(frozen=True)
class Sampling:
    """What the user chooses; temperature 0 always takes the likeliest token, whatever the seed."""

    seed: int
    temperature: float
    max_tokens: int


def language_of(prompt: str, language: str = AUTO) -> str:
    """The language of the instruction, upstream's choice for ``auto``: Chinese where there is a Chinese character."""
    return str(get_prompt_language(prompt)) if language == AUTO else language


def question(prompt: str, language: str = AUTO) -> str:
    """LongCat's instruction with the prompt at its end, as one message of the user."""
    instruction, ending = _QUESTIONS[language_of(prompt, language)]
    return instruction + ending.replace("{}", prompt)


def input_ids(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase, prompt: str, language: str) -> list[int]:
    """Tokens of the whole conversation, up to where the answer begins.

    Raises:
        LongCatError: the prompt is too long, has half a character, or the chat template is damaged.
    """
    check_characters(prompt)
    length = len(prompts.token_ids(tokenizer, prompt))
    if length > LONGEST_PROMPT:
        raise LongCatError(
            f"The prompt has {length} tokens; rewriting takes at most {LONGEST_PROMPT}, and a picture only "
            f"{prompts.MAX_TOKENS}. Make it shorter.",
            f"提示词有 {length} 个词元；改写最多接受 {LONGEST_PROMPT} 个，"
            f"而生成图像只用 {prompts.MAX_TOKENS} 个。请缩短。",
        )
    text = question(prompt, language)
    template = _chat_template(checkpoint)
    if template is None:
        return list(prompts.token_ids(tokenizer, _CHAT.replace("{}", text)))
    message = [{"role": "user", "content": [{"type": "text", "text": text}]}]
    chat = build(
        "text_processor",
        lambda: tokenizer.apply_chat_template(
            message, chat_template=template, tokenize=False, add_generation_prompt=True
        ),
    )
    return list(prompts.token_ids(tokenizer, str(chat)))


def generation(checkpoint: Checkpoint, tokenizer: PreTrainedTokenizerBase) -> Generation:
    """The checkpoint's own settings; the published ones for files that carry none.

    Raises:
        LongCatError: its generation_config.json is damaged.
    """
    published = frozenset({int(tokenizer.eos_token_id), int(tokenizer.pad_token_id)})
    if not isinstance(checkpoint, FolderCheckpoint):
        return Generation(published, _REPETITION_PENALTY)
    folder = checkpoint.folder / "text_encoder"
    if not (folder / "generation_config.json").is_file():
        return Generation(published, _REPETITION_PENALTY)
    config = build("text_encoder", lambda: GenerationConfig.from_pretrained(folder, local_files_only=True))
    stop = config.eos_token_id
    ids = [stop] if isinstance(stop, int) else stop or published
    return Generation(frozenset(map(int, ids)), float(config.repetition_penalty or 1.0))


def load_head(checkpoint: Checkpoint, rows: int, columns: int, dtype: torch.dtype) -> torch.Tensor:
    """The weight of the output head, (tokens, hidden size), which encoding does without.

    Raises:
        LongCatError: the checkpoint has none, or one of another shape.
    """
    stored = checkpoint.weights("text_encoder")
    if HEAD not in stored:
        raise LongCatError(
            f"The text encoder's file has no output head ({HEAD}), so it can read prompts but not write them. "
            "Use an official folder, or choose the endpoint as the source of LongCatPromptRewrite.",
            f"文本编码器文件中没有输出头（{HEAD}），只能读取提示词，无法改写。请使用官方目录结构的文件夹，"
            "或在 LongCatPromptRewrite 中选择 endpoint。",
        )
    weight = stored[HEAD]
    audit("text_encoder", {HEAD: torch.Size((rows, columns))}, {HEAD: weight.shape})
    return weight.to(dtype)


@torch.no_grad()
def generate(
    encoder: TextEncoder,
    head: nn.Module,
    ids: Sequence[int],
    rules: Generation,
    sampling: Sampling,
    device: torch.device,
    progress: Callable[[int, int], None],
) -> tuple[list[int], bool]:
    """Write an answer token by token, at transformers' positions, with a cache of keys and values.

    Every choice is made on the CPU, in float32 and from one generator, so the same seed gives the same text.

    Args:
        head: hidden state to logits.
        progress: is called after each token with tokens done and their limit; may raise to end the run.

    Returns:
        The tokens without the one that ends them, and whether there was one.

    Raises:
        LongCatError: the model's numbers are not finite.
    """
    cache = DynamicCache(config=encoder.model.config)
    choose = _chooser(rules, sampling)
    written: list[int] = []
    new = list(ids)
    for _ in range(sampling.max_tokens):
        hidden = encoder.model(
            input_ids=torch.tensor([new], device=device), past_key_values=cache, use_cache=True
        ).last_hidden_state
        token = choose([*ids, *written], head(hidden[:, -1]).float().cpu())
        if token in rules.stop:
            progress(sampling.max_tokens, sampling.max_tokens)
            return written, True
        written.append(token)
        new = [token]
        progress(len(written), sampling.max_tokens)
    return written, False


def cache_bytes(encoder: TextEncoder, tokens: int) -> int:
    """Bytes that keys and values of so many tokens take, and what growing them and one forward take beside."""
    config = encoder.model.config
    width = config.hidden_size // config.num_attention_heads * config.num_key_value_heads
    cache = 2 * config.num_hidden_layers * width * tokens
    return int((2 * cache + 4 * config.intermediate_size * tokens) * encoder.dtype.itemsize)


def finished(text: str, tokens: int, complete: bool) -> Rewrite:
    """The rewrite, if it is one.

    Raises:
        LongCatError: the text is empty.
    """
    if not text.strip():
        raise LongCatError(
            "The rewritten prompt is empty. Use another seed with a temperature above 0, put more into the prompt, or "
            "leave it as it is.",
            "改写结果为空。请在温度大于 0 时换一个种子、充实提示词，或直接使用原提示词。",
        )
    return Rewrite(text, tokens, complete)


def _chooser(rules: Generation, sampling: Sampling) -> Callable[[list[int], torch.Tensor], int]:
    processors = LogitsProcessorList()
    if rules.repetition_penalty != 1:
        processors.append(RepetitionPenaltyLogitsProcessor(rules.repetition_penalty))
    if sampling.temperature > 0:
        processors.append(TemperatureLogitsWarper(float(sampling.temperature)))
    generator = torch.Generator().manual_seed(sampling.seed)

    def choose(ids: list[int], logits: torch.Tensor) -> int:
        if not torch.isfinite(logits).all():
            raise LongCatError(
                "The text encoder gives values that are NaN or infinite. Choose bf16 or fp32 as its precision in "
                "LongCatLoader.",
                "文本编码器输出了 NaN 或无穷大。请在 LongCatLoader 中把文本编码器精度设为 bf16 或 fp32。",
            )
        scores: torch.Tensor = processors(torch.tensor([ids]), logits)
        if sampling.temperature > 0:
            return int(torch.multinomial(scores.softmax(-1), 1, generator=generator))
        return int(scores.argmax())

    return choose


def _chat_template(checkpoint: Checkpoint) -> str | None:
    if not isinstance(checkpoint, FolderCheckpoint):
        return None
    for name in _TEMPLATES:
        path = checkpoint.folder / "text_processor" / name
        if path.is_file():
            return build("text_processor", partial(_read_template, path))
    return None


def _read_template(path: Path) -> str:
    text: str = path.read_text(encoding="utf-8")
    return text if path.suffix == ".jinja" else str(json.loads(text)["chat_template"])
