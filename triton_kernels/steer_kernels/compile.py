"""Compile kernels ahead of time for a GPU that this machine need not have, exactly as a launch would.

The compiled artifact says what the hardware will be asked to do: widths of loads and stores, registers, spills.
"""

from __future__ import annotations

from typing import Any, Final

from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource, CompiledKernel
from triton.compiler import compile as triton_compile
from triton.runtime.jit import JITFunction

TARGETS: Final[dict[str, GPUTarget]] = {
    "sm_80": GPUTarget("cuda", 80, 32),
    "sm_90": GPUTarget("cuda", 90, 32),
    "sm_100": GPUTarget("cuda", 100, 32),
    "gfx942": GPUTarget("hip", "gfx942", 64),
}


def compile_for(
    target: str,
    kernel: JITFunction[Any],
    types: dict[str, str],
    constants: dict[str, Any],
    options: dict[str, int | bool],
) -> CompiledKernel:
    """types: the arguments that aren't constants, in Triton's spelling ("*bf16", "i32").

    Pointers get the divisibility by 16 bytes that the JIT would find at a launch, since torch allocates at 512.
    """
    names = kernel.arg_names
    signature = {name: types.get(name, "constexpr") for name in names}
    aligned = {(i,): [["tt.divisibility", 16]] for i, name in enumerate(names) if signature[name].startswith("*")}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=aligned)
    return triton_compile(source, target=TARGETS[target], options=options)
