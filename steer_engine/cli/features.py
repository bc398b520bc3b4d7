"""`steer-engine features`: the catalogue of features of a file, or of an autoencoder with explanations beside it.

NumPy and the file formats are imported inside the command, because `--help` need not wait for them.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

from steer_engine.cli.registry import new_table, print_table
from steer_engine.errors import VectorFileError

if TYPE_CHECKING:
    from steer_engine.vectors.row_set import RowSet

app = typer.Typer(
    no_args_is_help=True, help="Features of sparse autoencoders: find the numbers of those that you want to steer with."
)

MAX_SHOWN = 10_000

Entry = tuple[str, int, str]
"""Block as text (empty if the file does not say it), number of the feature, label."""


@app.command("list")
def list_features(
    path: Annotated[
        Path,
        typer.Argument(
            help="A vector file with features; or Neuronpedia's explanations (.jsonl, .jsonl.gz, .json); or the folder "
            "of an autoencoder with such a file in it, named explanations.jsonl, .jsonl.gz or .json."
        ),
    ],
    search: Annotated[
        str, typer.Option(help="Only features whose label contains all of these words, in any order and case.")
    ] = "",
    limit: Annotated[int, typer.Option(min=1, max=MAX_SHOWN, help="Most features to list.")] = 50,
) -> None:
    """List features by number, with what they stand for. The numbers are those of `vectors import --features`.

    Labels come from Neuronpedia. Its exports are files of explanations, one folder per model and autoencoder; download
    them once and give the file here, and to `vectors import --labels`.

    Examples:

    steer-engine features list explanations.jsonl.gz --search "praise"

    steer-engine features list vectors/praise.safetensors
    """
    words = search.lower().split()
    table = new_table("block", "feature", "label", folded=("label",))
    shown = 0
    for block, number, label in _entries(path):
        if all(word in label.lower() for word in words):
            if shown == limit:
                note = f"More than {limit} features match; add a word to --search, or raise --limit."
                Console(stderr=True, soft_wrap=True, highlight=False).print(note, markup=False)
                break
            table.add_row(block, str(number), Text(label))
            shown += 1
    if shown == 0:
        raise VectorFileError(f"{path}: no label contains {search!r}; try fewer or other words.")
    print_table(table)


def _entries(path: Path) -> Iterable[Entry]:
    """The labelled features of a file or folder. Raises VectorFileError, also where there are no labels."""
    from steer_engine.vectors import neuronpedia_format
    from steer_engine.vectors.files import load_any
    from steer_engine.vectors.row_set import RowSet

    if path.suffix == ".safetensors" and path.name not in ("sae_weights.safetensors", "params.safetensors"):
        rows = load_any(path)
        if not isinstance(rows, RowSet) or rows.kind != "features":
            raise VectorFileError(f"{path}: the file has no features; `steer-engine vectors show` describes it.")
        return _of_rows(rows)
    if path.is_dir() or path.suffix in (".safetensors", ".npz"):
        beside = neuronpedia_format.export_beside(path)
        if beside is None:
            raise VectorFileError(
                f"{path}: an autoencoder has no labels of its own; put Neuronpedia's explanations beside it as "
                f"{' or '.join(neuronpedia_format.EXPORTS)}."
            )
        path = beside
    return (("", number, label) for number, label in neuronpedia_format.explanations(path))


def _of_rows(rows: RowSet) -> Iterator[Entry]:
    """All features of a file; those without a label have an empty one."""
    for block in rows.blocks:
        for number in rows.numbers(block):
            yield str(block), number, rows.labels.get(block, {}).get(number, "")
