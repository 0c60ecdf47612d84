"""Recipe: which text to calibrate on and which steps to run, as TOML or from flags.

```toml
version = 1

[calibration]
texts = "built-in"

[[steps]]
method = "sparsify"
sparsity = "2:4"
refine = "dsnot"
```
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from edgelm import schema
from edgelm.calibration import Calibration
from edgelm.codes import BinaryCodes
from edgelm.compress import METHODS, Domains, FactorLLM
from edgelm.compress.vocabulary import Vocabulary
from edgelm.errors import ConfigError, InputError

VERSION = 1

# Name of a step -> its config: the methods that change layers, and codes of the embeddings.
STEPS: dict[str, type[Any]] = {
    **{name: method.config for name, method in METHODS.items()},
    "codes": BinaryCodes,
}

# Preset -> share of the feed-forward neurons that stay; what they cost and bring is in
# docs/factorization.md.
PRESETS = {"accurate": 0.75, "balanced": 0.5, "smallest": 0.25}


@dataclass(frozen=True)
class Recipe:
    """What `edgelm compress` does.

    Attributes:
        calibration: Which text the statistics are taken from.
        steps: Configs of methods, run in order.
        vocabulary: Which tokens stay, before all steps; None: all.
    """

    calibration: Calibration = field(default_factory=Calibration)
    steps: tuple[Any, ...] = ()
    vocabulary: Vocabulary | None = None

    @property
    def layer_steps(self) -> tuple[Any, ...]:
        """The steps that change layers."""
        return tuple(s for s in self.steps if not isinstance(s, BinaryCodes))

    @property
    def domains(self) -> Domains | None:
        """The experts by domain."""
        last = self.steps[-1] if self.steps else None
        return last if isinstance(last, Domains) else None

    @property
    def routed(self) -> bool:
        """Whether the last step routes the networks among experts."""
        return bool(self.steps) and isinstance(self.steps[-1], FactorLLM)

    @property
    def codes(self) -> BinaryCodes | None:
        """The codes to fit to the embeddings of what the other steps leave."""
        found = [s for s in self.steps if isinstance(s, BinaryCodes)]
        return found[0] if found else None


def read_recipe(path: Path) -> Recipe:
    """Read a recipe file.

    Raises:
        InputError: The file cannot be read.
        ConfigError: It is not a valid recipe; the message names the place.
    """
    import tomllib

    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise InputError(f"Cannot read {path}: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path} is not TOML: {error}.") from error
    return parse_recipe(data, str(path))


def parse_recipe(data: Mapping[str, Any], where: str) -> Recipe:
    """Make a recipe from plain data; unknown keys are errors.

    Raises:
        ConfigError: It is not a valid recipe; the message names the place.
    """
    known = ("version", "calibration", "vocabulary", "steps")
    for key in data:
        if key not in known:
            raise ConfigError(
                f"{where} has the unknown key '{key}'. Known keys: {', '.join(known)}."
            )
    if data.get("version", VERSION) != VERSION:
        raise ConfigError(
            f"{where} has version {data['version']!r}; this edgelm reads version {VERSION}."
        )
    calibration = schema.build(
        Calibration, data.get("calibration", {}), f"{where}, calibration", ConfigError
    )
    vocabulary = None
    if "vocabulary" in data:
        vocabulary = schema.build(
            Vocabulary, data["vocabulary"], f"{where}, vocabulary", ConfigError
        )
    steps = data.get("steps", [])
    if not isinstance(steps, list) or not (steps or vocabulary):
        raise ConfigError(
            f'{where} has no steps. Add one, for example: [[steps]] with method = "sparsify".'
        )
    configs = tuple(_step(s, f"{where}, step {i}") for i, s in enumerate(steps, 1))
    if any(isinstance(config, BinaryCodes) for config in configs[:-1]):
        raise ConfigError(
            f"{where}: codes are fitted to the finished model; make them the last step, and only once."
        )
    if any(isinstance(config, Domains) for config in configs[:-1]):
        raise ConfigError(
            f"{where}: make 'domains' the last step: what came after it would change one of the models only."
        )
    if any(isinstance(config, FactorLLM) for config in configs[:-1]):
        raise ConfigError(
            f"{where}: make 'factorllm' the last step: what came after it would not know of its routers."
        )
    return Recipe(calibration, configs, vocabulary)


def to_plain(recipe: Recipe) -> dict[str, Any]:
    """The reverse of `parse_recipe`."""
    vocabulary = recipe.vocabulary
    return {
        "version": VERSION,
        "calibration": schema.plain(recipe.calibration),
        **({"vocabulary": schema.plain(vocabulary)} if vocabulary else {}),
        "steps": [_describe(step) for step in recipe.steps],
    }


def to_toml(recipe: Recipe) -> str:
    """A recipe as the text of a recipe file."""
    data = to_plain(recipe)
    lines = [f"version = {VERSION}", "", "[calibration]"]
    lines += _toml_table(data["calibration"], "calibration")
    if "vocabulary" in data:
        lines += ["", "[vocabulary]", *_toml_table(data["vocabulary"], "vocabulary")]
    for step in data["steps"]:
        lines += ["", "[[steps]]", *_toml_table(step, "steps")]
    return "\n".join(lines) + "\n"


def _toml_table(table: Mapping[str, Any], path: str) -> list[str]:
    """Values first, then sub-tables. JSON writes TOML's strings, numbers, booleans and lists."""
    flat = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    lines = [
        f"{key} = {json.dumps(value, ensure_ascii=False)}"
        for key, value in flat.items()
    ]
    for key, value in table.items():
        if isinstance(value, Mapping):
            lines += [f"[{path}.{key}]", *_toml_table(value, f"{path}.{key}")]
    return lines


def _step(data: Any, where: str) -> Any:
    if not isinstance(data, Mapping) or "method" not in data:
        raise ConfigError(
            f"{where} lacks the key 'method'. Known methods: {', '.join(STEPS)}."
        )
    name = data["method"]
    if name not in STEPS:
        raise ConfigError(
            f"{where}: there is no method '{name}'. Known methods: {', '.join(STEPS)}."
        )
    config = STEPS[name]
    version = data.get("version", config.version)
    if version != config.version:
        raise ConfigError(
            f"{where}: '{name}' has version {version!r}; this edgelm reads {config.version}."
        )
    rest = {k: v for k, v in data.items() if k not in ("method", "version")}
    return schema.build(config, rest, where, ConfigError)


def _describe(step: Any) -> dict[str, Any]:
    """A step as a recipe writes it."""
    name = next(name for name, config in STEPS.items() if type(step) is config)
    return {"method": name, "version": step.version, **schema.plain(step)}
