"""Files of text as they lie on disk, plain, gzipped or in a tar archive, and whether they are what their names say."""

import gzip
import io
import re
import shutil
import tarfile
import zlib
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, cast

from moleblend_hf.molecule_files import text_encoding

DAMAGE = (EOFError, OSError, zlib.error, tarfile.TarError)
GZIP = b"\x1f\x8b"
NOT_TEXT = (  # patterns of how files start that are often found under the name of another, and no text does
    (rb"PK\x03\x04", "a zip archive or an Excel workbook", "Unpack it, or save it as CSV"),
    (rb"\xd0\xcf\x11\xe0", "an Excel workbook", "Save it as CSV"),
    (rb"BZh[1-9](1AY&SY|\x17rE8P\x90)", "compressed by bzip2", "Unpack it"),
    (rb"\xfd7zXZ", "compressed by xz", "Unpack it"),
    (rb"\x28\xb5\x2f\xfd", "compressed by zstd", "Unpack it"),
    (rb"PAR1\x15", "a Parquet file", "Read it as source 'parquet'"),
    (rb"version https://git-lfs", "a pointer of Git LFS, not the file", "Run `git lfs pull`"),
    (rb"(?i)\s*<!doctype", "a web page", "Download the file again; the address led to a page about it"),
    (rb"(?i)\s*<html", "a web page", "Download the file again; the address led to a page about it"),
)


def check_does_not_hold(folder: Path, name: str, path: str | Path) -> None:
    """Raise if a folder that is emptied at the start holds what the run reads under the name of a setting."""
    if Path(path).exists() and Path(path).resolve().is_relative_to(folder.resolve()):
        raise ValueError(
            f"The output, {str(folder)!r}, holds {name}, {str(path)!r}, but is emptied at the start. Name another folder."
        )


def check_may_be_emptied(folder: Path, overwrite: bool, **read: str) -> None:
    """Raise if a folder to write into has files that may not be deleted, or that the run reads.

    Args:
        folder: which need not be there.
        overwrite: whether to delete what is in it.
        read: by the name of their setting, files and folders that the run reads, or names on the Hub.
    """
    if folder.is_dir() and any(folder.iterdir()):
        for name, path in read.items():
            check_does_not_hold(folder, name, path)
        if not overwrite:
            raise FileExistsError(
                f"{folder} is not empty. Choose another --output_dir, or delete it with --overwrite."
            )


def empty(folder: Path) -> None:
    """Delete all that is in a folder, which may be a link to one; nothing if it is not there."""
    for path in folder.iterdir() if folder.is_dir() else ():
        if path.is_dir() and not path.is_symlink():
            shutil.rmtree(path)
        else:
            path.unlink()


def is_gzip(path: Path) -> bool:
    """Whether a file is gzipped, by its content."""
    with open(path, "rb") as file:
        return file.read(2) == GZIP


def open_bytes(path: Path) -> io.BufferedReader:
    """Content of a file, unpacked if it is gzipped."""
    return cast(io.BufferedReader, gzip.open(path)) if is_gzip(path) else open(path, "rb")


def read_head(path: Path, size: int = 512) -> bytes:
    """First bytes of the unpacked content; fewer if it is shorter or damaged."""
    head = b""
    try:
        with open_bytes(path) as file:
            while len(head) < size and (chunk := file.read1(size - len(head))):
                head += chunk
    except DAMAGE:
        pass
    return head


def is_tar(head: bytes) -> bool:
    """Whether content that starts like this is a tar archive."""
    return head[257:262] == b"ustar"


@contextmanager
def open_text(path: Path, newline: str | None = None) -> Iterator[IO[str]]:
    """Lines of a text file that may be gzipped, or in a tar archive, of which the first SDF is read and nothing extracted."""
    head = read_head(path)
    with ExitStack() as stack:
        file = stack.enter_context(open_bytes(path))
        if is_tar(head):
            archive = stack.enter_context(tarfile.open(fileobj=file, mode="r:"))
            # Archives that were packed on macOS have a "._NAME" of metadata before each file.
            members = (member for member in archive if member.isfile() and not Path(member.name).name.startswith("._"))
            sdf = next((member for member in members if member.name.endswith(".sdf")), None)
            if sdf is None:
                raise ValueError(f"The archive {path} holds no file that ends in .sdf. Give one that does.")
            file = cast(io.BufferedReader, archive.extractfile(sdf))
        encoding, errors = text_encoding(head)
        yield stack.enter_context(io.TextIOWrapper(file, encoding=encoding, errors=errors, newline=newline))


def check_text(path: Path, expected: str, tar: bool = False) -> None:
    """Raises unless the file is there and can be text."""
    check_file(path, expected)
    head, packed = read_head(path), is_gzip(path)
    if not head:
        state = "is damaged: nothing in it can be unpacked" if packed and path.stat().st_size else "is empty"
        raise ValueError(f"{path} {state}; {expected} was expected. Fetch it again.")
    for magic, what, remedy in NOT_TEXT:
        if re.match(magic, head):
            raise ValueError(f"{path} is {what}; {expected} was expected. {remedy}.")
    if path.suffix in (".gz", ".tgz") and not packed:
        raise ValueError(f"{path} is not gzipped, as its name says. Fetch it again, or rename it if it is complete.")
    if is_tar(head) and not tar:
        raise ValueError(f"{path} is a tar archive; {expected} was expected. Unpack it.")


def check_file(path: Path, expected: str) -> None:
    """Raises unless the file is there."""
    if not path.is_file():
        state = "is a folder" if path.is_dir() else "does not exist"
        raise FileNotFoundError(f"{str(path)!r} {state}; {expected} was expected. Give the path of one.")


def check_folder(folder: Path, expected: str) -> None:
    """Raises unless the folder is there."""
    if not folder.is_dir():
        state = "is a file" if folder.is_file() else "does not exist"
        raise FileNotFoundError(f"{str(folder)!r} {state}; {expected} was expected. Give the path of one.")
