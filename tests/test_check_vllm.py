"""The check of a vLLM release by its source: the installed one passes, differences are reported."""

from __future__ import annotations

import ast
from collections.abc import Iterator
from pathlib import Path

import check_vllm
import pytest

from steer_engine.vllm.patching import Symbol


def test_the_installed_vllm_is_known_by_its_source() -> None:
    from steer_engine.vllm.examination import all_symbols

    source = check_vllm.installed()
    symbols = all_symbols()
    assert len(symbols) > 40
    assert check_vllm.problems(symbols, source.read) == []
    assert check_vllm.changed_bodies(symbols, source, source) == []


def test_every_import_of_vllm_is_on_a_list() -> None:
    """An import that is on no list would break with a new vLLM without a clear message."""
    from steer_engine.vllm.examination import all_symbols

    known = {symbol.path for symbol in all_symbols()}
    files = sorted((Path(__file__).resolve().parents[1] / "steer_engine").rglob("*.py"))
    found = {name: file.name for file in files for name in imported_from_vllm(ast.parse(file.read_text()))}
    assert len(found) >= 25
    unknown = {name: file for name, file in found.items() if not any(is_under(path, name) for path in known)}
    assert unknown == {}


def is_under(path: str, imported: str) -> bool:
    """Whether a symbol's path is the imported name, a part of it, or inside it if it is a module."""
    return f"{path}.".startswith(f"{imported}.") or path.startswith(f"{imported.replace(':', '.')}:")


def imported_from_vllm(tree: ast.AST) -> Iterator[str]:
    """`module:name` of each runtime import. Imports for type checkers are left out."""
    for node in ast.iter_child_nodes(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            continue
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("vllm."):
            for each in node.names:
                yield f"{node.module}:{each.name}"
        yield from imported_from_vllm(node)


SOURCES = {
    "lib/__init__.py": "from lib.inner import Base as Public\nfrom .free import *\n",
    "lib/free.py": "def reduce(rows): ...\n",
    "lib/inner.py": "from other import Far\nclass Model(Far): ...\n"
    "class Root:\n    def run(self, a, *, b): ...\nclass Base(Root):\n    size: int = 3\n",
}


@pytest.mark.parametrize(
    ("path", "parameters", "problem"),
    [
        ("lib.inner:Base.run", ("a", "b"), None),
        ("lib.inner:Model.__init__", (), None),
        ("lib.inner:Model.run", (), "lib.inner:Model.run is missing"),
        ("lib:Public.run", ("b",), None),
        ("lib:Public.size", (), None),
        ("lib:Public.run", ("c",), "lib:Public.run has no parameter c"),
        ("lib:Public.walk", (), "lib:Public.walk is missing"),
        ("lib:reduce", ("rows",), None),
        ("lib:reduces", (), "lib:reduces is missing"),
        ("lib.outer:Public", (), "lib.outer:Public is missing"),
        ("lib:Public.size", ("a",), "lib:Public.size is not a function"),
    ],
)
def test_differences_are_named(path: str, parameters: tuple[str, ...], problem: str | None) -> None:
    assert check_vllm.problem_of(Symbol(path, parameters), SOURCES.get) == problem


CHAT = Symbol("lib.chat:Chat.stream", ("model",))
OLD = {
    "lib/__init__.py": "",
    "lib/chat.py": "class Base:\n    def stream(self, model):\n        'Says.'\n        return [model]\n"
    "class Chat(Base): ...\ndef free(): return 1\n",
    "lib/known.py": "from lib.chat import Chat\nclass Known(Chat):\n    def stream(self, model): return []\n",
}
NEW = {
    **OLD,
    "lib/far.py": "from lib.known import Known as Parent\n",
    "lib/other.py": "from lib.far import Parent\nclass Other(Parent[int]):\n    async def stream(self): return []\n"
    "class Alone:\n    def stream(self): return []\n",
}


def source_of(texts: dict[str, str]) -> check_vllm.Source:
    return check_vllm.Source(name="lib", files=tuple(texts), read=texts.get)


def test_classes_that_redefine_a_method_are_listed() -> None:
    """Through another module, an alias and a class between. A class of another line may use the name."""
    known = check_vllm.redefinitions([CHAT], source_of(OLD))
    assert known == {"lib.known:Known.stream"}
    assert check_vllm.redefinitions([CHAT], source_of(NEW)) - known == {"lib.other:Other.stream"}
    assert check_vllm.redefinitions([Symbol("lib.chat:free"), Symbol("lib.chat:Chat")], source_of(NEW)) == set()


@pytest.mark.parametrize(
    ("change", "changed"),
    [
        (("'Says.'", "'Says it.'  # better"), []),
        (("[model]", "(\n            [model]\n        )"), []),
        (("return [model]", "return [model, 1]"), ["lib.chat:Chat.stream"]),
        (("(self, model)", "(self, model, more=1)"), ["lib.chat:Chat.stream"]),
    ],
)
def test_another_body_is_reported_and_another_comment_is_not(change: tuple[str, str], changed: list[str]) -> None:
    new = {**OLD, "lib/chat.py": OLD["lib/chat.py"].replace(*change)}
    assert new["lib/chat.py"] != OLD["lib/chat.py"]
    assert check_vllm.changed_bodies([CHAT], source_of(OLD), source_of(new)) == changed


IN_BOTH = {
    # Calls the base class's.
    "vllm.v1.core.sched.diffusion_scheduler:DiffusionAsyncScheduler.schedule",
    # An engine of an encoder alone is refused.
    "vllm.v1.worker.mm_encoder_model_runner:MMEncoderModelRunner._dummy_run",
    "vllm.v1.worker.mm_encoder_model_runner:MMEncoderModelRunner.execute_model",
}
UP_TO_0_32 = {
    # Calls the base class's.
    "vllm.v1.core.sched.async_scheduler:AsyncScheduler._update_request_with_output",
}
SINCE_0_33 = {
    # Copies the model from the base class's chunks, which have the name that was asked (tests/servers/test_presets.py).
    "vllm.entrypoints.anthropic.serving:AnthropicServingMessages.chat_completion_stream_generator",
    # An endpoint that refuses steering.
    "vllm.entrypoints.cohere.serving:CohereServingChatV2.chat_completion_stream_generator",
}


def test_redefinitions_in_the_installed_vllm_are_known() -> None:
    from steer_engine.vllm.examination import all_symbols

    found = check_vllm.redefinitions(all_symbols(), check_vllm.installed())
    assert found in (IN_BOTH | UP_TO_0_32, IN_BOTH | SINCE_0_33)
