"""Kernels that edit and read the residual stream, each with a plain-torch reference beside it.

Importing this package (or `tables` and `reference`) does not import Triton: a machine without it can call the
references. The modules that hold kernels (`edit_residual`, `route_rows`, `add_rms_norm_edit`) do import it.
"""

from steer_kernels.tables import Entry, Tables, decode_entry, encode_entry

__all__ = ["Entry", "Tables", "decode_entry", "encode_entry"]
