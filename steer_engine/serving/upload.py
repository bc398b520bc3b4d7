"""A vector in the body of a request: streamed to the disk with a counted limit, then read strictly."""

from __future__ import annotations

import asyncio
import tempfile
from collections.abc import AsyncIterator
from pathlib import Path

from fastapi import Request

from steer_engine.errors import CapacityError, PayloadTooLargeError, UnusableVectorError, VectorFileError
from steer_engine.serving.answers import Refused
from steer_engine.vectors import ControlVector, gguf_format, safetensors_format
from steer_engine.vectors.disk_errors import writing
from steer_engine.vectors.under_way import mark

MEDIA_TYPES = frozenset({"", "application/octet-stream", "application/safetensors", "application/x-safetensors",
                         "application/gguf", "application/x-gguf", "binary/octet-stream",
                         "application/x-www-form-urlencoded"})  # fmt: skip
"""The last one is what curl says of `--data-binary` if nobody tells it otherwise; the content is checked anyway."""
GGUF_MAGIC = b"GGUF"


class Uploads:
    """Takes uploads, a bounded number at once."""

    def __init__(self, max_bytes: int, at_once: int) -> None:
        self.max_bytes = max_bytes
        self._free = at_once

    async def receive(self, request: Request, folder: Path) -> ControlVector:
        """The vector in the body; nothing of it stays in `folder`.

        Raises:
            Refused: 415. PayloadTooLargeError: 413. VectorFileError: not a control vector. CapacityError: too many.
            RegistryError: the disk does not take it.
        """
        media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
        if media_type not in MEDIA_TYPES:
            raise Refused(f"Send the file as application/octet-stream, not as {media_type[:80]}.", 415)
        declared = request.headers.get("content-length", "")
        if declared.isdecimal() and int(declared) > self.max_bytes:
            raise self._too_large()
        if self._free == 0:
            raise CapacityError("Too many uploads at once; try again.", retry_after=2)
        self._free -= 1
        try:
            with writing(), tempfile.NamedTemporaryFile(dir=folder, delete=False) as file:
                path = Path(file.name)
                mark(file)
                try:
                    async for piece in self._counted(request.stream()):
                        await asyncio.to_thread(file.write, piece)
                    file.close()
                    return await asyncio.to_thread(read_vector, path)
                finally:
                    path.unlink(missing_ok=True)
        finally:
            self._free += 1

    async def _counted(self, stream: AsyncIterator[bytes]) -> AsyncIterator[bytes]:
        count = 0
        async for piece in stream:
            count += len(piece)
            if count > self.max_bytes:
                raise self._too_large()
            yield piece

    def _too_large(self) -> PayloadTooLargeError:
        return PayloadTooLargeError(f"A vector may have at most {self.max_bytes} bytes.")


def read_vector(path: Path) -> ControlVector:
    """Read safetensors or GGUF, whichever the first bytes say. Raises VectorFileError, without the file's path."""
    with path.open("rb") as file:
        is_gguf = file.read(len(GGUF_MAGIC)) == GGUF_MAGIC
    if is_gguf:
        try:
            vector = gguf_format.load(path)
        except VectorFileError as error:
            raise type(error)(error.message.removeprefix(f"{path}: ")) from None
    else:
        vector = safetensors_format.from_bytes(path.read_bytes())
    if not any(vector.norms.values()):
        raise UnusableVectorError("All directions of the vector are zero.")
    return vector
