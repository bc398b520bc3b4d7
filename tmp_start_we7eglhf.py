import sys

from vllm.plugins import load_general_plugins

load_general_plugins()
from vllm.utils.import_utils import get_triton_kernels_version, has_triton_kernels

has_triton_kernels()
found = sys.modules.get("triton_kernels")
print("none" if found is None else found.__file__ or "ours", get_triton_kernels_version())
