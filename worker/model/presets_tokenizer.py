"""A tokenizer for models with random weights: bytes, a few special tokens, a chat template. Nothing to download."""

from itertools import count, product

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

BOS_TOKEN_ID = 0
EOS_TOKEN_ID = 1
_SPECIALS = ("<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
MIN_VOCAB_SIZE = len(_SPECIALS) + 256

_CHAT_TEMPLATE = """\
{{- bos_token -}}
{%- for message in messages -%}
    {%- if message.role not in ("system", "user", "assistant") -%}
        {{- raise_exception("role must be system, user or assistant, got " + message.role) -}}
    {%- endif -%}
    {{- "<|" + message.role + "|>" + message.content + "<|end|>" -}}
{%- endfor -%}
{%- if add_generation_prompt -%}{{- "<|assistant|>" -}}{%- endif -%}
"""


def byte_tokenizer(vocab_size: int) -> PreTrainedTokenizerFast:
    """Every byte is a token; ids past those decode to made-up words (so that a random model's replies can be read).

    Raises ValueError for a vocabulary without room for the bytes.
    """
    if vocab_size < MIN_VOCAB_SIZE:
        raise ValueError(f"a byte tokenizer needs a vocabulary of at least {MIN_VOCAB_SIZE}, got {vocab_size}")
    names = [*_SPECIALS, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    names += _words(vocab_size - len(names))
    # No merges: the words are never made by encoding, only by sampling.
    tokenizer = Tokenizer(models.BPE(vocab={name: token_id for token_id, name in enumerate(names)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True, normalized=False) for name in _SPECIALS])
    bos = _SPECIALS[BOS_TOKEN_ID]
    tokenizer.post_processor = processors.TemplateProcessing(f"{bos} $A", special_tokens=[(bos, BOS_TOKEN_ID)])
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=bos,
        eos_token=_SPECIALS[EOS_TOKEN_ID],
        additional_special_tokens=list(_SPECIALS[2:]),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def _words(number: int) -> list[str]:
    """Different pronounceable words, each with a space before it (which the byte alphabet writes as \u0120)."""
    syllables = [consonant + vowel for consonant, vowel in product("bdfghklmnprstvz", "aeiou")]
    words = ("\u0120" + "".join(parts) for length in count(2) for parts in product(syllables, repeat=length))
    return [word for word, _ in zip(words, range(number), strict=False)]
