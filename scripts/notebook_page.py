"""Make docs/notebook.md and its pictures from the notebook in `examples/`, as it was last executed.

    scripts/notebook_page.py              write the page and the pictures
    scripts/notebook_page.py --execute    first run the notebook and store it with its outputs: three minutes

Every change of the notebook needs it: a test compares them.
"""

from __future__ import annotations

import argparse
import base64
import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
NOTEBOOK = ROOT / "examples" / "derive_and_measure.ipynb"
DOCS = ROOT / "docs"
PAGE = DOCS / "notebook.md"

MARK = "<!-- not run: a cell of the notebook, which tests/test_notebook.py runs -->"
CELL_SECONDS = 900


def execute(notebook: Any) -> Any:
    """The notebook with the outputs of a run in a kernel and a folder of its own, without standard error: progress."""
    import nbformat
    from nbclient import NotebookClient

    made = nbformat.reads(json.dumps(notebook), as_version=4)
    # The kernel imports what this process imports. The KV cache has the size that a reader's would have.
    kept = {name: value for name, value in os.environ.items() if name != "VLLM_CPU_KVCACHE_SPACE"}
    environment = kept | {"PYTHONPATH": os.pathsep.join(path for path in sys.path if path)}
    with tempfile.TemporaryDirectory() as folder:
        resources = {"metadata": {"path": folder}}
        client = NotebookClient(made, timeout=CELL_SECONDS, resources=resources, record_timing=False)
        client.execute(env=environment)
    cells = json.loads(nbformat.writes(made))["cells"]
    for cell in cells:
        cell["outputs"] = [output for output in cell.get("outputs", []) if not _is_log_of_torch(output)]
        if cell["cell_type"] != "code":
            del cell["outputs"]
    return notebook | {"cells": cells}  # without the versions of this machine


def _is_log_of_torch(output: Any) -> bool:
    """Lines of its C++ code, which `%%capture` does not hide. Other errors and warnings are kept, and fail the test."""
    lines = "".join(output.get("text", "")).splitlines()
    return output.get("name") == "stderr" and all(line.startswith("[W") for line in lines)


def page_of(notebook: Any) -> tuple[str, dict[str, bytes]]:
    """The page, and its pictures by name. What cells write to standard error is left out: it is their progress."""
    parts, pictures = [], {}
    for cell in notebook["cells"]:
        text = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            parts.append(text.replace("](../docs/", "]("))
            continue
        parts.append(f"{MARK}\n```python\n{text.removeprefix('%%capture').strip().removesuffix(';')}\n```")
        for output in cell["outputs"]:
            if "image/png" in (data := output.get("data", {})):
                name = f"notebook_{cell['id']}.png".replace("-", "_")
                pictures[name] = base64.b64decode("".join(data["image/png"]))
                parts.append(f"![{cell['metadata']['alt']}](images/{name})")
            elif printed := printed_text(output):
                parts.append(f"```text\n{printed}\n```")
    return "\n\n".join(parts) + "\n", pictures


def printed_text(output: Any) -> str:
    """What an output prints or shows as text."""
    if output.get("name") == "stderr":
        return ""
    return "".join(output.get("text", output.get("data", {}).get("text/plain", ""))).strip("\n")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--execute", action="store_true", help="run the notebook first, and store it")
    notebook = json.loads(NOTEBOOK.read_text())
    if parser.parse_args().execute:
        notebook = execute(notebook)
        NOTEBOOK.write_text(json.dumps(notebook, indent=1, ensure_ascii=False) + "\n")
    page, pictures = page_of(notebook)
    PAGE.write_text(page)
    for name, picture in pictures.items():
        (DOCS / "images" / name).write_bytes(picture)
    print(f"{PAGE.relative_to(ROOT)} and {len(pictures)} pictures")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
