"""What a model ends its turn with (`<|eot_id|>`), where an engine leaves such tokens in the text: not content."""

from __future__ import annotations


class Ending:
    """Takes markers off the end of a text, wherever in a call it ends. They are text where any text follows.

    Held back is at most a run of markers and what may be the beginning of one. All markers begin with `<`.
    """

    def __init__(self, markers: tuple[str, ...]) -> None:
        self._markers = markers
        self._begun = frozenset(marker[:size] for marker in markers for size in range(1, len(marker)))
        self._longest_begun = max(map(len, markers)) - 1
        self._run: list[str] = []
        self._beginning = ""

    def feed(self, text: str) -> str:
        """What can be told of the text with this piece."""
        if "<" not in text and not self._run and not self._beginning:
            return text
        text = self._beginning + text
        begins = text.rfind("<", max(0, len(text) - self._longest_begun))
        if begins < 0 or text[begins:] not in self._begun:
            begins = len(text)
        self._beginning = text[begins:]
        start = begins
        while marker := next((marker for marker in self._markers if text.endswith(marker, 0, start)), None):
            start -= len(marker)
        told = ""
        if start:
            told = "".join((*self._run, text[:start]))
            self._run.clear()
        if start < begins:
            self._run.append(text[start:begins])
        return told

    def close(self) -> str:
        """What of the text had not been told: nothing, where it ended with whole markers."""
        beginning, self._beginning = self._beginning, ""
        run = "".join(self._run)
        self._run.clear()
        return run + beginning if beginning else ""
