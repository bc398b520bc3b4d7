"""`steer-engine vectors`: files of control vectors, and the vectors of a running server.

NumPy and the file formats are imported inside the commands, because that takes half a second that `--help` need not
wait for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console

from steer_engine.cli.registry import (
    DEFAULT_URL,
    Url,
    add,
    fetched,
    list_vectors,
    new_table,
    print_table,
    pull,
    remove_vector,
    short_digest,
)
from steer_engine.errors import VectorFileError
from steer_engine.fields import block_ranges

if TYPE_CHECKING:
    from steer_engine.vectors import ControlVector

app = typer.Typer(
    no_args_is_help=True, help="Control vectors: files (safetensors and GGUF), and the vectors of a running server."
)


@app.command()
def report(
    files: Annotated[list[Path], typer.Argument(help="Control-vector files. Several vectors are compared.")],
    out: Annotated[Path, typer.Option(help="HTML page to write.")] = Path("report.html"),
    dump: Annotated[
        Path | None, typer.Option(help="Activation dump, to show histograms of its texts along the directions.")
    ] = None,
) -> None:
    """Write a report about norms, dose, separation and cosines by block, and suggest blocks and a scale.

    Example: steer-engine vectors report cheerful.safetensors --out report.html
    """
    from steer_engine.vectors.files import load
    from steer_engine.vectors.report import html_report
    from steer_engine.vectors.storage import write_atomically
    from steer_engine.vectors.suggestion import shown_blocks, suggest

    if out.suffix != ".html":
        raise VectorFileError(f"{out}: the name of a report must end in .html.")
    vectors = {file.stem: load(file) for file in files}
    if len(vectors) < len(files):
        raise VectorFileError("Two of the files have the same stem. A report uses stems as names; rename one.")
    projections = {}
    if dump is not None:
        from steer_engine.derive.dump_fitter import project

        projections = {name: project(dump, vector, shown_blocks(vector)) for name, vector in vectors.items()}
    write_atomically(out, html_report(vectors, projections).encode())
    console = Console(soft_wrap=True, highlight=False)
    for name, vector in vectors.items():
        try:
            console.print(f"{name}: start with {suggest(vector)}", markup=False)
        except VectorFileError as error:
            console.print(f"{name}: {error.message}", markup=False)
    console.print(f"{out}: written", markup=False)


@app.command("import")
def import_file(
    path: Annotated[Path, typer.Argument(help="File of another tool. For `caa` also a folder of files.")],
    kind: Annotated[str, typer.Option(help="Kind of file: gguf, caa, persona, refusal, layers or vllm-lens.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors or .gguf.")],
    model: Annotated[str, typer.Option(help="Model that the vector was derived on, for the file's metadata.")] = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the output file if it exists, and ignore unknown keys of a GGUF file."),
    ] = False,
) -> None:
    """Import a vector of repeng, llama.cpp, GLP, CAA, persona vectors, refusal direction or vllm-lens.

    Example: steer-engine vectors import vec_layer_13.pt --kind caa --out sycophancy.safetensors
    """
    from steer_engine.vectors.importers import import_vector

    _check_output(out, force)
    vector = import_vector(path, kind, model=model, keys="ignored" if force else "understood")
    _save(vector, out)
    Console(soft_wrap=True, highlight=False).print(vector.metadata.notes, markup=False)


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(metavar="IN", help="A control-vector file: .safetensors or .gguf.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .safetensors or .gguf.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")] = False,
) -> None:
    """Convert a vector's file from safetensors to GGUF, or back. Content and metadata stay the same.

    Example: steer-engine vectors convert cheerful.safetensors cheerful.gguf
    """
    from steer_engine.vectors import gguf_format
    from steer_engine.vectors.files import load

    _check_output(out, force)
    vector = gguf_format.load(path, keys="understood") if path.suffix == ".gguf" else load(path)
    _save(vector, out)
    if vector.metadata.notes:
        Console(soft_wrap=True, highlight=False).print(vector.metadata.notes, markup=False)


def _check_output(out: Path, force: bool) -> None:
    from steer_engine.vectors.files import SUFFIXES

    if out.suffix not in SUFFIXES:
        raise VectorFileError(f"{out}: the name of the output must end in {' or '.join(SUFFIXES)}.")
    if out.exists() and not force:
        raise VectorFileError(f"{out}: the file exists; choose another name, or replace it with --force.")


def _save(vector: ControlVector, out: Path) -> None:
    from steer_engine.vectors.files import save

    save(vector, out)
    Console(soft_wrap=True, highlight=False).print(
        f"{out}: blocks {block_ranges(vector.blocks)}, {vector.digest}", markup=False
    )


@app.command()
def show(
    path: Annotated[
        Path,
        typer.Argument(help="A control-vector file, a folder of files, or the name of a vector on the server."),
    ],
    url: Url = DEFAULT_URL,
) -> None:
    """Describe a file or a vector of a server, block by block, or list the files of a folder.

    The dose is |v| over the mean residual norm |x|: the size of the edit at scale 1, relative to the stream.
    Example: steer-engine vectors show vectors/cheerful.safetensors
    """
    from steer_engine.vectors import load
    from steer_engine.vectors.files import SUFFIXES

    if path.is_dir():
        _show_folder(path)
    elif path.exists() or path.suffix in SUFFIXES or len(path.parts) > 1:
        _show_file(load(path))
    else:
        _show_file(fetched(str(path), url))


for command, name in ((list_vectors, "list"), (add, "add"), (remove_vector, "rm"), (pull, "pull")):
    app.command(name)(command)


def _show_folder(folder: Path) -> None:
    from steer_engine.vectors import load
    from steer_engine.vectors.files import SUFFIXES

    columns = ("name", "blocks", "D", "method", "model", "digest")
    table = new_table(*columns, folded=("name", "blocks", "method", "model"), title=str(folder))
    broken: list[str] = []
    for file in sorted(entry for entry in folder.iterdir() if entry.suffix in SUFFIXES):
        try:
            vector = load(file)
        except VectorFileError as error:
            broken.append(f"{file.name}: {error.message}")
            continue
        about = vector.metadata
        blocks, size = block_ranges(vector.blocks), str(vector.hidden_size)
        table.add_row(file.stem, blocks, size, about.method, about.model, short_digest(vector.digest))
    print_table(table)
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
        "condition": "" if about.condition is None else str(about.condition),
        "probe": "" if about.probe is None else str(about.probe),
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(about.created_with.items())),
        "notes": about.notes,
    }
    for name, value in lines.items():
        if value:
            console.print(f"{name:>12}  {value}", markup=False, highlight=False)
    table = new_table("block", "|v|", "mean |x|", "dose at scale 1")
    for block, norm in vector.norms.items():
        stream = about.residual_norms.get(block)
        known = ("", "") if not stream else (f"{stream:.3f}", f"{norm / stream:.1%}")
        table.add_row(str(block), f"{norm:.4f}", *known)
    print_table(table)
