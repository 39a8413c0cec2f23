"""The version, in a file that imports nothing: whoever names it needs no other part of the package."""

from __future__ import annotations

__all__ = ["__version__"]

__version__ = "0.1.0"
