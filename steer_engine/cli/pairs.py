"""`steer-engine pairs`: make contrast pairs. Nothing heavy loads before a command runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from steer_engine.errors import DerivationError

if TYPE_CHECKING:
    from steer_engine.derive.pairs import Pair


app = typer.Typer(no_args_is_help=True, help="Contrast pairs: make them from words, prompts or a model's answers.")

Out = Annotated[Path, typer.Option(help="JSONL file to write.")]
Force = Annotated[bool, typer.Option("--force", help="Replace the output file if there is one.")]
Seed = Annotated[int, typer.Option(help="Of the random choices; equal seeds give equal files.")]


@app.command()
def template(
    templates: Annotated[list[str], typer.Option("--template", help="Text with `{word}` in it; may be repeated.")],
    positive: Annotated[Path, typer.Option(help="File with a word or phrase per line.")],
    negative: Annotated[Path, typer.Option(help="The same; its n-th line stands against the n-th of the positives.")],
    out: Out,
    force: Force = False,
) -> None:
    """Put two lists of words into templates.

    Example: steer-engine pairs template --template "I feel {word} today." --positive good.txt --negative bad.txt --out
    pairs.jsonl
    """
    from steer_engine.derive.contrast_sets import from_template, read_words

    _write(from_template(templates, read_words(positive), read_words(negative)), out, force)


@app.command()
def shuffled(
    prompts: Annotated[Path, typer.Argument(help="JSONL file with `text` per line, or plain text, a prompt a line.")],
    out: Out,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Set each prompt against a permutation of its first 75 characters, as Højer et al. (ICLR 2025) do.

    Example: steer-engine pairs shuffled prompts.txt --out pairs.jsonl
    """
    from steer_engine.derive.contrast_sets import from_shuffled, read_words
    from steer_engine.derive.texts import load_texts

    if prompts.suffix == ".jsonl":
        lines = [(text.line, text.prompt + text.text) for text in load_texts(prompts)]
    else:
        lines = read_words(prompts)
    _write(from_shuffled(lines, str(prompts), seed=seed), out, force)


@app.command()
def answers(
    questions: Annotated[Path, typer.Argument(help="JSONL file with `prompt` and `answer` per line.")],
    model: Annotated[str, typer.Option(help="Path, Hugging Face id, or a packaged model.")],
    out: Out,
    samples: Annotated[int, typer.Option(min=2, max=256, help="Answers per question.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.01, max=5.0, help="Higher: answers differ more.")] = 0.8,
    chat: Annotated[bool, typer.Option("--chat", help="Ask with the model's chat template.")] = False,
    dtype: Annotated[str, typer.Option(help="The engine's dtype: auto, float32, bfloat16, float16.")] = "auto",
    max_model_len: Annotated[int, typer.Option(help="Longest question and answer in tokens; -1: what fits.")] = -1,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Let the model answer, and set its own right answers against its own wrong ones.

    Questions that it answers only rightly, or only wrongly, give no pair.
    Example: steer-engine pairs answers gsm8k.jsonl --model smollm2-135m --out pairs.jsonl
    """
    from steer_engine.derive.answers import answer_all, from_answers, load_questions

    _require_absent(out, force)
    asked = load_questions(str(questions))
    given = answer_all(
        model,
        asked,
        samples=samples,
        max_tokens=max_tokens,
        temperature=temperature,
        seed=seed,
        chat=chat,
        engine_args={"dtype": dtype, "max_model_len": max_model_len},
    )
    _write(from_answers(asked, given), out, force, f" of {len(asked)} questions")


def _require_absent(out: Path, force: bool) -> None:
    from steer_engine.cli.derive import require_absent

    require_absent(out, force=force)


def _write(pairs: Iterable[Pair], out: Path, force: bool, beside: str = "") -> None:
    from steer_engine.derive.contrast_sets import to_jsonl
    from steer_engine.vectors.storage import write_atomically

    _require_absent(out, force)
    made = list(pairs)
    if len(made) < 2:
        raise DerivationError(f"{len(made)} pair(s){beside} came out; at least 2 are needed. Nothing was written.")
    write_atomically(out, to_jsonl(made))
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"{out}: {len(made)} pairs{beside}", markup=False)
