"""A checkpoint to a verified bundle."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Callable, Collection, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from tokenizers import Tokenizer

import edgelm
from edgelm import provenance, samples, schema
from edgelm.atomic import new_folder
from edgelm.bundle import CODES, GRAPH, MANIFEST, TOKENIZER, VECTOR_RANGES, Bundle, seal
from edgelm.calibration import Calibration, load_texts, text_digest
from edgelm.errors import ExportError, GateError, require
from edgelm.export.codes import OUTPUT, add_codes
from edgelm.export.fitting import fit
from edgelm.export.graph import export_graph, read_graph
from edgelm.export.lint import check_graph
from edgelm.export.modules import wrap
from edgelm.export.plan import write_plan
from edgelm.export.precision import (
    TOLERANCE_DB,
    Written,
    check_precision,
    write_graph,
)
from edgelm.export.rounded import open_here
from edgelm.export.routed import TOLERANCE_DB as ROUTED_DB
from edgelm.export.routed import Timing, check_routed, write_routed
from edgelm.golden import GOLDEN_ARRAYS, GOLDEN_TEXTS, GoldenExample, save_golden
from edgelm.manifest import (
    CodesInfo,
    EmbeddingInfo,
    GoldenInfo,
    Graph,
    Manifest,
    ModelInfo,
    NerInfo,
    ScoringInfo,
    TokenizerInfo,
)
from edgelm.models import LoadedModel
from edgelm.runtimes.codes import Coder, load_coder
from edgelm.runtimes.embedding import Embedder
from edgelm.runtimes.engine import open_engine
from edgelm.runtimes.verification import measure_snr
from edgelm.sbom import write_sbom
from edgelm.schema import read_json
from edgelm.targets import Target, load_target

Progress = Callable[[str], None]
# Text for the ranges of int8 activations; a tensor keeps some thousand tokens of it.
RANGES = Calibration(max_texts=700, max_tokens=128)

_NO_GOLDEN = GoldenInfo("", "", 0, 0.0, 0.0)


def export(
    loaded: LoadedModel,
    target: str,
    path: Path,
    *,
    precision: str = "auto",
    calibration: Calibration = RANGES,
    block: int = 32,
    table_bits: int = 8,
    max_drop: float | None = None,
    keep: Collection[str] = (),
    float_graph: Path | None = None,
    min_snr_db: float | None = None,
    codes_output: bool = False,
    token_embeddings: int | None = None,
    timing: Timing | None = None,
    force: bool = False,
    progress: Progress = lambda what: None,
) -> Bundle:
    """Make a bundle and verify it.

    Args:
        loaded: The model; it is converted to float32 in place.
        target: Name of a target or a family of targets.
        path: The folder to make.
        precision: One of the target's, or ``auto`` for its default. Given ``max_drop``
            too, ``auto`` leaves in float what int8 would cost too much.
        calibration: The text that ranges are taken from; every eighth text is left for
            measuring what the precision costs.
        block: Weights that share a scale where only weights are quantised.
        table_bits: 8, or 4 for large embedding tables, where products are integers.
        max_drop: What the precision may cost; `edgelm.export.sensitivity` defines it.
        keep: Names of products that int8 leaves in float, without ``max_drop``.
        float_graph: The model's float32 graph, alone in its folder, where it has been
            exported already.
        min_snr_db: Least agreement with the original model, dB; the precision's own
            if not given.
        codes_output: Let the graph give packed codes too, beside the embeddings.
        token_embeddings: Let it give vectors of the tokens too, float32 ``[batch, sequence,
            width]``: after this layer, -1 for the last. A ``float_graph`` must have been
            exported so.
        timing: What times routed experts against a static graph, if not `edgelm.export.routed.in_turns`.
        force: Replace a bundle that is there already.
        progress: Called with what is being done.

    Returns:
        The bundle.

    Raises:
        ConfigError: Tables of so few bits do not go with the precision.
        TargetError: There is no such target, it does not have the precision, or the
            model does not fit it.
        ExportError: The graph cannot be made, or is not what was asked for.
        GateError: The bundle does not agree with the original model, or not as
            closely as ``max_drop`` asks; or routed experts are slower than a static model, or worse.
        OutputExistsError: ``path`` exists and may not be replaced.
        MissingExtraError: What runs the bundle here is not installed.
    """
    device = load_target(target)
    routed = loaded.routing is not None
    default = "fp32" if routed else device.default_precision
    chosen = default if precision == "auto" else precision
    check_precision(device, chosen, table_bits)
    check_routed(loaded, device, chosen)
    least = ROUTED_DB if routed else TOLERANCE_DB[chosen]
    tolerance = least if min_snr_db is None else min_snr_db
    wrap(loaded, layer=token_embeddings)  # a task without bundles is refused at once
    predicted = fit(loaded, device, chosen)
    if device.runtime == "openvino":
        require("openvino", "openvino")
    coder = _find_coder(loaded)
    if codes_output and coder is None:
        raise ExportError(
            f"{loaded.name} has no codes that its graph could give. "
            "Fit them first: edgelm compress MODEL -o CKPT --codes 256."
        )
    with new_folder(path, marker=MANIFEST, force=force) as folder:
        progress("tokenizer and golden examples")
        device_tokenizer(loaded).save(str(folder / TOKENIZER))
        examples = golden_examples(loaded)
        save_golden(folder, examples)
        progress("ONNX graph")
        options: dict[str, Any] = {
            "token_embeddings": token_embeddings,
            "block": block,
            "table_bits": table_bits,
            "max_drop": max_drop,
            "keep": keep,
            "search": precision == "auto" and chosen == "int8" and max_drop is not None,
        }
        written = _write_graph(
            loaded, device, chosen, folder, calibration, float_graph, timing, **options
        )
        graph = written.graph
        codes = None
        if coder is not None:
            codes = _write_codes(loaded, coder, folder, codes_output)
        if codes is not None and codes.output is not None:
            graph = read_graph(folder / GRAPH)
        if device.engine is not None:
            progress("rules of TensorRT")
            check_graph(folder / GRAPH, device.engine.tensorrt)
            write_plan(loaded, device, graph, chosen, folder)
        progress("verification")
        golden = GoldenInfo(
            GOLDEN_TEXTS, GOLDEN_ARRAYS, len(examples), tolerance, tolerance
        )
        manifest = make_manifest(
            loaded,
            graph,
            target=device.name,
            precision=chosen,
            golden=golden,
            codes=codes,
        )
        made = provenance.done(
            "export",
            (
                *provenance.EXPORTS,
                *(("openvino",) if device.runtime == "openvino" else ()),
            ),
            target=device.name,
            precision=chosen,
            options={
                "block": block,
                "table_bits": table_bits,
                "max_drop": max_drop,
                "token_embeddings": token_embeddings,
                "codes_output": codes_output,
                "domain": _domain(loaded),
            },
            calibration=None if chosen == "fp32" else _describe_data(calibration),
        )
        about = {
            **manifest.provenance,
            "lineage": provenance.extend(manifest.provenance["lineage"], made),
            "precision": dict(written.about),
            "fit": schema.plain(predicted),
        }
        manifest = replace(manifest, provenance=about)
        bundle = seal(folder, manifest)
        # What only the device can run is verified in ONNX Runtime, on the same graph.
        here = None if device.runtime == "openvino" else open_here(folder / GRAPH)
        engine = open_engine(bundle, session=here)
        measured = measure_snr(engine, examples)
        if measured < tolerance:
            raise GateError(
                f"The {chosen} graph of {loaded.name} agrees with the original model only to {measured:.1f} dB; "
                f"at least {tolerance:.1f} dB are due. Use a higher precision, or accept less with --min-snr-db."
            )
        golden = replace(
            manifest.golden, measured_snr_db=round(min(measured, 300.0), 2)
        )
        if manifest.embedding is not None:
            progress("ranges of the values")
            Embedder(engine).calibrate(samples.calibration()[::4]).save(
                folder / VECTOR_RANGES
            )
            info = replace(manifest.embedding, ranges=VECTOR_RANGES)
            manifest = replace(manifest, embedding=info)
        manifest = replace(manifest, golden=golden)
        write_sbom(folder, manifest)
        manifest = seal(folder, manifest).manifest
    return Bundle(path, manifest)


def golden_examples(loaded: LoadedModel) -> list[GoldenExample]:
    """What the original model gives for the golden texts, each alone, in float32."""
    module = wrap(loaded)
    pairs: list[tuple[str, str | None]]
    if isinstance(loaded.info, ScoringInfo) and loaded.info.inputs == "pair":
        pairs = [(row["text1"], row["text2"]) for row in samples.similarity()[::10]]
        pairs.append(("", ""))
    else:
        pairs = [(text, None) for text in samples.calibration()[::20]]
        pairs += [("", None), ("naïve café, 東京 and Ελλάδα 🙂 e\u0301", None)]
    examples = []
    for text, pair in pairs:
        # As lists: given one empty second text, transformers would drop the pair.
        tokens = loaded.tokenizer(
            [text],
            None if pair is None else [pair],
            truncation=True,
            max_length=loaded.max_length,
            return_tensors="pt",
        )
        ids, mask = tokens["input_ids"], tokens["attention_mask"]
        with torch.no_grad():
            output = module(ids, mask, tokens.get("token_type_ids"))[0]
        examples.append(
            GoldenExample(
                text, pair, ids[0].numpy(), output.float().numpy().astype(np.float32)
            )
        )
    return examples


def device_tokenizer(loaded: LoadedModel) -> Tokenizer:
    """A model's tokenizer as the device reads it; it says so where texts are cut on the left."""
    tokenizer = Tokenizer.from_str(loaded.tokenizer.backend_tokenizer.to_str())
    tokenizer.no_padding()
    tokenizer.no_truncation()
    if loaded.tokenizer.truncation_side == "left":
        tokenizer.enable_truncation(loaded.max_length, direction="left")
    return tokenizer


def _write_graph(
    loaded: LoadedModel,
    target: Target,
    precision: str,
    folder: Path,
    calibration: Calibration,
    source: Path | None,
    timing: Timing | None,
    *,
    token_embeddings: int | None,
    **options: Any,
) -> Written:
    with tempfile.TemporaryDirectory(
        dir=folder.parent, prefix=f".{folder.name}."
    ) as work:
        if source is None:
            source = Path(work) / GRAPH
            export_graph(
                loaded, source, target.opset, token_embeddings=token_embeddings
            )
        if loaded.routing is not None:
            return Written(*write_routed(loaded, source, folder, timing))
        return write_graph(
            loaded, target, precision, source, folder, calibration, **options
        )


def _find_coder(loaded: LoadedModel) -> Coder | None:
    """The coder in a model's folder, if there is one and embeddings for it."""
    if not isinstance(loaded.info, EmbeddingInfo):
        return None
    if not (loaded.folder / CODES).is_file():
        return None
    coder = load_coder(loaded.folder / CODES)
    if coder.dimension != loaded.info.dimension:
        raise ExportError(
            f"The codes of {loaded.folder} are for embeddings of {coder.dimension} dimensions; "
            f"the model's have {loaded.info.dimension}. Fit them again with edgelm compress --codes."
        )
    return coder


def _write_codes(
    loaded: LoadedModel, coder: Coder, folder: Path, in_graph: bool
) -> CodesInfo:
    """Pass a checkpoint's coder on to the bundle."""
    shutil.copyfile(loaded.folder / CODES, folder / CODES)
    if in_graph:
        add_codes(folder / GRAPH, coder, int(loaded.model.config.vocab_size))
    kind = read_json(loaded.folder / "edgelm.json").get("codes", {}).get("kind", "")
    output = OUTPUT if in_graph else None
    return CodesInfo(CODES, kind, coder.bits, coder.digest, output)


def make_manifest(
    loaded: LoadedModel,
    graph: Graph,
    *,
    target: str = "pytorch",
    precision: str = "fp32",
    golden: GoldenInfo = _NO_GOLDEN,
    codes: CodesInfo | None = None,
) -> Manifest:
    """What a bundle says of a model; a model that is no bundle runs under one too."""
    info: Mapping[str, Any] = {
        "embedding": loaded.info if isinstance(loaded.info, EmbeddingInfo) else None,
        "ner": loaded.info if isinstance(loaded.info, NerInfo) else None,
        "scoring": loaded.info if isinstance(loaded.info, ScoringInfo) else None,
    }
    tokenizer = loaded.tokenizer
    pad, segment = tokenizer.pad_token_id or 0, tokenizer.pad_token_type_id
    return Manifest(
        created_by=f"edgelm {edgelm.__version__}",
        task=loaded.task,  # type: ignore[arg-type]
        target=target,
        precision=precision,  # type: ignore[arg-type]
        model=ModelInfo(
            loaded.name, loaded.architecture, loaded.source_digest, loaded.steps
        ),
        graph=graph,
        tokenizer=TokenizerInfo(TOKENIZER, loaded.max_length, pad, segment),
        golden=golden,
        provenance=_provenance(loaded),
        codes=codes,
        **info,
    )


def _provenance(loaded: LoadedModel) -> dict[str, Any]:
    about = read_json(loaded.folder / "edgelm.json")
    return {
        "versions": provenance.versions(provenance.EXPORTS),
        "recipe": about.get("recipe"),
        "calibration_digest": about.get("calibration_digest"),
        "lineage": provenance.lineage_of(loaded),
    }


def _domain(loaded: LoadedModel) -> str | None:
    last = loaded.steps[-1] if loaded.steps else {}
    return str(last["name"]) if last.get("method") == "domain" else None


def _describe_data(calibration: Calibration) -> dict[str, Any]:
    texts = load_texts(calibration)
    return {
        "texts": calibration.texts,
        "count": len(texts),
        "seed": calibration.seed,
        "digest": text_digest(texts),
    }
