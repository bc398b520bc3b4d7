"""`steer-engine pairs`: make contrast pairs. Nothing heavy loads before a command runs."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.console import Console

from steer_engine.cli.checks import check_model
from steer_engine.cli.derive import Force, parsed_blocks, say, summary
from steer_engine.cli.engine_options import Chat, EngineChoice, ModelOption, starts_engine
from steer_engine.errors import DerivationError

if TYPE_CHECKING:
    from steer_engine.derive import Pair

app = typer.Typer(no_args_is_help=True, help="Contrast pairs: make them from words, prompts or a model's answers.")

Out = Annotated[Path, typer.Option(help="JSONL file to write.")]
Seed = Annotated[int, typer.Option(help="Seed of the random choices. Equal seeds give equal files.")]


@app.command()
def template(
    templates: Annotated[list[str], typer.Option("--template", help="Text that contains `{word}`; may be repeated.")],
    positive: Annotated[Path, typer.Option(help="File with a word or phrase per line.")],
    negative: Annotated[Path, typer.Option(help="File with as many; the n-th words of both files are contrasted.")],
    out: Out,
    force: Force = False,
) -> None:
    """Insert two lists of words into templates.

    Example: steer-engine pairs template --template "I feel {word} today." --positive good.txt --negative bad.txt --out
    pairs.jsonl
    """
    from steer_engine.derive.make_pairs import from_template, read_words

    _write(from_template(templates, read_words(positive), read_words(negative)), out, force)


@app.command()
def shuffled(
    prompts: Annotated[Path, typer.Argument(help="JSONL file with `text` per line, or plain text, a prompt a line.")],
    out: Out,
    seed: Seed = 0,
    force: Force = False,
) -> None:
    """Contrast each prompt with a permutation of its first 75 characters, as Højer et al. (ICLR 2025) do.

    Example: steer-engine pairs shuffled prompts.txt --out pairs.jsonl
    """
    from steer_engine.derive import load_texts
    from steer_engine.derive.make_pairs import from_shuffled, read_words

    if prompts.suffix == ".jsonl":
        lines = [(text.line, text.prompt + text.text) for text in load_texts(prompts)]
    else:
        lines = read_words(prompts)
    _write(from_shuffled(lines, str(prompts), seed=seed), out, force)


@app.command()
@starts_engine
def answers(
    questions: Annotated[Path, typer.Argument(help="JSONL file with `prompt` and `answer` per line.")],
    model: ModelOption,
    out: Out,
    samples: Annotated[int, typer.Option(min=2, max=256, help="Answers per question.")] = 8,
    max_tokens: Annotated[int, typer.Option(min=1, help="Longest answer.")] = 256,
    temperature: Annotated[float, typer.Option(min=0.01, max=5.0, help="Higher: answers differ more.")] = 0.8,
    chat: Chat = False,
    seed: Seed = 0,
    vector: Annotated[
        Path | None,
        typer.Option(
            help="Control vector to derive from the pairs, captured while the model answers: .safetensors, .gguf."
        ),
    ] = None,
    method: Annotated[str, typer.Option(help="Method of the vector, as in `derive`.")] = "diffmean",
    blocks: Annotated[str, typer.Option(help="Blocks of the vector, as in `derive`.")] = "all",
    position: Annotated[
        str,
        typer.Option(
            help="Row of an answer for the vector: `last` chose its last token, `mean` is the mean of the rows that "
            "chose its tokens."
        ),
    ] = "last",
    force: Force = False,
    *,
    engine: EngineChoice,
) -> None:
    """Let the model answer, and contrast its own correct answers with its own wrong ones.

    A question whose answers are all correct, or all wrong, gives no pair.
    Example: steer-engine pairs answers gsm8k.jsonl --model smollm2-135m --out pairs.jsonl --vector right.safetensors
    """
    from steer_engine.derive.derivation import require_absent, require_writable
    from steer_engine.derive.make_pairs import answer_all, from_answers, load_questions

    require_absent(out, force=force)
    if vector is not None:
        require_writable(vector, force=force, blocks=parsed_blocks(blocks), remedy="Leave it out with --blocks")
    elif (method, blocks, position) != ("diffmean", "all", "last"):
        raise DerivationError("--method, --blocks and --position are of the vector; name its file with --vector.")
    loaded = load_questions(str(questions))
    check_model(model)
    settings: dict[str, Any] = {
        "samples": samples,
        "max_tokens": max_tokens,
        "temperature": temperature,
        "seed": seed,
        "chat": chat,
        "engine_args": engine.engine_args,
    }
    suffix = f" of {len(loaded)} questions"
    if vector is None:
        _write(from_answers(loaded, answer_all(model, loaded, **settings)), out, force, suffix)
        return
    from steer_engine.derive.own_answers import derive_from_answers
    from steer_engine.vectors.files import save

    settings |= {"method": method, "blocks": blocks, "position": position, "source": str(questions)}
    made, derived = derive_from_answers(model, loaded, **settings)
    _write(made, out, force, suffix)
    save(derived, vector)
    say(summary(vector, derived))


def _write(pairs: Iterable[Pair], out: Path, force: bool, suffix: str = "") -> None:
    from steer_engine.derive.derivation import require_absent
    from steer_engine.derive.make_pairs import to_jsonl
    from steer_engine.vectors.storage import write_atomically

    require_absent(out, force=force)
    made = list(pairs)
    if len(made) < 2:
        raise DerivationError(f"{len(made)} pair(s){suffix} resulted; at least 2 are needed. Nothing was written.")
    write_atomically(out, to_jsonl(made))
    Console(stderr=True, soft_wrap=True, highlight=False).print(f"{out}: {len(made)} pairs{suffix}", markup=False)
