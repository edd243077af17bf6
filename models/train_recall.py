"""Train `rekindle-recall` from nothing but a seed: `python -m models.train_recall --out DIR`, or `make train-recall`.

Short dialogues first, then longer ones: to find *the* fact among many is learned on few, and then kept at any distance.
"""

import argparse
import time
from collections.abc import Iterator
from copy import deepcopy
from dataclasses import dataclass, replace
from pathlib import Path
from random import Random

import torch
from rich.progress import Progress, TextColumn, TimeElapsedColumn
from torch import nn
from torch.nn import functional
from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM

from models.dialogues import Act, Dialogue, Style, dialogue, rough_tokens
from models.encoding import encode
from models.tokenizer import VOCAB_SIZE, name_pieces, train_tokenizer

CONTEXT_TOKENS = 2048
"""The longest dialogues of the training. The position embeddings reach twice as far, untrained."""

_REPLY_WEIGHT = {Act.TELL: 1.0, Act.CORRECT: 1.0, Act.ASK: 3.0, Act.ASK_UNKNOWN: 2.0, Act.CHAT: 0.2}
"""What a reply's tokens weigh in the loss: answers are what it is all for. What the user says weighs nothing."""


_USUAL, _PLAIN = Style(), Style(plain_words=True)
_HARD = Style(slips=True, reaching=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class Phase:
    """So many steps on dialogues of one length."""

    tokens: int
    """In a dialogue."""
    dialogues: int
    """In a batch."""
    steps: int
    begin: float = 1.0
    end: float = 1.0
    """The learning rates' factor goes in a line from the one to the other."""
    style: Style = _USUAL
    """A hard one's words are also strung from the tokenizer's pieces: no token of a name remains untrained."""
    fresh: bool = False
    """Begin with a new optimizer, warmed up again."""


PHASES = (
    Phase(tokens=128, dialogues=64, steps=450, style=_PLAIN),  # words that are easily copied,
    Phase(tokens=256, dialogues=32, steps=250, style=_PLAIN),  # until that is learned
    Phase(tokens=256, dialogues=32, steps=150, fresh=True),
    Phase(tokens=512, dialogues=16, steps=450, style=_HARD),
    Phase(tokens=1024, dialogues=8, steps=400, end=0.8, style=_HARD),
    Phase(tokens=CONTEXT_TOKENS, dialogues=4, steps=950, begin=0.8, end=0.0, style=_HARD),
)
_WARMUP_STEPS = 50
_MUON_LR = 0.02
_ADAM_LR = 0.003


def new_model(tokenizer: PreTrainedTokenizerFast, seed: int) -> Qwen3ForCausalLM:
    """A Qwen3 of 3.4 million parameters with random weights."""
    torch.manual_seed(seed)
    config = Qwen3Config(
        vocab_size=VOCAB_SIZE,
        hidden_size=256,
        intermediate_size=768,
        num_hidden_layers=4,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=64,
        max_position_embeddings=2 * CONTEXT_TOKENS,
        rope_parameters={"rope_type": "default", "rope_theta": 100_000.0},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=tokenizer.eos_token_id,
        use_cache=False,
    )
    return Qwen3ForCausalLM(config)


def batches(
    tokenizer: PreTrainedTokenizerFast, phase: Phase, random: Random
) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and the weight of each in the loss, both [dialogues, tokens]."""
    length = phase.tokens * 5 // 4  # in rough tokens: enough to fill a row
    style = replace(phase.style, pieces=name_pieces(tokenizer)) if phase.style.slips else phase.style
    while True:
        talks = [dialogue(random, style, length, rough_tokens) for _ in range(phase.dialogues)]
        rows = [_row(tokenizer, talk, phase.tokens) for talk in talks]
        yield torch.tensor([ids for ids, _ in rows]), torch.tensor([weights for _, weights in rows])


def _row(tokenizer: PreTrainedTokenizerFast, talk: Dialogue, num_tokens: int) -> tuple[list[int], list[float]]:
    ids, weights = [tokenizer.bos_token_id], [0.0]
    for turn, prompt, reply in encode(tokenizer, talk):
        ids += [*prompt, *reply]
        weights += [0.0] * len(prompt) + [_REPLY_WEIGHT[turn.act]] * len(reply)
    padding = max(0, num_tokens - len(ids))
    return (ids + [0] * padding)[:num_tokens], (weights + [0.0] * padding)[:num_tokens]


def loss_of(model: Qwen3ForCausalLM, ids: torch.Tensor, weights: torch.Tensor) -> torch.Tensor:
    """Weighted mean of the next-token losses; logits are computed only where they weigh anything."""
    hidden = model.model(input_ids=ids[:, :-1]).last_hidden_state
    chosen = weights[:, 1:] > 0
    logits = functional.linear(hidden[chosen], model.lm_head.weight).float()
    losses = functional.cross_entropy(logits, ids[:, 1:][chosen], reduction="none")
    return (losses * weights[:, 1:][chosen]).sum() / weights[:, 1:].sum()


class Optimizer:
    """Muon for the layers' matrices, Adam for the rest (Jordan et al. 2024), at one schedule."""

    def __init__(self, model: nn.Module) -> None:
        named = list(model.named_parameters())
        matrices = [weight for name, weight in named if weight.ndim == 2 and "embed" not in name]
        rest = [weight for name, weight in named if weight.ndim != 2 or "embed" in name]
        self._weights = [*matrices, *rest]
        self._optims = (
            (torch.optim.Muon(matrices, lr=_MUON_LR, weight_decay=0.01, momentum=0.95), _MUON_LR),
            (torch.optim.AdamW(rest, lr=_ADAM_LR, betas=(0.9, 0.95), weight_decay=0.0), _ADAM_LR),
        )

    def step(self, factor: float) -> None:
        """Move the weights, at `factor` times the full learning rates, and forget the gradients."""
        nn.utils.clip_grad_norm_(self._weights, 1.0)
        for optim, rate in self._optims:
            for group in optim.param_groups:
                group["lr"] = rate * factor
            optim.step()
            optim.zero_grad()


def train(tokenizer: PreTrainedTokenizerFast, seed: int, device: torch.device) -> Iterator[Qwen3ForCausalLM]:
    """All phases, one after the other, with a progress bar; the one model as it is after each."""
    model = new_model(tokenizer, seed).to(device)
    layers = model.model
    compiled = torch.compile(layers, dynamic=False)  # a quarter faster on a CPU
    optimizer = Optimizer(model)
    done = 0
    columns = (*Progress.get_default_columns(), TimeElapsedColumn(), TextColumn("{task.fields[loss]}"))
    with Progress(*columns) as progress:
        for index, phase in enumerate(PHASES):
            if phase.fresh:
                optimizer, done = Optimizer(model), 0
            bar = progress.add_task(f"{phase.tokens} tokens", total=phase.steps, loss="")
            data = batches(tokenizer, phase, Random(f"{seed}/{index}"))
            model.model = compiled
            for number in range(phase.steps):
                done += 1
                factor = phase.begin + (phase.end - phase.begin) * number / phase.steps
                ids, weights = (tensor.to(device) for tensor in next(data))
                with torch.autocast(device.type, torch.bfloat16):
                    loss = loss_of(model, ids, weights)
                loss.backward()
                optimizer.step(factor * min(1.0, done / _WARMUP_STEPS))
                progress.update(bar, advance=1, loss=f"loss {loss.item():.4f}")
            model.model = layers
            yield model


def save(model: Qwen3ForCausalLM, tokenizer: PreTrainedTokenizerFast, directory: Path) -> None:
    """Write the checkpoint in bfloat16; the model itself stays as it is."""
    rounded = deepcopy(model).to(torch.bfloat16)
    rounded.config.use_cache = rounded.generation_config.use_cache = True
    rounded.save_pretrained(directory)
    tokenizer.save_pretrained(directory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="the directory to write the checkpoint to")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args()
    began = time.monotonic()
    tokenizer = train_tokenizer(options.seed)
    for model in train(tokenizer, options.seed, torch.device(options.device)):
        save(model, tokenizer, options.out)  # after each phase: an interrupted training leaves what it came to
    tokens = sum(phase.tokens * phase.dialogues * phase.steps for phase in PHASES)
    print(f"{tokens:,} tokens on {options.device} in {time.monotonic() - began:.0f} s")


if __name__ == "__main__":
    main()
