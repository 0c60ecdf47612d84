"""Every architecture, in memory and streamed; resuming after a kill."""

from __future__ import annotations

import copy
import json
import os
import platform
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from safetensors.torch import load_file

from edgelm import checkpoint, layers
from edgelm.calibration import Batch, Calibration
from edgelm.compress import Blocks, Sparsify, compress, sequential
from edgelm.compress.patterns import check_mask, parse_pattern
from edgelm.layers import ARCHITECTURES, weight_matrix
from edgelm.models import load_model
from edgelm.pipeline import compress_model
from edgelm.recipe import Recipe
from tests.conftest import save_tiny

COMMON = {
    "vocab_size": 65,
    "hidden_size": 32,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "intermediate_size": 48,
    "max_position_embeddings": 40,
    "pad_token_id": 0,
}
GROUPED = {**COMMON, "num_key_value_heads": 2, "head_dim": 8}
TOKENS = {"bos_token_id": 2, "eos_token_id": 3}
DEBERTA = {
    "relative_attention": True,
    "pos_att_type": ["c2p", "p2c"],
    "position_buckets": 8,
    "norm_rel_ebd": "layer_norm",
    "share_att_key": True,
    "position_biased_input": False,
    "type_vocab_size": 0,
}


def encoder(config: Any) -> Any:
    return tf.AutoModel.from_config(config)


def decoder(config: Any) -> Any:
    return tf.AutoModelForCausalLM.from_config(config)


T5 = {
    "vocab_size": 65,
    "d_model": 32,
    "d_kv": 8,
    "d_ff": 48,
    "num_layers": 3,
    "num_heads": 4,
    "pad_token_id": 0,
}
MODELS: dict[str, Callable[[], Any]] = {
    "albert": lambda: encoder(tf.AlbertConfig(**COMMON, embedding_size=16)),
    "bert": lambda: encoder(tf.BertConfig(**COMMON)),
    "camembert": lambda: encoder(tf.CamembertConfig(**COMMON)),
    "deberta-v2": lambda: encoder(tf.DebertaV2Config(**COMMON, **DEBERTA)),
    "distilbert": lambda: encoder(
        tf.DistilBertConfig(
            vocab_size=65,
            dim=32,
            n_layers=3,
            n_heads=4,
            hidden_dim=48,
            max_position_embeddings=40,
        )
    ),
    "electra": lambda: encoder(tf.ElectraConfig(**COMMON, embedding_size=16)),
    "ernie": lambda: encoder(tf.ErnieConfig(**COMMON)),
    "modernbert": lambda: encoder(
        tf.ModernBertConfig(
            **COMMON,
            **TOKENS,
            cls_token_id=2,
            sep_token_id=3,
            global_attn_every_n_layers=2,
            local_attention=8,
        )
    ),
    "mpnet": lambda: encoder(tf.MPNetConfig(**COMMON)),
    "roberta": lambda: encoder(tf.RobertaConfig(**COMMON)),
    "xlm-roberta": lambda: encoder(tf.XLMRobertaConfig(**COMMON)),
    "t5": lambda: tf.T5EncoderModel(tf.T5Config(**T5)),
    "mt5": lambda: tf.MT5EncoderModel(tf.MT5Config(**T5)),  # with a gate
    "gemma": lambda: decoder(tf.GemmaConfig(**GROUPED, **TOKENS)),
    "gemma2": lambda: decoder(tf.Gemma2Config(**GROUPED, **TOKENS, sliding_window=8)),
    "gemma3_text": lambda: decoder(
        tf.Gemma3TextConfig(**GROUPED, **TOKENS, sliding_window=8)
    ),
    "gpt2": lambda: decoder(
        tf.GPT2Config(
            vocab_size=65,
            n_embd=32,
            n_layer=3,
            n_head=4,
            n_inner=48,
            n_positions=40,
            **TOKENS,
        )
    ),
    "llama": lambda: decoder(tf.LlamaConfig(**GROUPED, **TOKENS)),
    "mistral": lambda: decoder(tf.MistralConfig(**GROUPED, **TOKENS, sliding_window=8)),
    "opt": lambda: decoder(
        tf.OPTConfig(
            vocab_size=65,
            hidden_size=32,
            num_hidden_layers=3,
            num_attention_heads=4,
            ffn_dim=48,
            max_position_embeddings=40,
            word_embed_proj_dim=32,
            pad_token_id=0,
            **TOKENS,
        )
    ),
    "phi": lambda: decoder(tf.PhiConfig(**COMMON, **TOKENS)),
    "qwen2": lambda: decoder(
        tf.Qwen2Config(
            **{k: v for k, v in GROUPED.items() if k != "head_dim"}, **TOKENS
        )
    ),
    "qwen3": lambda: decoder(tf.Qwen3Config(**GROUPED, **TOKENS)),
}


def batches() -> list[Batch]:
    """Padded on the right, longer than the sliding windows."""
    made = []
    for rows, length in ((3, 20), (4, 9)):
        ids = torch.randint(5, 60, (rows, length))
        mask = torch.ones(rows, length, dtype=torch.int64)
        mask[1:, length - 4 :] = 0
        made.append(Batch(ids * mask, mask))
    return made


def outputs(model: Any, batch: Batch) -> torch.Tensor:
    with torch.no_grad():
        hidden = model.base_model(
            input_ids=batch.input_ids, attention_mask=batch.attention_mask
        ).last_hidden_state
    return hidden[batch.attention_mask.bool()]


def test_every_architecture_of_the_table_is_here() -> None:
    assert set(MODELS) == set(ARCHITECTURES)


@pytest.fixture(params=sorted(MODELS))
def name(request: pytest.FixtureRequest) -> str:
    return str(request.param)


@pytest.fixture
def folder(name: str, tmp_path: Path) -> Path:
    torch.manual_seed(0)
    return save_tiny(tmp_path / "model", MODELS[name]().eval())


def task_of(name: str) -> Any:
    model = MODELS[name]()
    return (
        "lm"
        if type(model).__name__.endswith(("CausalLM", "LMHeadModel"))
        else "embedding"
    )


def test_conformance(name: str, folder: Path, tmp_path: Path) -> None:
    """Exact sparsity; embeddings and heads untouched; streamed equals in memory;
    outputs finite; the reload gives the same."""
    task, sparsity = task_of(name), 0.6 if name in ("gpt2", "t5", "llama") else "2:4"
    whole, streamed = (load_model(str(folder), task, stream=s) for s in (False, True))
    assert streamed.weights is not None
    dense = {k: v.clone() for k, v in whole.model.state_dict().items()}
    sample = batches()
    step = Sparsify(sparsity=sparsity)
    (tmp_path / "j").mkdir()
    in_memory = Blocks(whole.model)
    on_disk = Blocks(streamed.model, source=streamed.weights, journal=tmp_path / "j")
    rows = [compress(b, [step], sample, sample) for b in (in_memory, on_disk)]
    for one, other in zip(*rows, strict=True):
        assert {**one, "seconds": 0} == {**other, "seconds": 0}
    expected = len(layers.of_config(whole.model.config).linears) * len(in_memory)
    assert len(rows[0]) == expected

    touched = set()
    for path, block in layers.blocks(whole.model):
        for inner, linear in layers.linears(whole.model, block):
            check_mask(weight_matrix(linear) != 0, parse_pattern(sparsity))
            touched |= {f"{path}.{inner}.weight", f"{path}.{inner}.bias"}
    for key, value in whole.model.state_dict().items():
        assert key in touched or torch.equal(value, dense[key]), key
    assert bool(torch.isfinite(outputs(whole.model, sample[0])).all())

    stored = dict(on_disk.stored(0))
    state = whole.model.state_dict()
    for key, tensor in stored.items():
        found = streamed.weights.find(key, whole.model) and next(
            k
            for k in (
                key,
                f"{whole.model.base_model_prefix}.{key}",
                key.removeprefix(f"{whole.model.base_model_prefix}."),
            )
            if k in state
        )
        assert torch.equal(tensor, state[found]), key


def test_reload_gives_the_same(name: str, folder: Path, tmp_path: Path) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\nan old book\n" * 9, "utf-8")
    recipe = Recipe(Calibration(str(texts)), (Sparsify(sparsity="2:4"),))
    task = task_of(name)
    compress_model(str(folder), recipe, tmp_path / "ck", task=task)
    assert not list(tmp_path.glob(".ck.*"))
    model = load_model(str(tmp_path / "ck"), task).model
    for _, block in layers.blocks(model):
        for _, linear in layers.linears(model, block):
            check_mask(weight_matrix(linear) != 0, parse_pattern("2:4"))
    assert bool(torch.isfinite(outputs(model, batches()[0])).all())


def test_the_flow_through_the_blocks_is_the_forward_pass(
    name: str, folder: Path
) -> None:
    """What `sequential` feeds to the last block is what the model itself would."""
    from edgelm.compress import sequential

    model = load_model(str(folder), task_of(name)).model
    sample = batches()
    seen: list[torch.Tensor] = []
    _, last = layers.blocks(model)[-1]
    handle = last.register_forward_hook(
        lambda _, args, output: seen.append(
            output if isinstance(output, torch.Tensor) else output[0]
        )
    )
    with torch.no_grad():
        for batch in sample:
            outputs(model, batch)
    handle.remove()
    if name == "albert":  # one block, three calls a batch: the third is the last
        seen = seen[2::3]
    with torch.no_grad():
        flows = sequential.start(model, sample)
        for index, (_, block) in enumerate(layers.blocks(model)):
            sequential.advance_(block, index, flows)
    for flow, due, batch in zip(flows, seen, sample, strict=True):
        real = batch.attention_mask.bool()
        torch.testing.assert_close(flow.hidden[real], due[real], rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "bert"])
def test_half_precision_stays_and_is_computed_in_float32(
    name: str, tmp_path: Path, dtype: torch.dtype
) -> None:
    torch.manual_seed(0)
    folder = save_tiny(tmp_path / "m", MODELS[name]().eval().to(dtype))
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\nan old book\n" * 9, "utf-8")
    recipe = Recipe(Calibration(str(texts)), (Sparsify(sparsity="2:4"),))
    compress_model(str(folder), recipe, tmp_path / "ck", task=task_of(name))
    before = load_file(folder / "model.safetensors")
    after = load_file(tmp_path / "ck" / "model.safetensors")
    assert set(before) == set(after)
    assert {t.dtype for t in after.values()} == {dtype}
    assert load_model(str(tmp_path / "ck"), task_of(name)).model.dtype == dtype


def test_shards_are_written_as_transformers_reads_them(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(checkpoint, "SHARD_BYTES", 20_000)
    folder = save_tiny(tmp_path / "m", MODELS["llama"]().eval())
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\n" * 9, "utf-8")
    recipe = Recipe(Calibration(str(texts)), (Sparsify(sparsity=0.5),))
    compress_model(str(folder), recipe, tmp_path / "ck")
    index = json.loads(
        (tmp_path / "ck" / "model.safetensors.index.json").read_text("utf-8")
    )
    assert len(set(index["weight_map"].values())) > 2
    tf.AutoModelForCausalLM.from_pretrained(tmp_path / "ck")
    again = load_model(str(tmp_path / "ck"), stream=True)
    assert again.weights is not None


def test_two_streamed_steps(tmp_path: Path) -> None:
    torch.manual_seed(0)
    folder = save_tiny(tmp_path / "m", MODELS["bert"]().eval())
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\n" * 9, "utf-8")
    steps = (Sparsify(sparsity="4:8", repair="bias"), Sparsify(sparsity="2:4"))
    compress_model(str(folder), Recipe(Calibration(str(texts)), steps), tmp_path / "ck")
    about = json.loads((tmp_path / "ck" / "edgelm.json").read_text("utf-8"))
    assert [s["sparsity"] for s in about["steps"]] == ["4:8", "2:4"]
    assert {row["step"] for row in about["report"]} == {0, 1}
    model = load_model(str(tmp_path / "ck")).model
    groups = model.encoder.layer[0].output.dense.weight.reshape(-1, 4)
    assert int((groups != 0).sum(dim=1).max()) <= 2


KILLED = """
import os, signal, sys
from pathlib import Path
from edgelm.calibration import Calibration
from edgelm.compress import Blocks, Sparsify
from edgelm.pipeline import compress_model
from edgelm.recipe import Recipe

folder, texts, output, blocks = sys.argv[1:]
finish = Blocks.finish
count = 0

def counting(self, *args):
    global count
    finish(self, *args)
    count += 1
    if count == int(blocks):
        os.kill(os.getpid(), signal.SIGKILL)

Blocks.finish = counting
steps = (Sparsify(sparsity="4:8"), Sparsify(sparsity="1:4", refine="swaps"))
compress_model(folder, Recipe(Calibration(texts), steps), Path(output))
"""


def test_a_killed_run_resumes_to_the_identical_result(tmp_path: Path) -> None:
    """kill -9 after the second block of the second step."""
    torch.manual_seed(0)
    folder = save_tiny(tmp_path / "m", MODELS["roberta"]().eval())
    texts = tmp_path / "t.txt"
    texts.write_text("the man plays a flute in paris\nan old book\n" * 9, "utf-8")

    def run(output: Path, blocks: int) -> int:
        arguments = [str(folder), str(texts), str(output), str(blocks)]
        command = [sys.executable, "-c", KILLED, *arguments]
        environment = {**os.environ, "OMP_NUM_THREADS": "1"}
        return subprocess.run(command, check=False, env=environment).returncode

    assert run(tmp_path / "whole", 0) == 0
    assert run(tmp_path / "resumed", 5) == -signal.SIGKILL
    assert not (tmp_path / "resumed").exists()
    (journal,) = tmp_path.glob(".resumed.*.partial")
    assert len(list(journal.glob("*.json"))) == 5
    assert run(tmp_path / "resumed", 0) == 0
    assert not list(tmp_path.glob(".resumed.*"))
    one, other = (tmp_path / n / "model.safetensors" for n in ("whole", "resumed"))
    assert one.read_bytes() == other.read_bytes()


def test_a_model_in_memory_resumes_too(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = MODELS["bert"]().eval()
    steps = (Sparsify(sparsity="2:4"),)
    sample = batches()
    journal = tmp_path / "j"
    journal.mkdir()
    whole, first, again = (copy.deepcopy(model) for _ in range(3))
    full = compress(Blocks(whole), steps, sample, sample)
    interrupted = Blocks(first, journal=journal)
    finish, done = interrupted.finish, []

    def stop(*args: Any) -> None:
        finish(*args)
        done.append(args)
        if len(done) == 2:
            raise KeyboardInterrupt

    interrupted.finish = stop  # type: ignore[method-assign]
    with pytest.raises(KeyboardInterrupt):
        compress(interrupted, steps, sample, sample)
    resumed = compress(Blocks(again, journal=journal), steps, sample, sample)
    assert [{**r, "seconds": 0} for r in full] == [{**r, "seconds": 0} for r in resumed]
    for key, value in whole.state_dict().items():
        assert torch.equal(value, again.state_dict()[key])


def test_another_recipe_does_not_go_on_with_this_ones_journal(tmp_path: Path) -> None:
    from edgelm.compress.blocks import journal_folder

    one = journal_folder(tmp_path / "out", {"recipe": 1})
    assert journal_folder(tmp_path / "out", {"recipe": 1}) == one
    assert journal_folder(tmp_path / "out", {"recipe": 2}) != one


def test_spilled_hidden_states_change_nothing(tmp_path: Path) -> None:
    first, sample = MODELS["llama"]().eval(), batches()
    second = copy.deepcopy(first)
    steps = [Sparsify(sparsity=0.5, allocation="owl")]
    in_memory = compress(Blocks(first), steps, sample, sample)
    spilled = compress(Blocks(second, spill=tmp_path), steps, sample, sample)
    assert [{**r, "seconds": 0} for r in in_memory] == [
        {**r, "seconds": 0} for r in spilled
    ]
    for one, other in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(one, other)
    assert not list(tmp_path.iterdir())
    with torch.no_grad():
        flows = sequential.start(first, sample, tmp_path)
    assert flows
    assert all(flow.spilled for flow in flows)


_HOLD_AND_FREE = """
import sys, torch
from edgelm.streaming import give_memory_back
if sys.argv[1] == "back":
    give_memory_back()
large = torch.ones(6 << 20)
del large  # from its size on, 24 MiB, glibc would map buffers by default
pairs = [(torch.ones(2 << 20), torch.ones(25_000)) for _ in range(20)]
pairs = [small for _, small in pairs]
fields = dict(line.split(":") for line in open("/proc/self/status") if ":" in line)
print(int(fields["VmRSS"].split()[0]) // 1024)
"""


@pytest.mark.skipif(
    platform.libc_ver()[0] != "glibc", reason="about the allocator of glibc"
)
def test_freed_buffers_go_back_to_the_system() -> None:
    def resident_mib(which: str) -> int:
        command = [sys.executable, "-c", _HOLD_AND_FREE, which]
        return int(subprocess.run(command, capture_output=True, check=True).stdout)

    assert resident_mib("kept") - resident_mib("back") > 100
