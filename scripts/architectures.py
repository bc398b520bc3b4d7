"""Write the table of tested architectures into docs/architecture.md, from the tests.

scripts/architectures.py            write the table
scripts/architectures.py --check    end with 1 if the page's table differs
"""

from __future__ import annotations

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
PAGE = ROOT / "docs" / "architecture.md"
BEGIN, END = "<!-- tested architectures: scripts/architectures.py -->", "<!-- end of tested architectures -->"


def table(forms: dict[str, str], refused: dict[str, str], not_here: dict[str, str]) -> str:
    """Markdown rows: Hugging Face's model_type, the form of the stream that the startup probe finds, and why not."""
    rows = {name: f"| `{name}` | {form} | |" for name, form in forms.items()}
    rows |= {name: f"| `{name}` | refused | {reason} |" for name, reason in refused.items()}
    rows |= {name: f"| `{name}` | not on a CPU | {reason} |" for name, reason in not_here.items()}
    ordered = [rows[name] for name in sorted(rows)]
    return "\n".join([BEGIN, "", "| `model_type` | stream | why not |", "|---|---|---|", *ordered, "", END])


def with_table(page: str, *tables: dict[str, str]) -> str:
    """The page with the current table."""
    before, _, rest = page.partition(BEGIN)
    _, _, after = rest.partition(END)
    assert after, f"{PAGE.name} has lost its markers"
    return before + table(*tables) + after


def main() -> int:
    sys.path.insert(0, str(ROOT / "tests"))
    from helpers.family_settings import FORM
    from helpers.refused_families import NOT_HERE, REFUSED

    page = PAGE.read_text()
    wanted = with_table(page, FORM, REFUSED, NOT_HERE)
    if "--check" in sys.argv[1:]:
        return int(page != wanted)
    PAGE.write_text(wanted)
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
