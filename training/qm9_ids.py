"""Lists of molecules of QM9, such as uncharacterized.txt: those that are to be left out."""

from pathlib import Path

from files import check_text, open_text


def read_qm9_ids(path: Path) -> frozenset[int]:
    """Numbers of the molecules in a list: lines that start with a number or `gdb_N`, such as QM9's uncharacterized.txt."""
    check_text(path, "a list of QM9 ids")
    with open_text(path) as file:
        tokens = (line.split(None, 1)[0] for line in file if line.strip())
        numbers = frozenset(number for token in tokens if (number := qm9_number(token)) is not None)
    if not numbers:
        raise ValueError(
            f"{path} lists no ids: no line starts with a number or gdb_N. Give QM9's uncharacterized.txt."
        )
    return numbers


def qm9_number(text: str) -> int | None:
    """N of `gdb_N` or `N`, or None for any other text."""
    number = text.removeprefix("gdb_")
    return int(number) if number.isdecimal() else None
