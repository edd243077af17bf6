"""Judge a trained model on dialogues it has not seen, and write what came out into its model card.

`python -m models.card DIR` judges the checkpoint in DIR again and rewrites the table of DIR/README.md.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from rich.progress import track
from transformers import AutoModelForCausalLM, AutoTokenizer

from models.accuracy import STYLES, Judged, by_act, by_distance, held_out_dialogues, judge
from models.train_recall import CONTEXT_TOKENS

_BEGIN, _END = "<!-- measured: begin -->", "<!-- measured: end -->"
_ACTS = {
    "ask": "questions about what was told",
    "ask_corrected": "of these, about what was corrected",
    "ask_unknown": "questions about what nobody told",
    "tell": "facts confirmed",
    "correct": "corrections confirmed",
}


def judge_all(directory: Path, *, dialogues: int, seed: str) -> dict[str, list[Judged]]:
    """Every reply of held-out dialogues as long as the trained context, by style. As served: bfloat16."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(directory, dtype=torch.bfloat16).to(device)
    tokenizer = AutoTokenizer.from_pretrained(directory)
    return {
        name: [
            one
            for talk in track(
                held_out_dialogues(tokenizer, style, num_tokens=CONTEXT_TOKENS, count=dialogues, seed=seed),
                description=name,
                total=dialogues,
            )
            for one in judge(model, tokenizer, talk)
        ]
        for name, style in STYLES.items()
    }


def table(judged: dict[str, list[Judged]]) -> str:
    """Markdown: a row for each distance and each kind of turn, a column for each style."""
    styles = list(judged)
    distances = {name: by_distance(ones) for name, ones in judged.items()}
    acts = {name: by_act(ones) for name, ones in judged.items()}
    rows: list[Sequence[str]] = [
        [f"up to {far} tokens back", *(_cell(distances[name].get(far)) for name in styles)]
        for far in sorted({far for shares in distances.values() for far in shares})
    ]
    rows += [[label, *(_cell(acts[name].get(act)) for name in styles)] for act, label in _ACTS.items()]
    lines = [["exactly right", *styles], ["---", *["---:"] * len(styles)], *rows]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def _cell(share: tuple[float, int] | None) -> str:
    return "" if share is None else f"{share[0]:.1%} of {share[1]}"


def write(card: Path, measured: str) -> None:
    """Put what was measured between the card's two marks."""
    before, _, rest = card.read_text().partition(_BEGIN)
    _, found, after = rest.partition(_END)
    assert found, f"{card} has no {_BEGIN} ... {_END}"
    card.write_text(f"{before}{_BEGIN}\n{measured}\n{_END}{after}")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("directory", type=Path)
    parser.add_argument("--dialogues", type=int, default=100, help="of each style")
    parser.add_argument("--seed", default="card")
    options: Any = parser.parse_args()
    measured = table(judge_all(options.directory, dialogues=options.dialogues, seed=options.seed))
    print(measured)
    write(options.directory / "README.md", measured)


if __name__ == "__main__":
    main()
