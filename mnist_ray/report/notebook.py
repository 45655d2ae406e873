"""A progress bar in a notebook's cell."""

from __future__ import annotations

import html
from typing import Any


class Bar:
    """Redrawn in place, in the output of the cell that is running."""

    def __init__(self) -> None:
        self._handle: Any = None

    def show(self, text: str, fraction: float) -> None:
        """Show how much of a run is done, from 0 to 1, with a text."""
        self._draw(f'<progress value="{fraction:.4f}"></progress> <code>{html.escape(text)}</code>')

    def clear(self) -> None:
        """Remove the bar, if it was shown."""
        if self._handle is not None:
            self._draw("")

    def _draw(self, page: str) -> None:
        from IPython.display import HTML, display

        if self._handle is None:
            self._handle = display(HTML(page), display_id=True)
        else:
            self._handle.update(HTML(page))
