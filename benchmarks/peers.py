"""The peers of embedding_throughput.py: `minilm` in the best setting that their documents describe.

- sentence-transformers: PyTorch float32, batches of 32 by length (its default).
- torch int8: the same with `torch.ao.quantization.quantize_dynamic` of the linear layers.
- OpenVINO: converted by `openvino.convert_model`, from PyTorch or from the ONNX graph below; float32 means its
  default for the CPU (bfloat16 where the CPU computes in it), int8 is NNCF post-training quantisation with the
  transformer preset; 32 texts a batch by length, an asynchronous request for each core.
- fastembed: the ONNX graph below, in fastembed's own batches; its own Python runs it (fastembed_peer.py).
- ONNX Runtime: `torch.onnx.export` and `quantize_dynamic` per channel; 32 texts a batch by length, all cores.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from edgelm.calibration import Calibration, load_texts
from edgelm.models import locate
from edgelm.runtimes.engine import cores

Encode = Callable[[Sequence[str]], np.ndarray]
CORES = cores()


def sentence_transformers(work: Path) -> Encode:
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(locate("minilm")), device="cpu")
    return lambda texts: np.asarray(model.encode(list(texts)))


def torch_int8(work: Path) -> Encode:
    import torch
    from sentence_transformers import SentenceTransformer

    model = SentenceTransformer(str(locate("minilm")), device="cpu")
    torch.ao.quantization.quantize_dynamic(
        model, {torch.nn.Linear}, torch.qint8, inplace=True
    )
    return lambda texts: np.asarray(model.encode(list(texts)))


def openvino_fp32(work: Path) -> Encode:
    return _openvino(work / "openvino-fp32.xml")


def openvino_int8(work: Path) -> Encode:
    return _openvino(work / "openvino-int8.xml")


def openvino_int8_onnx(work: Path) -> Encode:
    return _openvino(work / "openvino-int8-onnx.xml")


def onnxruntime_fp32(work: Path) -> Encode:
    return _onnxruntime(work / "onnxruntime-fp32.onnx")


def onnxruntime_int8(work: Path) -> Encode:
    return _onnxruntime(work / "onnxruntime-int8.onnx")


PEERS: dict[str, tuple[Callable[[Path], Encode], str]] = {  # and its file
    "sentence-transformers fp32": (sentence_transformers, ""),
    "torch int8": (torch_int8, ""),
    "OpenVINO fp32": (openvino_fp32, "openvino-fp32.bin"),
    "OpenVINO int8": (openvino_int8, "openvino-int8.bin"),
    "OpenVINO int8, by way of ONNX": (
        openvino_int8_onnx,
        "openvino-int8-onnx.bin",
    ),
    "ONNX Runtime fp32": (onnxruntime_fp32, "onnxruntime-fp32.onnx"),
    "ONNX Runtime int8": (onnxruntime_int8, "onnxruntime-int8.onnx"),
}


def _tokenizer() -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(locate("minilm"))


def _tokens(tokenizer: Any, texts: Sequence[str]) -> dict[str, np.ndarray]:
    return dict(
        tokenizer(
            list(texts),
            padding=True,
            truncation=True,
            max_length=256,
            return_tensors="np",
        )
    )


def _pool(hidden: np.ndarray, mask: np.ndarray) -> np.ndarray:
    weights = mask[..., None].astype(np.float32)
    pooled = (hidden * weights).sum(1) / weights.sum(1)
    return pooled / np.linalg.norm(pooled, axis=1, keepdims=True)


def _chunks(texts: Sequence[str]) -> list[np.ndarray]:
    order = np.argsort([-len(text) for text in texts], kind="stable")
    return [order[i : i + 32] for i in range(0, len(order), 32)]


def _openvino(path: Path) -> Encode:
    import openvino

    model = openvino.Core().compile_model(
        str(path), "CPU", {"PERFORMANCE_HINT": "THROUGHPUT", "NUM_STREAMS": CORES}
    )
    single = openvino.Core().compile_model(
        str(path), "CPU", {"PERFORMANCE_HINT": "LATENCY"}
    )
    tokenizer = _tokenizer()

    def encode(texts: Sequence[str]) -> np.ndarray:
        if len(texts) == 1:
            feeds = _tokens(tokenizer, texts)
            return _pool(single(feeds)[0], feeds["attention_mask"])
        rows = np.zeros((len(texts), 384), np.float32)

        def done(request: Any, given: tuple[np.ndarray, np.ndarray]) -> None:
            rows[given[0]] = _pool(request.get_output_tensor(0).data, given[1])

        requests = openvino.AsyncInferQueue(model, CORES)
        requests.set_callback(done)
        for chunk in _chunks(texts):
            feeds = _tokens(tokenizer, [texts[i] for i in chunk])
            requests.start_async(feeds, (chunk, feeds["attention_mask"]))
        requests.wait_all()
        return rows

    return encode


def _onnxruntime(path: Path) -> Encode:
    import onnxruntime

    options = onnxruntime.SessionOptions()
    options.log_severity_level = 3
    session = onnxruntime.InferenceSession(
        str(path), options, providers=["CPUExecutionProvider"]
    )
    tokenizer = _tokenizer()

    def encode(texts: Sequence[str]) -> np.ndarray:
        rows = np.zeros((len(texts), 384), np.float32)
        for chunk in _chunks(texts):
            feeds = _tokens(tokenizer, [texts[i] for i in chunk])
            hidden = session.run(None, feeds)[0]
            rows[chunk] = _pool(hidden, feeds["attention_mask"])
        return rows

    return encode


def prepare_fastembed(work: Path) -> Path:
    """The folder that fastembed_peer.py reads, made of the ONNX graph."""
    folder, source = work / "fastembed", locate("minilm")
    folder.mkdir(exist_ok=True)
    shutil.copyfile(work / "onnxruntime-fp32.onnx", folder / "model.onnx")
    for name in ("config.json", "tokenizer.json", "special_tokens_map.json"):
        shutil.copyfile(source / name, folder / name)
    settings = json.loads((source / "tokenizer_config.json").read_text())
    settings["model_max_length"] = 256  # as everywhere here
    (folder / "tokenizer_config.json").write_text(json.dumps(settings))
    return folder


def prepare_peers(work: Path) -> None:
    """Make the peers' files that are not there yet."""
    if not (work / "onnxruntime-int8.onnx").exists():
        _prepare_onnxruntime(work)
    if not (work / "openvino-int8-onnx.xml").exists():
        _prepare_openvino(work)


def _example() -> dict[str, Any]:
    tokenizer = _tokenizer()
    texts = ["An example.", "One that is longer, so that there is padding."]
    return dict(tokenizer(texts, padding=True, return_tensors="pt"))


def _model() -> Any:
    from transformers import AutoModel

    return AutoModel.from_pretrained(locate("minilm")).eval()


def _prepare_onnxruntime(work: Path) -> None:
    import torch
    from onnxruntime.quantization import QuantType, quantize_dynamic

    example, axes = (
        _example(),
        {0: torch.export.Dim("batch"), 1: torch.export.Dim("tokens")},
    )
    names = list(example)
    torch.onnx.export(
        _model(),
        kwargs=example,
        dynamo=True,
        f=str(work / "onnxruntime-fp32.onnx"),
        input_names=names,
        dynamic_shapes=dict.fromkeys(names, axes),
        external_data=False,
    )
    quantize_dynamic(
        work / "onnxruntime-fp32.onnx",
        work / "onnxruntime-int8.onnx",
        weight_type=QuantType.QInt8,
        per_channel=True,
        extra_options={"DefaultTensorType": 1},
    )


def _prepare_openvino(work: Path) -> None:
    import nncf
    import openvino

    tokenizer = _tokenizer()
    texts = load_texts(Calibration(max_texts=300))
    from_torch = openvino.convert_model(_model(), example_input=_example())
    from_onnx = openvino.convert_model(work / "onnxruntime-fp32.onnx")
    openvino.save_model(from_torch, work / "openvino-fp32.xml", compress_to_fp16=False)
    for name, model in (("", from_torch), ("-onnx", from_onnx)):
        quantised = nncf.quantize(
            model,
            nncf.Dataset(texts, lambda text: _tokens(tokenizer, [text])),
            model_type=nncf.ModelType.TRANSFORMER,
            subset_size=len(texts),
        )
        openvino.save_model(quantised, work / f"openvino-int8{name}.xml")
