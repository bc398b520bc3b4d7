"""`steer-engine vectors`: files of control vectors, and the vectors of a running server.

NumPy and the file formats are imported inside the commands, because that takes half a second that `--help` need not
wait for.
"""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich.console import Console
from rich.text import Text

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
from steer_engine.site import Site

if TYPE_CHECKING:
    from rich.table import Table

    from steer_engine.vectors import ControlVector
    from steer_engine.vectors.files import AnyVector
    from steer_engine.vectors.row_set import RowSet

app = typer.Typer(
    no_args_is_help=True,
    help="Control vectors, features and low-rank edits: files (safetensors and GGUF), those of a running server, and "
    "those in repositories of the Hugging Face hub.",
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

    Features and low-rank edits get a table of their rows.

    Example: steer-engine vectors report cheerful.safetensors --out report.html
    """
    from steer_engine.vectors import ControlVector
    from steer_engine.vectors.files import load_any
    from steer_engine.vectors.report import html_report
    from steer_engine.vectors.storage import write_atomically
    from steer_engine.vectors.suggestion import shown_blocks, suggest

    if out.suffix != ".html":
        raise VectorFileError(f"{out}: the name of a report must end in .html.")
    vectors = {file.stem: load_any(file) for file in files}
    if len(vectors) < len(files):
        raise VectorFileError("Two of the files have the same stem. A report uses stems as names; rename one.")
    directions = {name: vector for name, vector in vectors.items() if isinstance(vector, ControlVector)}
    projections = {}
    if dump is not None:
        from steer_engine.derive.dump_fitter import project

        projections = {name: project(dump, vector, shown_blocks(vector)) for name, vector in directions.items()}
    write_atomically(out, html_report(vectors, projections).encode())
    console = Console(soft_wrap=True, highlight=False)
    for name, vector in directions.items():
        try:
            console.print(f"{name}: start with {suggest(vector)}", markup=False)
        except VectorFileError as error:
            console.print(f"{name}: {error.message}", markup=False)
    console.print(f"{out}: written", markup=False)


@app.command("import")
def import_file(
    path: Annotated[Path, typer.Argument(help="File of another tool, or a folder of files.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors, or .gguf for a control vector.")],
    kind: Annotated[
        str,
        typer.Option(
            help="Kind of file: gguf, caa, persona, refusal, layers, vllm-lens, neuronpedia, steering-lite, saelens, "
            "gemma-scope, reft or axbench. auto tells it by content, except caa files, persona, refusal and layers."
        ),
    ] = "auto",
    features: Annotated[
        str,
        typer.Option(help="Features to take from a dictionary, by number: 12,345,16000. For axbench: concepts."),
    ] = "",
    block: Annotated[
        int | None, typer.Option(help="Block at whose output the features read, where the files do not say it.")
    ] = None,
    part: Annotated[
        int | None, typer.Option(help="Which intervention, from 0, where a block of a reft folder has several.")
    ] = None,
    labels: Annotated[
        Path | None,
        typer.Option(help="Neuronpedia's explanations (.jsonl, .jsonl.gz or .json), to label the features."),
    ] = None,
    model: Annotated[str, typer.Option(help="Model that the vector was derived on, for the file's metadata.")] = "",
    force: Annotated[
        bool,
        typer.Option("--force", help="Replace the output file if it exists, and ignore unknown keys of a GGUF file."),
    ] = False,
) -> None:
    """Import a vector, features of a sparse autoencoder (SAE), or a low-rank edit (ReFT) of another tool.

    Only the rows of the features that you name are read, whatever the size of the dictionary. Nothing in a file is
    executed.

    Examples:

    steer-engine vectors import vec_layer_13.pt --kind caa --out sycophancy.safetensors

    steer-engine vectors import layer_20/width_16k/average_l0_71/params.npz --features 1041,7 --out f.safetensors

    steer-engine vectors import my_sae/ --features 12 --labels explanations.jsonl.gz --out praise.safetensors

    steer-engine vectors import my_reft/ --out reft.safetensors
    """
    from steer_engine.vectors.importers import Choice, import_vector

    _check_output(out, force)
    choice = Choice(features=feature_numbers(features), block=block, part=part, labels=labels)
    vector = import_vector(path, kind, model=model, keys="ignored" if force else "understood", choice=choice)
    _save(vector, out)
    Console(soft_wrap=True, highlight=False).print(vector.metadata.notes, markup=False)


def feature_numbers(text: str) -> tuple[int, ...]:
    """`"12,345"` as numbers. Raises VectorFileError."""
    parts = [part.strip() for part in text.split(",")] if text.strip() else []
    if not all(part.isascii() and part.isdecimal() and len(part) <= 10 for part in parts):
        raise VectorFileError(f"--features {text[:80]!r} are not numbers with commas between them, such as 12,345.")
    return tuple(map(int, parts))


@app.command()
def export(
    path: Annotated[Path, typer.Argument(metavar="FILE", help="A .safetensors or .gguf file.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="Folder to write (saelens, reft), or file (neuronpedia).")],
    kind: Annotated[str, typer.Option(help="For which tool: saelens, reft or neuronpedia.")],
    force: Annotated[bool, typer.Option("--force", help="Replace what is there.")] = False,
) -> None:
    """Write a file for another tool: features for SAELens, low-rank edits for pyreft, one direction for Neuronpedia.

    Example: steer-engine vectors export praise.safetensors praise_sae/ --kind saelens
    """
    from steer_engine.vectors import neuronpedia_format, reft_format, sae_formats
    from steer_engine.vectors.files import load_any, noun
    from steer_engine.vectors.row_set import RowSet

    if kind not in ("saelens", "reft", "neuronpedia"):
        raise VectorFileError(f"There is no kind {kind[:64]!r} to export to; valid are saelens, reft, neuronpedia.")
    if out.exists() and not force:
        raise VectorFileError(f"{out}: it exists; choose another name, or replace it with --force.")
    vector = load_any(path)
    if isinstance(vector, RowSet) == (kind == "neuronpedia"):
        raise VectorFileError(f"{path}: it is {noun(vector)}, which {kind} has no place for.")
    if isinstance(vector, RowSet):
        (sae_formats.save_saelens if kind == "saelens" else reft_format.save_reft)(vector, out)
    else:
        neuronpedia_format.save(vector, out)
    Console(soft_wrap=True, highlight=False).print(f"{out}: written for {kind}", markup=False)


@app.command()
def convert(
    path: Annotated[Path, typer.Argument(metavar="IN", help="A control-vector file: .safetensors or .gguf.")],
    out: Annotated[Path, typer.Argument(metavar="OUT", help="File to write: .safetensors or .gguf.")],
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if it exists.")] = False,
) -> None:
    """Convert a vector's file from safetensors to GGUF, or back. Content and metadata stay the same.

    GGUF has no place for features and low-rank edits; `vectors export` writes these for other tools.

    Example: steer-engine vectors convert cheerful.safetensors cheerful.gguf
    """
    from steer_engine.vectors import gguf_format
    from steer_engine.vectors.files import load_any

    _check_output(out, force)
    vector = gguf_format.load(path, keys="understood") if path.suffix == ".gguf" else load_any(path)
    _save(vector, out)
    if vector.metadata.notes:
        Console(soft_wrap=True, highlight=False).print(vector.metadata.notes, markup=False)


def _check_output(out: Path, force: bool) -> None:
    from steer_engine.vectors.files import SUFFIXES

    if out.suffix not in SUFFIXES:
        raise VectorFileError(f"{out}: the name of the output must end in {' or '.join(SUFFIXES)}.")
    if out.exists() and not force:
        raise VectorFileError(f"{out}: the file exists; choose another name, or replace it with --force.")


def _save(vector: AnyVector, out: Path) -> None:
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

    Features and low-rank edits are shown row by row. Of a control vector, the dose is |v| over the mean
    residual norm |x|: the size of the edit at scale 1, relative to the stream.
    Example: steer-engine vectors show vectors/cheerful.safetensors
    """
    from steer_engine.vectors.files import SUFFIXES, load_any

    if path.is_dir():
        _show_folder(path)
    elif path.exists() or path.suffix in SUFFIXES or len(path.parts) > 1:
        _show_file(load_any(path))
    else:
        _show_file(fetched(str(path), url))


@app.command()
def push(
    file: Annotated[Path, typer.Argument(help="A vector file, safetensors or GGUF.")],
    address: Annotated[str, typer.Argument(help="hf://OWNER/REPO/FILE, or hf://OWNER/REPO for the file's own name.")],
    public: Annotated[
        bool, typer.Option("--public", help="If the repository is made now, let everybody read it.")
    ] = False,
    force: Annotated[bool, typer.Option("--force", help="Replace a file with other content.")] = False,
) -> None:
    """Upload a vector to a repository of the Hugging Face hub. A repository that does not exist is made, private.

    The file is checked first. HF_TOKEN must be a token that may write (or run `hf auth login`).

    Example: steer-engine vectors push cheerful.safetensors hf://OWNER/vectors
    """
    from steer_engine.vectors import hub

    target, is_uploaded = hub.push(file, address, public=public, replace=force)
    typer.echo(f"{target}{'' if is_uploaded else ': the same content is there already'}")


for command, name in ((list_vectors, "list"), (add, "add"), (remove_vector, "rm"), (pull, "pull")):
    app.command(name)(command)


def _show_folder(folder: Path) -> None:
    from steer_engine.vectors.files import SUFFIXES, load_any
    from steer_engine.vectors.row_set import RowSet

    columns = ("name", "kind", "blocks", "D", "method", "model", "digest")
    table = new_table(*columns, folded=("name", "kind", "blocks", "method", "model"), title=str(folder))
    broken: list[str] = []
    for file in sorted(entry for entry in folder.iterdir() if entry.suffix in SUFFIXES):
        try:
            vector = load_any(file)
        except VectorFileError as error:
            broken.append(f"{file.name}: {error.message}")
            continue
        about = vector.metadata
        kind = f"{vector.num_rows} rows, {vector.kind}" if isinstance(vector, RowSet) else "directions"
        blocks, size = block_ranges(vector.blocks), str(vector.hidden_size)
        table.add_row(file.stem, kind, blocks, size, about.method, about.model, short_digest(vector.digest))
    print_table(table)
    if broken:
        raise VectorFileError("Not usable: " + "; ".join(broken))


def _show_file(vector: AnyVector) -> None:
    from steer_engine.vectors.row_set import RowSet

    console = Console(soft_wrap=True)
    about = vector.metadata
    lines = {
        "digest": vector.digest,
        "kind": vector.kind if isinstance(vector, RowSet) else "",
        "model": about.model,
        "architecture": about.architecture,
        "hidden size": str(vector.hidden_size),
        "method": about.method,
        "position": about.position,
        "site": "" if about.site is Site.BLOCK else about.site.value,
        "data set": about.dataset_digest,
        "condition": "" if about.condition is None else str(about.condition),
        "probe": "" if about.probe is None else str(about.probe),
        "made with": ", ".join(f"{name} {version}" for name, version in sorted(about.created_with.items())),
        "notes": about.notes,
    }
    for name, value in lines.items():
        if value:
            console.print(f"{name:>12}  {value}", markup=False, highlight=False)
    print_table(_table_of_rows(vector) if isinstance(vector, RowSet) else _table_of_directions(vector))


def _table_of_directions(vector: ControlVector) -> Table:
    table = new_table("block", "|v|", "mean |x|", "dose at scale 1")
    for block, norm in vector.norms.items():
        stream = vector.metadata.residual_norms.get(block)
        known = ("", "") if not stream else (f"{stream:.3f}", f"{norm / stream:.1%}")
        table.add_row(str(block), f"{norm:.4f}", *known)
    return table


def _table_of_rows(rows: RowSet) -> Table:
    """Of features one line each; of a low-rank edit one line per block."""
    from steer_engine.vectors.report import row_figures

    if rows.kind == "low_rank":
        table = new_table("block", "rank", "off from orthonormal R")
        for block in rows.blocks:
            table.add_row(str(block), str(rows.count(block)), f"{rows.orthonormality_error(block):.2g}")
        return table
    heads, lines = row_figures(rows)
    table = new_table(*heads, folded=("label",))
    for line in lines:
        table.add_row(*(Text(cell) for cell in line))
    return table
