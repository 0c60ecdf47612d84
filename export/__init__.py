"""Export: a checkpoint to a bundle for a target."""

from __future__ import annotations

from edgelm.export.explain import explain
from edgelm.export.exporter import RANGES, export
from edgelm.export.rivals import export_fastest

__all__ = ["RANGES", "explain", "export", "export_fastest"]
