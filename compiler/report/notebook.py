"""Pages in notebooks: in a frame of their own, so that neither styles nor scripts reach the notebook."""

from __future__ import annotations

from html import escape


def framed(page: str) -> str:
    """Return a frame that shows `page`, without access to what is around it or to a network."""
    style = "width:100%;height:720px;border:1px solid #8886;border-radius:6px"
    return f'<iframe sandbox="allow-scripts" style="{style}" srcdoc="{escape(page)}"></iframe>'
