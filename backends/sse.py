"""Server-sent events, read incrementally: bytes in at any split, whole frames out.

After the WHATWG event stream format: lines end in LF, CRLF or CR, a blank line ends a frame, `data:` lines of one frame
are joined by LF, comments and unknown fields are skipped, one leading byte order mark is dropped. Beyond it, a field
called `error` is taken for the data of an event of that name: llama.cpp's server wrote it so until late in 2025.
"""

from __future__ import annotations

from typing import NamedTuple

MAX_FRAME_BYTES = 4 * 1024 * 1024
"""Far above any chunk of an answer (200 bytes to some KiB): it bounds what a broken engine can make us hold."""

_BOM = b"\xef\xbb\xbf"


class FrameTooLarge(ValueError):
    """A frame outgrew the parser's bound before it ended."""


class Frame(NamedTuple):
    data: bytes
    event: bytes = b""
    """The `event:` field; empty where there was none."""


class SseParser:
    """One stream's parser. `feed` returns the frames that each piece of the stream completes."""

    __slots__ = ("_after_cr", "_at_start", "_data", "_event", "_max_bytes", "_partial", "_size")

    def __init__(self, max_frame_bytes: int = MAX_FRAME_BYTES) -> None:
        self._max_bytes = max_frame_bytes
        self._partial: list[bytes] = []
        self._data: list[bytes] = []
        self._event = b""
        self._size = 0
        self._after_cr = False
        self._at_start = True

    def feed(self, piece: bytes) -> list[Frame]:
        """The frames that end in `piece`, in order. Raises `FrameTooLarge`."""
        if self._after_cr and piece:
            self._after_cr = False
            piece = piece.removeprefix(b"\n")
        if not piece:
            return []
        self._after_cr = piece.endswith(b"\r")
        whole = self._after_cr or piece.endswith(b"\n")
        if not whole and b"\n" not in piece and b"\r" not in piece:
            self._hold(piece)
            return []
        if self._partial:
            piece = self._partial_joined() + piece
        lines = piece.splitlines()
        rest = b"" if whole else lines.pop()
        frames = self._take(lines)
        if rest:
            self._hold(rest)
        return frames

    def close(self) -> list[Frame]:
        """The frame that the stream's end left without its blank line, if there is one. Its data may be cut short."""
        rest = self._partial_joined()
        return self._take([rest, b""]) or self._take([b""])

    def _partial_joined(self) -> bytes:
        """What was held of a line, held no longer: it counts again when it is taken."""
        joined = b"".join(self._partial)
        self._size -= len(joined)
        self._partial.clear()
        return joined

    def _hold(self, partial: bytes) -> None:
        self._partial.append(partial)
        self._grow(len(partial))

    def _grow(self, size: int) -> None:
        self._size += size
        if self._size > self._max_bytes:
            raise FrameTooLarge(f"a frame of more than {self._max_bytes} bytes")

    def _take(self, lines: list[bytes]) -> list[Frame]:
        frames = []
        if self._at_start and lines:
            self._at_start = False
            lines[0] = lines[0].removeprefix(_BOM)
        for line in lines:
            if not line:
                if self._data:
                    frames.append(Frame(self._data[0] if len(self._data) == 1 else b"\n".join(self._data), self._event))
                    self._data.clear()
                self._event = b""
                self._size = 0
            elif line.startswith(b"data:"):
                self._data.append(line[6:] if line.startswith(b"data: ") else line[5:])
                self._grow(len(line))
            elif line.startswith(b"event:"):
                self._event = line[6:].removeprefix(b" ")
            elif line == b"data":
                self._data.append(b"")
                self._grow(len(line))
            elif line.startswith(b"error:"):
                self._data.append(line[6:].removeprefix(b" "))
                self._event = b"error"
                self._grow(len(line))
        return frames
