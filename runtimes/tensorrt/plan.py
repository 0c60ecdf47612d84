"""What a bundle says of how its engine is to be built: ``build.json``."""

from __future__ import annotations

import json
from dataclasses import dataclass

from edgelm import schema
from edgelm.bundle import BUILD, Bundle
from edgelm.errors import BundleError

Corner = tuple[int, ...]


@dataclass(frozen=True)
class Profile:
    """Shapes of the inputs, batch and sequence, that one optimisation profile is for."""

    min: Corner
    opt: Corner
    max: Corner


@dataclass(frozen=True)
class BuildPlan:
    """How an engine is built.

    Attributes:
        format_version: Of this file.
        graph: The ONNX file.
        inputs: Names of the graph's inputs, all of one shape.
        precision: What the graph computes in.
        strongly_typed: Whether the graph alone decides the types. Always true.
        profiles: By ascending length; no length is in two of them.
        workspace_mib: Memory that the builder may use for tactics.
        optimization_level: TensorRT's builder optimisation level, 0 to 5.
        tensorrt: Versions that the target can have, oldest first.
        compute_capability: The least that the device must have.
        sparse_2_4: Whether the builder shall look for 2:4 sparse kernels.
    """

    format_version: int
    graph: str
    inputs: tuple[str, ...]
    precision: str
    strongly_typed: bool
    profiles: tuple[Profile, ...]
    workspace_mib: int
    optimization_level: int
    tensorrt: tuple[str, ...]
    compute_capability: str
    sparse_2_4: bool = False

    @property
    def longest(self) -> int:
        """The longest input, tokens."""
        return self.profiles[-1].max[1]

    @property
    def largest_batch(self) -> int:
        """Most inputs of one call."""
        return min(profile.max[0] for profile in self.profiles)


def read_plan(bundle: Bundle) -> BuildPlan:
    """Read a bundle's ``build.json``.

    Raises:
        BundleError: It has none, or one that is not valid.
    """
    if BUILD not in bundle.manifest.files:
        raise BundleError(
            f"The bundle {bundle.name} is for {bundle.manifest.target}, so it does not say how an engine is built. "
            "Export it with --target jetson (or the device's own name)."
        )
    path = bundle.file(BUILD)
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise BundleError(f"{path} is not JSON: {error}.") from error
    plan = schema.build(BuildPlan, data, str(path), BundleError)
    if not plan.profiles or not plan.strongly_typed:
        raise BundleError(f"{path} has no profiles, or is not strongly typed.")
    for profile in plan.profiles:
        corners = (profile.min, profile.opt, profile.max)
        if any(len(corner) != 2 for corner in corners) or not all(
            1 <= a <= b <= c for a, b, c in zip(*corners, strict=True)
        ):
            raise BundleError(f"{path} has a profile whose shapes do not ascend.")
    return plan
