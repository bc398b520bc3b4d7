"""axe-core, the checker of accessibility rules, run in a page of `helpers.browser`.

It is found at `STEER_TEST_AXE` (a path of axe.min.js), or in the cache folder; otherwise npm fetches the pinned version
once. Its 650 KB are not in the repository.
"""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import tarfile
import tempfile
from functools import cache
from pathlib import Path

from helpers.browser import Page
from steer_engine.models import cache_dir
from steer_engine.vectors.storage import write_atomically

VERSION = "4.14.1"
SHA256 = "29348999450cdf2849a8e70b7912fc2da85a849da39c0d0d5394f51d4a9ed95c"

RULES = ["wcag2a", "wcag2aa", "wcag21a", "wcag21aa", "wcag22aa", "best-practice"]


@cache
def axe_source() -> str | None:
    """The script, or None if it is neither here nor can be fetched.

    Raises:
        AssertionError: the content is another one than that of the pinned version.
    """
    if given := os.environ.get("STEER_TEST_AXE"):
        return Path(given).read_text()
    kept = cache_dir() / "tests" / f"axe-core-{VERSION}.min.js"
    is_kept = kept.exists()
    content = kept.read_bytes() if is_kept else _fetch()
    if content is None:
        return None
    where = (
        f"{kept} is not axe-core {VERSION}; delete it." if is_kept else f"npm's axe-core {VERSION} has other content."
    )
    assert hashlib.sha256(content).hexdigest() == SHA256, where
    if not is_kept:
        write_atomically(kept, content)
    return content.decode()


def _fetch() -> bytes | None:
    """The script as npm has it. None if there is no npm, or no network."""
    npm = shutil.which("npm")
    if npm is None:
        return None
    with tempfile.TemporaryDirectory() as folder:
        command = [npm, "pack", f"axe-core@{VERSION}", "--pack-destination", folder, "--fetch-retries=0"]
        try:
            done = subprocess.run(command, capture_output=True, timeout=60, check=False)
        except subprocess.TimeoutExpired:  # a network that answers nothing is none
            return None
        packages = list(Path(folder).glob("*.tgz"))
        if done.returncode != 0 or not packages:
            return None
        with tarfile.open(packages[0]) as package:
            member = package.extractfile("package/axe.min.js")
            assert member is not None
            return member.read()


def violations(page: Page) -> list[str]:
    """Rules of WCAG 2.2 A and AA that the page breaks as it is shown now; only serious and critical ones."""
    source = axe_source()
    assert source is not None
    page.evaluate(f"window.axe || (() => {{ {source} }})(), 0")
    found = page.evaluate(
        f"axe.run(document, {{runOnly: {RULES}}}).then((result) => result.violations"
        ".filter((each) => ['serious', 'critical'].includes(each.impact))"
        ".map((each) => `${each.id}: ${each.nodes.map((node) => node.html).join(' | ')}`))"
    )
    return [str(each) for each in found]


def too_small(page: Page, pixels: int = 44) -> list[str]:
    """Controls that are lower than a finger needs. A checkbox counts with its label."""
    controls = "button, input:not([type=checkbox]), select, textarea, summary, label.check, [role=option]"
    found = page.each(controls, "outerHTML")
    shown, heights = page.each(controls, "checkVisibility()"), page.each(controls, "getBoundingClientRect().height")
    return [
        str(html) for html, is_shown, height in zip(found, shown, heights, strict=True) if is_shown and height < pixels
    ]
