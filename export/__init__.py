"""Export: a checkpoint to a bundle for a target."""

from __future__ import annotations

from edgelm.export.exporter import export

__all__ = ["export"]
