"""What an engine prints, cut into lines; which bytes of the file are private."""

from __future__ import annotations

from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from collections.abc import Callable

_LONGEST_LINE_BYTES = 8 * 1024
"""Longer lines are cut, so that a person can read them."""
_MOST_LINES = 1000
"""Lines of one call: emberd needs some 30 microseconds for each."""


class LineFilter:
    r"""Cuts output into lines. Progress bars use carriage returns, so both `\r` and `\n` end a line.

    Args:
        is_private: returns True if a line must neither stay on disk nor be passed on.
    """

    def __init__(self, is_private: Callable[[str], bool]) -> None:
        self.is_private = is_private
        self.pending = b""
        """The beginning of a line that has not ended."""
        self._is_cutting = False
        self._is_scrubbing = False

    @property
    def unfinished(self) -> str:
        """A last line without a line end, empty if there is none or it is private."""
        return "" if self._is_scrubbing else self.pending.decode("utf-8", "replace").strip()

    def lose(self) -> None:
        """Be told that output was lost: what follows may be the end of a private line, and counts as such."""
        self.pending, self._is_scrubbing = b"", True

    def take(self, chunk: bytes, start: int) -> tuple[int, list[str], list[tuple[int, int]]]:
        """Take what follows in the file.

        Args:
            chunk: the bytes.
            start: where in the file they begin.

        Returns:
            Where in the file the bytes end that were taken: no more than 1,000 lines. The lines that ended, without
            private ones. Begin and end of each piece of the file that must be overwritten.
        """
        lines: list[str] = []
        private: list[tuple[int, int]] = []
        end = start
        for piece in chunk.replace(b"\r", b"\n").splitlines(keepends=True)[:_MOST_LINES]:
            start, end = end, end + len(piece)
            is_complete = piece.endswith(b"\n")
            self.pending += piece.rstrip(b"\n")
            text = self.pending.decode("utf-8", "replace").strip()
            if not self._is_cutting and text and self.is_private(text):
                self._is_scrubbing = True
                # Of a line that goes on over a rotation, the beginning is in no file.
                start = max(start - len(self.pending) + len(piece.rstrip(b"\n")), 0)
            if self._is_scrubbing:
                private.append((start, end - is_complete))
            if is_complete:
                if text and not self._is_cutting and not self._is_scrubbing:
                    lines.append(text[:_LONGEST_LINE_BYTES])
                self.pending, self._is_cutting, self._is_scrubbing = b"", False, False
            elif len(self.pending) > _LONGEST_LINE_BYTES:
                if not self._is_scrubbing and not self._is_cutting:
                    lines.append(text[:_LONGEST_LINE_BYTES])
                self.pending, self._is_cutting = b"", True
        return end, lines, private
