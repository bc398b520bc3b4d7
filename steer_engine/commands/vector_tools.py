"""`steer-engine vectors report` and `vectors import`. NumPy and the formats load only when a command runs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer
from rich.console import Console

from steer_engine.errors import VectorFileError


def report(
    files: Annotated[list[Path], typer.Argument(help="Control-vector files; several are compared.")],
    out: Annotated[Path, typer.Option(help="Page or picture to write: .html or .png.")] = Path("report.html"),
    dump: Annotated[
        Path | None, typer.Option(help="Activation dump whose texts are shown as histograms along the directions.")
    ] = None,
) -> None:
    """Show norms, dose, separation and cosines by block, and where to start with blocks and scale.

    Example: steer-engine vectors report cheerful.safetensors --out report.html
    """
    from steer_engine.vectors.atomic_write import write_atomically
    from steer_engine.vectors.files import load
    from steer_engine.vectors.suggestion import shown_blocks, suggest

    if out.suffix not in (".html", ".png"):
        raise VectorFileError(f"{out}: a report's name ends in .html or .png.")
    vectors = {file.stem: load(file) for file in files}
    if len(vectors) < len(files):
        raise VectorFileError("Two of the files have the same name; a report tells vectors apart by it.")
    projections = {}
    if dump is not None:
        from steer_engine.derive.projections import project

        projections = {name: project(dump, vector, shown_blocks(vector)) for name, vector in vectors.items()}
    if out.suffix == ".html":
        from steer_engine.vectors.report import html_report

        write_atomically(out, html_report(vectors, projections).encode())
    else:
        from steer_engine.vectors.report_png import png_report

        write_atomically(out, png_report(vectors, projections))
    console = Console(soft_wrap=True, highlight=False)
    for name, vector in vectors.items():
        try:
            console.print(f"{name}: start with {suggest(vector)}", markup=False)
        except VectorFileError as error:
            console.print(f"{name}: {error.message}", markup=False)
    console.print(f"{out}: written", markup=False)


def import_file(
    path: Annotated[Path, typer.Argument(help="File of another tool (for `caa` also a folder of layers).")],
    kind: Annotated[str, typer.Option(help="gguf, caa, persona, refusal, layers, vllm-lens.")],
    out: Annotated[Path, typer.Option(help="File to write: .safetensors or .gguf.")],
    model: Annotated[str, typer.Option(help="Model that the vector was made for, to be noted in the file.")] = "",
    force: Annotated[bool, typer.Option("--force", help="Replace the output file if there is one.")] = False,
) -> None:
    """Read a vector of repeng, llama.cpp, CAA, persona vectors, refusal direction or vllm-lens, and write it as ours.

    Example: steer-engine vectors import vec_layer_13.pt --kind caa --out sycophancy.safetensors
    """
    from steer_engine.vectors.files import SUFFIXES, save
    from steer_engine.vectors.importers import import_vector

    if out.suffix not in SUFFIXES:
        raise VectorFileError(f"{out}: the output's name must end in {' or '.join(SUFFIXES)}.")
    if out.exists() and not force:
        raise VectorFileError(f"{out}: there is such a file already; choose another name, or --force to replace it.")
    vector = import_vector(path, kind, model=model)
    save(vector, out)
    Console(soft_wrap=True, highlight=False).print(
        f"{out}: blocks {list(vector.blocks)}, {vector.digest}", markup=False
    )
