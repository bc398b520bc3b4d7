"""`steer-engine serve` whose responses always call one tool: the model's answer, the tool, a second answer.

vLLM's own loop (`_generate_with_builtin_tools`), driven as by a model that asks for a tool in its first turn. Tiny
models do not ask for tools, and vLLM parses the request only for models of which it knows the format.
"""

from __future__ import annotations

from typing import Any

if __name__ == "__main__":
    from vllm.entrypoints.openai.responses.context import SimpleContext

    from steer_engine.cli.main import main

    def need_builtin_tool_call(self: Any) -> bool:
        self.turns = getattr(self, "turns", 0) + 1
        return bool(self.turns == 1)

    async def call_tool(self: Any) -> list[Any]:
        return []

    SimpleContext.need_builtin_tool_call = need_builtin_tool_call  # type: ignore[method-assign]
    SimpleContext.call_tool = call_tool  # type: ignore[method-assign]
    SimpleContext.append_tool_output = lambda self, output: None  # type: ignore[method-assign]
    main()
