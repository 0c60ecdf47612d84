"""Fit binary codes to embeddings: without labels, in seconds, with numpy alone.

What is fitted is an `edgelm.runtimes.codes.Coder`, which the device applies.
"""

from __future__ import annotations

from edgelm.codes.config import BinaryCodes
from edgelm.codes.fitting import KINDS, fit
from edgelm.codes.judgement import Judgement, judge

__all__ = ["KINDS", "BinaryCodes", "Judgement", "fit", "judge"]
