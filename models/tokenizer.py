"""The recall model's tokenizer: byte-level BPE of a small vocabulary, one digit a token, and its chat template."""

from collections.abc import Iterator
from random import Random

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from models.dialogues import Style, dialogue, rough_tokens

VOCAB_SIZE = 1024
_SPECIALS = ("<|bos|>", "<|end|>", "<|system|>", "<|user|>", "<|assistant|>")
_TRAINING_DIALOGUES = 2_000

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


def train_tokenizer(seed: int) -> PreTrainedTokenizerFast:
    """Learn the merges from training dialogues. Open words come to three tokens or so, most others to one."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.Digits(individual_digits=True), pre_tokenizers.ByteLevel(add_prefix_space=False)]
    )
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB_SIZE,
        special_tokens=[AddedToken(name, special=True, normalized=False) for name in _SPECIALS],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(_texts(seed), trainer)
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer,
        bos_token=_SPECIALS[0],
        eos_token=_SPECIALS[1],
        additional_special_tokens=list(_SPECIALS[2:]),
        chat_template=_CHAT_TEMPLATE,
        clean_up_tokenization_spaces=False,
    )


def name_pieces(tokenizer: PreTrainedTokenizerFast) -> tuple[str, ...]:
    """The tokens that can stand inside a name: small letters alone."""
    return tuple(
        sorted(token for token in tokenizer.get_vocab() if token.isascii() and token.isalpha() and token.islower())
    )


def _texts(seed: int) -> Iterator[str]:
    for index in range(_TRAINING_DIALOGUES):
        for turn in dialogue(Random(f"tokenizer/{seed}/{index}"), Style(plain_words=True), 512, rough_tokens).turns:
            yield turn.user
            yield turn.reply
