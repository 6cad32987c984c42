"""Rows that cannot be used: each one ends the run, or all are skipped, counted and reported."""

import sys
from pathlib import Path
from typing import Annotated, Any, Literal

OnBadRow = Annotated[
    Literal["error", "skip"],
    "a row that cannot be used ends the run, or is left out, counted and reported; a damaged file ends it either way",
]
MAX_REASON = 260  # characters of the reason for a bad row


class BadRow(ValueError):
    """A row that cannot be used: its `number`, from 1, and the `reason`, one printable line."""

    def __init__(self, path: Path, number: int, reason: str):
        if len(reason) > MAX_REASON:
            reason = f"{reason[: MAX_REASON - 60]} ... {reason[-50:]}"
        if not reason.isprintable():
            reason = "".join(c if c.isprintable() else c.encode("unicode_escape").decode() for c in reason)
        self.path, self.number, self.reason = Path(path), number, reason
        super().__init__(f"{path}, row {number}: {self.reason}")


class BadRows:
    """Bad rows of files: raises the first, or skips and counts all, each once however often its file is read."""

    max_kept = 5  # rows whose numbers and reasons are kept

    def __init__(self, on_bad_row: str = "error", verbose: bool = False, several_files: bool = False):
        """verbose: print the first rows and every hundredth, for a reading that may never end.

        several_files: rows are named with their file.
        """
        self.on_bad_row, self.verbose, self.several_files = on_bad_row, verbose, several_files
        self.count, self.first = 0, list[str]()
        self._seen: dict[Path, tuple[str, int]] = {}  # of each file the first bad row, and the number of the last

    def add(self, row: BadRow) -> None:
        """Raise the row, or count it."""
        if self.on_bad_row == "error":
            raise row from None
        first, last = self._seen.get(row.path, (f"row {row.number}: {row.reason}", 0))
        if row.number <= last:
            return  # counted in an earlier reading
        self._seen[row.path] = first, row.number
        self.count += 1
        if self.count <= self.max_kept:
            place = f"{row.path.name}, row" if self.several_files else "row"
            self.first.append(f"{place} {row.number}: {row.reason}")
        if self.verbose and (self.count <= self.max_kept or self.count % 100 == 0):
            print(f"{row}; skipped, {self.count:,} so far", file=sys.stderr)

    def refuse_all(self, path: Path) -> None:
        """Raise ValueError; called when every row is bad."""
        raise ValueError(f"{path} has no row that can be used; the first: {self._seen[Path(path)][0]}")

    @property
    def meta(self) -> dict[str, Any]:
        """The number of skipped rows and the reasons for the first ones, for logs."""
        return {"skipped_rows": self.count, "skipped_first": [*self.first]}


def skipped_line(meta: dict[str, Any]) -> str:
    """A line on the skipped rows, "" if there are none."""
    count, first = meta["skipped_rows"], meta["skipped_first"]
    if not count:
        return ""
    rest = "; ..." if count > len(first) else ""
    return f"{count:,} bad rows skipped: {'; '.join(first)}{rest}"
