"""The package keeps to the size and shape that `scripts/structure.py` measures."""

from __future__ import annotations

from pathlib import Path

import pytest
import structure


@pytest.fixture
def package(tmp_path: Path) -> Path:
    """A package with a cycle, a re-export and a module that one other imports."""
    sources = {
        "__init__.py": "def __getattr__(name):\n    from root.low import Low\n",
        "low.py": "import root\n",
        "left.py": "from root import right\n",
        "right.py": "def f():\n    from .left import f\n",
        "part/__init__.py": "from .value import Value\n",
        "part/value.py": "from root.low import Low\n",
        "part/user.py": "from root.part import Value\n",
    }
    for name, text in sources.items():
        path = tmp_path / "root" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return tmp_path / "root"


def test_the_graph_has_lazy_relative_and_reexported_imports(package: Path) -> None:
    graph = structure.import_graph(structure.modules(package))
    assert graph == {
        "root": {"root.low"},
        "root.low": {"root"},
        "root.left": {"root.right"},
        "root.right": {"root.left"},
        "root.part": {"root.part.value"},
        "root.part.value": {"root.low"},
        "root.part.user": {"root.part", "root.part.value"},
    }
    assert structure.single_importer(graph) == ["root", "root.left", "root.part", "root.right"]
    assert structure.cycles(graph) == [["root.left", "root.right"]]


def test_a_number_above_its_target_is_marked() -> None:
    assert "EXCEEDED" in str(structure.Measurement("modules", 131, 130))
    assert not structure.Measurement("modules", 130, 130).exceeded
    assert not structure.Measurement("lines", 10**6).exceeded


def test_steer_engine_keeps_to_its_targets() -> None:
    assert [str(each) for each in structure.measure(structure.PACKAGE) if each.exceeded] == []
