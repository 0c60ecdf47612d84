"""Export: a checkpoint to a bundle for a target."""

from __future__ import annotations

from edgelm.export.exporter import RANGES, export
from edgelm.export.rivals import export_fastest

__all__ = ["RANGES", "export", "export_fastest"]
