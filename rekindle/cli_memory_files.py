"""Files into banks and out of them: `rekindle memory put`, `export` and `import`. Quick to import: no gRPC."""

import sys
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.validators import Path as PathValidator

from rekindle.cli_connection import AsJson, Connection, print_message

if TYPE_CHECKING:
    from protos import rekindle_memory_pb2 as mpb

Metadata = Annotated[dict[str, str] | None, Parameter(help="Pairs, as --metadata.KEY VALUE.")]
File = Annotated[Path, Parameter(validator=PathValidator(exists=True, dir_okay=False))]
_BATCH_BYTES = 16 << 20
_BATCH_DOCUMENTS = 100
_PIECE_BYTES = 1 << 20


def put(
    bank: str,
    /,
    *files: File,
    metadata: Metadata = None,
    importance: float | None = None,
    connection: Connection = Connection(),
) -> None:
    """Put text files into a bank, cut in chunks. A file whose content is there is left alone, one that has changed
    takes the place of what was there under its name.

    Parameters
    ----------
    importance
        0 to 1 (0.5).
    """
    from rekindle.display_memory import progress_bar

    if not files:
        raise SystemExit("rekindle: name at least one file")
    done = chunks = new_chunks = 0
    with connection.open() as client, progress_bar("documents", len(files)) as advance:
        for batch in _batches(files, dict(metadata or {}), importance):
            for progress in client.memory.put_documents(bank, batch):
                done, chunks, new_chunks = done + 1, chunks + progress.chunks, new_chunks + progress.new_chunks
                advance(done)
    print(f"{done} documents: {new_chunks} new chunks")


def export(
    bank: str,
    /,
    *,
    to: Path | None = None,
    with_vectors: bool = False,
    connection: Connection = Connection(),
) -> None:
    """Write all entries as lines of JSON, oldest first.

    Parameters
    ----------
    to
        The file that they go to; without one, they are printed.
    with_vectors
        Also the embedding model's vectors, so that an import need not make them again.
    """
    with connection.open() as client:
        pieces = client.memory.export_bank(bank, with_vectors=with_vectors)
        if to is None:
            for piece in pieces:
                sys.stdout.write(piece.decode())
            return
        with to.open("wb") as file:
            for piece in pieces:
                file.write(piece)


def import_(bank: str, file: File, /, *, as_json: AsJson = False, connection: Connection = Connection()) -> None:
    """Add the entries of a file of JSON lines, as `export` writes them. What is there already is left alone."""
    from rekindle.display_memory import progress_bar

    with connection.open() as client, progress_bar("bytes", file.stat().st_size) as advance:
        imported = client.memory.import_bank(bank, _pieces(file, advance))
    print_message(imported, as_json)


def _batches(
    files: tuple[Path, ...], metadata: dict[str, str], importance: float | None
) -> "Iterator[list[mpb.Document]]":
    """Documents by the call that takes them: a message has its bounds."""
    from protos import rekindle_memory_pb2 as mpb

    batch: list[mpb.Document] = []
    num_bytes = 0
    for file in files:
        text = _text_of(file)
        if batch and (len(batch) == _BATCH_DOCUMENTS or num_bytes + len(text) > _BATCH_BYTES):
            yield batch
            batch, num_bytes = [], 0
        batch.append(mpb.Document(id=_id_of(file), text=text, metadata=metadata, importance=importance))
        num_bytes += len(text)
    yield batch


def _text_of(file: Path) -> str:
    try:
        return file.read_text(encoding="utf-8")
    except UnicodeDecodeError as error:
        raise SystemExit(f"rekindle: {file} is not UTF-8") from error


def _id_of(file: Path) -> str:
    """The file's path as it was given, in the characters that an id may have."""
    path = file.as_posix().replace("/", ":")
    return "".join(one if one.isascii() and (one.isalnum() or one in "._:-") else "_" for one in path)[-128:]


def _pieces(file: Path, advance: Any) -> Iterator[bytes]:
    done = 0
    with file.open("rb") as lines:
        while piece := lines.read(_PIECE_BYTES):
            yield piece
            done += len(piece)
            advance(done)
