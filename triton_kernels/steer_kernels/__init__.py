"""Kernels that edit and capture the residual stream, each with a reference in plain torch.

Importing this package (or `tables` and `reference`) does not import Triton: the references also
run on machines without Triton. The kernel modules (`edit_residual`, `route_rows`, `add_rms_norm_edit`) import it.
"""

from steer_kernels.tables import Entry, Tables, decode_entry, encode_entry

__all__ = ["Entry", "Tables", "decode_entry", "encode_entry"]
