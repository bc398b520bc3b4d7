"""`steer-engine vectors`: look into control vectors, in files and on a server."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.table import Table

from steer_engine.commands.remote import DEFAULT_URL, Url
from steer_engine.commands.vector_remote import add, fetched, list_vectors, pull, remove
from steer_engine.commands.vector_tools import import_file, report
from steer_engine.errors import VectorFileError

if TYPE_CHECKING:
    from steer_engine.vectors import ControlVector

app = typer.Typer(
    no_args_is_help=True, help="Control vectors: files (safetensors and GGUF), and those of a running server."
)
app.command()(report)
app.command("import")(import_file)
for command, name in ((list_vectors, "list"), (add, "add"), (remove, "rm"), (pull, "pull")):
    app.command(name)(command)


@app.command()
def show(
    path: Annotated[
        Path, typer.Argument(help="A control-vector file, a folder of them, or the name of a vector on the server.")
    ],
    url: Url = DEFAULT_URL,
) -> None:
    """Say what a file or a vector of a server holds, block by block, or list the files of a folder.

    The dose is |v| over the mean residual norm |x|: what scale 1 adds, in parts of the stream.
    Example: steer-engine vectors show vectors/cheerful.safetensors
    """
    from steer_engine.vectors import load  # costs half a second, which help need not wait for
    from steer_engine.vectors.files import SUFFIXES

    if path.is_dir():
        _show_folder(path)
    elif path.exists() or path.suffix in SUFFIXES or len(path.parts) > 1:
        _show_file(load(path))
    else:
        _show_file(fetched(str(path), url))


def _show_folder(folder: Path) -> None:
    from steer_engine.vectors import load
    from steer_engine.vectors.files import SUFFIXES

    table = Table("name", "blocks", "D", "method", "model", "digest", title=str(folder))
    broken: list[str] = []
    for file in sorted(entry for entry in folder.iterdir() if entry.suffix in SUFFIXES):
        try:
            vector = load(file)
        except VectorFileError as error:
            broken.append(f"{file.name}: {error.message}")
            continue
        about = vector.metadata
        blocks, size = _ranges(vector.blocks), str(vector.hidden_size)
        table.add_row(file.stem, blocks, size, about.method, about.model, _short(vector.digest))
    Console().print(table)
    if broken:
        raise VectorFileError("Not usable: " + "; ".join(broken))


def _show_file(vector: ControlVector) -> None:
    console = Console(soft_wrap=True)
    about = vector.metadata
    lines = {
        "digest": vector.digest,
        "model": about.model,
        "architecture": about.architecture,
        "hidden size": str(vector.hidden_size),
        "method": about.method,
        "position": about.position,
        "data set": about.dataset_digest,
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(about.created_with.items())),
        "notes": about.notes,
    }
    for name, value in lines.items():
        if value:
            console.print(f"{name:>12}  {value}", markup=False, highlight=False)
    table = Table("block", "|v|", "mean |x|", "dose at scale 1")
    for block, norm in vector.norms.items():
        stream = about.residual_norms.get(block)
        known = ("", "") if not stream else (f"{stream:.3f}", f"{norm / stream:.1%}")
        table.add_row(str(block), f"{norm:.4f}", *known)
    console.print(table)


def _ranges(blocks: tuple[int, ...]) -> str:
    """`(8, 9, 10, 14)` as `8-10, 14`."""
    runs: list[list[int]] = []
    for block in blocks:
        if runs and block == runs[-1][1] + 1:
            runs[-1][1] = block
        else:
            runs.append([block, block])
    return ", ".join(str(first) if first == last else f"{first}-{last}" for first, last in runs)


def _short(digest: str) -> str:
    return digest[: len("sha256:") + 12]
