"""Checkpoint: a folder that transformers loads, and edgelm.json beside the weights."""

from __future__ import annotations

import json
import shutil
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import edgelm
from edgelm.atomic import new_folder
from edgelm.models import SENTENCE_FILES, LoadedModel

REPORT = "edgelm.json"
FORMAT_VERSION = 1


def save_checkpoint(
    loaded: LoadedModel,
    path: Path,
    *,
    recipe: Mapping[str, Any],
    calibration_digest: str,
    report: Sequence[Mapping[str, Any]],
    force: bool = False,
) -> None:
    """Write a compressed model.

    Args:
        loaded: The model, compressed in place.
        path: The folder to make.
        recipe: What was done, as `recipe.to_plain` gives it.
        calibration_digest: SHA-256 (hex) of the calibration texts.
        report: What happened to each layer.
        force: Replace a checkpoint that is there already.

    Raises:
        OutputExistsError: ``path`` exists and may not be replaced.
    """
    about = {
        "format": "edgelm-checkpoint",
        "format_version": FORMAT_VERSION,
        "created_by": f"edgelm {edgelm.__version__}",
        "task": loaded.task,
        "model": {"name": loaded.name, "source_digest": loaded.source_digest},
        "steps": [*loaded.steps, *recipe["steps"]],
        "recipe": recipe,
        "calibration_digest": calibration_digest,
        "report": report,
    }
    with new_folder(path, marker=REPORT, force=force) as folder:
        loaded.model.save_pretrained(folder)
        loaded.tokenizer.save_pretrained(folder)
        for name in SENTENCE_FILES:
            if (loaded.folder / name).is_file() and loaded.task == "embedding":
                (folder / name).parent.mkdir(exist_ok=True)
                shutil.copyfile(loaded.folder / name, folder / name)
        text = json.dumps(about, indent=2, ensure_ascii=False) + "\n"
        (folder / REPORT).write_text(text, encoding="utf-8")
