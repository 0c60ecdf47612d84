"""Manifest: what a bundle says of itself (see docs/bundle-format.md)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal


@dataclass(frozen=True)
class Tensor:
    """An input or output of the graph.

    Attributes:
        name: Its name in the graph.
        dtype: As numpy names it.
        shape: Numbers, and ``batch`` or ``sequence`` where it varies.
    """

    name: str
    dtype: Literal["int64", "int32", "float32", "uint8"]
    shape: tuple[int | str, ...]


@dataclass(frozen=True)
class Graph:
    """The graph's file and interface."""

    file: str
    opset: int
    inputs: tuple[Tensor, ...]
    outputs: tuple[Tensor, ...]
    operators: Mapping[str, int] = field(default_factory=dict)


@dataclass(frozen=True)
class TokenizerInfo:
    """How to use the tokenizer.

    Attributes:
        file: Its file, as the ``tokenizers`` library reads it.
        max_length: Longest input in tokens, special tokens included.
        pad_id: Token that pads a batch; ``pad_type_id``: its segment.
    """

    file: str
    max_length: int
    pad_id: int
    pad_type_id: int = 0


@dataclass(frozen=True)
class EmbeddingInfo:
    """What the vectors of an embedding bundle are.

    Attributes:
        dimension: Length of a vector.
        pooling: How token vectors became one vector (inside the graph).
        normalize: Whether vectors have length 1 (inside the graph).
        prompts: Name to text put before an input.
        default_prompt: Name of the prompt used when none is asked for.
        dimensions: Shorter lengths that the model was trained for (Matryoshka), if known.
        ranges: File of the values' ranges (`edgelm.runtimes.quantization.Ranges`).
    """

    dimension: int
    pooling: str
    normalize: bool
    prompts: Mapping[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    dimensions: tuple[int, ...] = ()
    ranges: str | None = None


@dataclass(frozen=True)
class CodesInfo:
    """The binary codes of an embedding bundle.

    Attributes:
        file: The coder (`edgelm.runtimes.codes.load_coder`).
        kind: How it was made, for people.
        bits: Length of a code.
        digest: Of the coder: codes of another digest cannot be compared with these.
        output: The graph's output that gives packed codes of documents, if it has one.
    """

    file: str
    kind: str
    bits: int
    digest: str
    output: str | None = None


@dataclass(frozen=True)
class NerInfo:
    """Labels of a token classifier, in the order of its logits."""

    labels: tuple[str, ...]
    scheme: Literal["BIO", "BIOES", "IO"]


@dataclass(frozen=True)
class ScoringInfo:
    """What a scoring bundle takes and gives.

    Attributes:
        labels: In the order of the logits.
        activation: Applied to the logits outside the graph.
        inputs: Whether an input is one text or a pair of texts.
        range: Least and greatest score there can be; others are brought within.
    """

    labels: tuple[str, ...]
    activation: Literal["sigmoid", "softmax", "none"]
    inputs: Literal["single", "pair"]
    range: tuple[float, ...] | None = None


@dataclass(frozen=True)
class HeadInfo:
    """A linear head that is applied to what the graph gives, outside of it.

    Attributes:
        file: Its weights (`edgelm.runtimes.heads.load_head`).
        features: What it is applied to: the vector of a ``text``, a function of a ``pair``'s two vectors
            that does not see their order, one that does (``ordered-pair``), or the vector of a ``token``.
    """

    file: str
    features: Literal["text", "pair", "ordered-pair", "token"]


@dataclass(frozen=True)
class NamedHead:
    """One of several heads on one encoder; ``head`` is None where the graph gives its logits."""

    task: Literal["ner", "scoring"]
    head: HeadInfo | None = None
    ner: NerInfo | None = None
    scoring: ScoringInfo | None = None


@dataclass(frozen=True)
class ModelInfo:
    """Where the weights come from.

    Attributes:
        name: The reference that was compressed or exported; ``architecture``: its ``model_type``.
        source_digest: SHA-256 of the original weights file.
        steps: The compression steps, in order, as in a recipe.
    """

    name: str
    architecture: str
    source_digest: str
    steps: tuple[Mapping[str, Any], ...] = ()


@dataclass(frozen=True)
class GoldenInfo:
    """The golden examples and how well the graph must reproduce them.

    Attributes:
        texts: File of the texts; ``arrays``: of token ids and reference outputs.
        count: Number of examples.
        min_snr_db: Signal-to-noise ratio that `verify` demands, dB.
        measured_snr_db: What export measured, dB.
    """

    texts: str
    arrays: str
    count: int
    min_snr_db: float
    measured_snr_db: float


@dataclass(frozen=True)
class FileInfo:
    """Size in bytes and SHA-256 (hex) of a file."""

    size: int
    sha256: str


Task = Literal["embedding", "ner", "scoring", "multi"]


@dataclass(frozen=True)
class Manifest:
    """Everything that a program must know to use a bundle."""

    created_by: str
    task: Task
    target: str
    precision: Literal["fp32", "fp16", "bf16", "int8", "int8-weights", "int4-weights"]
    model: ModelInfo
    graph: Graph
    tokenizer: TokenizerInfo
    golden: GoldenInfo
    provenance: Mapping[str, Any]
    embedding: EmbeddingInfo | None = None
    codes: CodesInfo | None = None
    ner: NerInfo | None = None
    scoring: ScoringInfo | None = None
    head: HeadInfo | None = None
    heads: Mapping[str, NamedHead] = field(default_factory=dict)
    files: Mapping[str, FileInfo] = field(default_factory=dict)
