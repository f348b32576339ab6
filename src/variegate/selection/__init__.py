"""Methods that choose among candidates: their pictures are the stock pipeline's, from chosen seeds."""

from variegate.selection.sgi import SGI, Choice, select

__all__ = ["SGI", "Choice", "select"]
