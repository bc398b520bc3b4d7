"""Vectors in repositories of the Hugging Face hub: `hf://OWNER/REPO[@REVISION][/FILE]`.

| file of a repository | read as |
|---|---|
| `.safetensors` of ours | itself |
| `.gguf` with `direction.N` | a control vector (llama.cpp, repeng) |
| `*_diff.pt`, `direction.pt` | a persona vector, a refusal direction |
| other `.safetensors`, `.pt` | what `importers` recognises |

`.pt` files are pickles: tensors are taken from them, and no code runs. Files beyond the size of a vector are not
downloaded. The hub's own client does the rest: cache, `HF_TOKEN`, `HF_ENDPOINT`, `HF_HUB_OFFLINE`.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING

from steer_engine.errors import UnreadableFileError, VectorFileError
from steer_engine.fields import without_password
from steer_engine.vectors import importers
from steer_engine.vectors.files import MAX_FILE_BYTES, SUFFIXES, AnyVector, load_any
from steer_engine.vectors.storage import NO_SPACE

if TYPE_CHECKING:
    from huggingface_hub import HfApi

PREFIX = "hf://"
FORM = "hf://OWNER/REPO, hf://OWNER/REPO/FILE or hf://OWNER/REPO@REVISION/FILE"

READABLE = (*SUFFIXES, ".pt")
"""Suffixes of files that can be a vector."""

MAX_LISTED = 12
"""Files that a message names."""

REFUSAL, REFUSAL_LAYER = "direction.pt", "direction_metadata.json"

_ADDRESS = re.compile(
    r"hf://(?P<dataset>datasets/)?(?P<repository>[\w.-]+/[\w.-]+)(@(?P<revision>refs/[^/]+/[^/]+|[^/]+))?(/(?P<file>.+))?"
)


@dataclass(frozen=True, kw_only=True)
class Address:
    """A repository of the hub, or a file of one. revision: a branch, tag or commit; None for the main branch.

    file: its path in the repository; empty for the only vector that there is.
    """

    repository: str
    revision: str | None
    file: str
    is_dataset: bool

    @classmethod
    def parse(cls, text: str) -> Address:
        """Raises VectorFileError."""
        match = _ADDRESS.fullmatch(text.removesuffix("/"))
        if match is None or ".." in (match["file"] or "").split("/"):
            raise VectorFileError(f"{text[:200]!r} is not an address of a vector on the hub; write {FORM}.")
        return cls(
            repository=match["repository"], revision=match["revision"], file=match["file"] or "",
            is_dataset=match["dataset"] is not None,
        )  # fmt: skip

    @property
    def repo_type(self) -> str:
        return "dataset" if self.is_dataset else "model"

    @property
    def stem(self) -> str:
        """Name for a file with this vector."""
        return Path(self.file or self.repository).stem

    def __str__(self) -> str:
        kind, revision = "datasets/" if self.is_dataset else "", f"@{self.revision}" if self.revision else ""
        return f"{PREFIX}{kind}{self.repository}{revision}" + (f"/{self.file}" if self.file else "")


def pull(address: str, *, kind: str = "auto") -> AnyVector:
    """Download a vector of a repository.

    kind: of the file, as in `importers.import_vector`.

    Raises:
        VectorFileError: there is no such vector, it cannot be reached or read. The message says what to do.
    """
    where = Address.parse(address)
    client = _client()
    with _explained(where):
        file = _chosen(client, where)
        path = Path(_download(client, where, file))
        if _kind(file, kind) == "refusal":
            folder = file.rpartition("/")[0]
            beside = f"{folder}/{REFUSAL_LAYER}" if folder else REFUSAL_LAYER
            if not _is_offline():
                _check_size(where, beside, _files(client, where).get(beside))
            _download(client, where, beside)
    try:
        return _read(path, _kind(file, kind))
    except VectorFileError as error:
        raise type(error)(error.message.replace(str(path), f"{where.repository}/{file}")) from None


def push(path: Path, address: str, *, public: bool = False, replace: bool = False) -> tuple[Address, bool]:
    """Upload a vector's file to a repository, which is made if there is none. The file is read and checked first.

    public: a repository that is made can be read by everybody.
    replace: replace a file with other content.

    Returns:
        The address of the file, and whether it was uploaded: False if the repository had the same content.

    Raises:
        VectorFileError: the file is not a vector, or the hub refuses it. The message says what to do.
    """
    target = Address.parse(address)
    vector = load_any(path)
    target = Address(**{**vars(target), "file": target.file or path.name})
    if Path(target.file).suffix != path.suffix:
        raise VectorFileError(f"{address}: the name on the hub must end in {path.suffix}, as {path} does.")
    client = _client()
    from huggingface_hub import get_token

    if get_token() is None:
        raise VectorFileError("Uploading needs a token: set HF_TOKEN to one that may write, or run `hf auth login`.")
    content = path.read_bytes()
    with _explained(target, doing="write"):
        client.create_repo(target.repository, repo_type=target.repo_type, private=not public, exist_ok=True)
        size = _files(client, target).get(target.file)
        if size is not None:
            if size == len(content) and Path(_download(client, target, target.file)).read_bytes() == content:
                return target, False
            if not replace:
                raise VectorFileError(f"{target} has other content; choose another name, or replace it with --force.")
        client.upload_file(
            path_or_fileobj=content, path_in_repo=target.file, repo_id=target.repository, revision=target.revision,
            repo_type=target.repo_type, commit_message=f"{target.file}: {vector.digest}",
        )  # fmt: skip
    return target, True


def _client() -> HfApi:
    """The hub's client, for the endpoint of the environment. Raises VectorFileError if it is not installed."""
    if find_spec("huggingface_hub") is None:
        raise VectorFileError("hf:// needs the hub's client, which comes with vLLM: pip install huggingface_hub")
    from huggingface_hub import HfApi
    from huggingface_hub.utils.tqdm import disable_progress_bars

    disable_progress_bars()  # a vector has a few megabytes
    return HfApi(library_name="steer-engine")


def _is_offline() -> bool:
    """Whether the client only reads its cache, by HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def _files(client: HfApi, where: Address) -> dict[str, int]:
    """Path -> bytes of each file of the repository."""
    ask = client.dataset_info if where.is_dataset else client.model_info
    found = ask(where.repository, revision=where.revision, files_metadata=True).siblings
    sizes = {each.rfilename: each.size or 0 for each in found or ()}
    return dict(sorted(sizes.items()))


def _chosen(client: HfApi, where: Address) -> str:
    """The file to download. Raises VectorFileError if there is none, it is too large, or several could be meant."""
    if where.file and _is_offline():
        return where.file  # the cache knows it, or not
    sizes = {name: size for name, size in _files(client, where).items() if name.endswith(READABLE)}
    listed = ", ".join(list(sizes)[:MAX_LISTED]) + (", ..." if len(sizes) > MAX_LISTED else "")
    if not sizes:
        raise VectorFileError(f"{where} has no file that can be a vector ({', '.join(READABLE)}).")
    if where.file and where.file not in sizes:
        raise VectorFileError(f"{where.repository} has no vector {where.file}; it has {listed}.")
    if not where.file and len(sizes) > 1:
        raise VectorFileError(
            f"{where} has {len(sizes)} files; name one, such as {where}/{next(iter(sizes))}: {listed}."
        )
    file = where.file or next(iter(sizes))
    _check_size(where, file, sizes[file])
    return file


def _check_size(where: Address, file: str, size: int | None) -> None:
    """Raise VectorFileError if the file does not exist (None), or is larger than what a vector can have."""
    if size is None:
        raise VectorFileError(f"{where.repository} has no {file}, which belongs to this vector.")
    if size > MAX_FILE_BYTES:
        raise VectorFileError(f"{where.repository}/{file} has {size} bytes; no vector has over {MAX_FILE_BYTES}.")


def _download(client: HfApi, where: Address, file: str) -> str:
    """Path of the file in the hub's cache. Its other files that were downloaded are beside it."""
    return client.hf_hub_download(where.repository, file, revision=where.revision, repo_type=where.repo_type)


def _kind(file: str, kind: str) -> str:
    """The kind of a file whose name tells it, where its content does not."""
    name = file.rpartition("/")[2]
    if kind != "auto" or not name.endswith(".pt"):
        return kind
    if name == REFUSAL:
        return "refusal"
    if name.endswith("_diff.pt"):
        return "persona"
    return "caa" if name.startswith("vec_layer_") else kind


def _read(path: Path, kind: str) -> AnyVector:
    if kind != "auto" or path.suffix not in SUFFIXES:
        return importers.import_vector(path, kind)
    try:
        return load_any(path)
    except VectorFileError as error:
        own = error
    try:
        return importers.import_vector(path, kind)
    except VectorFileError:  # of no other tool either
        raise own from None


@contextmanager
def _explained(where: Address, *, doing: str = "read") -> Iterator[None]:
    """What the hub's client raises as a VectorFileError that says what to do, without a password of the hub's URL."""
    from huggingface_hub import errors

    endpoint = without_password(os.environ.get("HF_ENDPOINT", "https://huggingface.co").rstrip("/"))
    try:
        yield
    except errors.GatedRepoError:
        page = f"{endpoint}/{'datasets/' if where.is_dataset else ''}{where.repository}"
        reason = f"{where.repository} is gated: accept its terms at {page}, and set HF_TOKEN."
    except errors.RepositoryNotFoundError:
        reason = (
            f"{endpoint} has no repository {where.repository}, or it is private: check the spelling, or set HF_TOKEN "
            "to a token that may read it."
        )
    except errors.RevisionNotFoundError:
        reason = f"{where.repository} has no revision {where.revision}; a branch, a tag or a commit is needed."
    except (errors.OfflineModeIsEnabled, errors.LocalEntryNotFoundError) as error:
        if not _is_offline():
            raise UnreadableFileError(_away(endpoint, error)) from None
        reason = (
            f"{where} is not in the hub's cache, and HF_HUB_OFFLINE is set; unset it, or name a file that is there."
        )
    except errors.EntryNotFoundError:
        reason = f"{where} does not exist; check the name of the file."
    except errors.HFValidationError as error:
        reason = f"{where}: {str(error).rstrip('.')}."
    except errors.HfHubHTTPError as error:
        status = error.response.status_code
        if status in (401, 403):
            reason = (
                f"The token may not do this at {where.repository} ({status}): set HF_TOKEN to one that may {doing} "
                "there."
            )
        else:
            said = error.server_message or without_password(str(error).partition("\n")[0])
            reason = f"{endpoint} answered {status} for {where} ({said}); retry later."
    except (OSError, errors.HTTPError) as error:  # type: ignore[attr-defined]  # of whichever library it uses
        raise UnreadableFileError(_unusable_cache(error) or _away(endpoint, error)) from None
    else:
        return
    raise VectorFileError(reason)


def _unusable_cache(error: Exception) -> str | None:
    """The message if an error is of the cache's disk and not of the network."""
    if not isinstance(error, OSError) or not (error.filename or error.errno in NO_SPACE):
        return None
    return f"The hub's cache cannot be written ({error}); free space there, or set HF_HOME to another folder."


def _away(endpoint: str, error: Exception) -> str:
    return (
        f"{endpoint} is unreachable ({type(error).__name__}); check the network, HF_ENDPOINT and the proxy's variables."
    )
