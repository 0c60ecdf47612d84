"""The command line, as a new user tries it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from edgelm.bundle import MANIFEST, open_bundle
from edgelm.cli import COMMANDS, cli

Bundles = Callable[..., Path]


def call(*args: object, stdin: bytes | None = None) -> Result:
    return CliRunner().invoke(cli, [str(arg) for arg in args], input=stdin)


def lines(result: Result) -> list[dict[str, Any]]:
    return [json.loads(line) for line in result.stdout.split("\n") if line]


def refused(result: Result, message: str, code: int = 1) -> None:
    """One sentence on stderr, no trace, the exit code."""
    assert result.exit_code == code, result.output
    assert "Traceback" not in result.output
    text = " ".join(result.stderr.split())
    assert message in text, text
    if code == 1:
        assert result.stderr.startswith("Error: ")
        assert len(result.stderr.strip().split("\n")) == 1


@pytest.fixture
def texts(tmp_path: Path) -> Path:
    path = tmp_path / "texts.txt"
    path.write_text(
        "the man plays a flute\nthe old river of paris\n" * 6, encoding="utf-8"
    )
    return path


@pytest.fixture
def checkpoint(tiny_embedding: Path, texts: Path, tmp_path: Path) -> Path:
    result = call(
        "compress",
        tiny_embedding,
        "-o",
        tmp_path / "ck",
        "--sparsity",
        "2:4",
        "--calibration",
        texts,
    )
    assert result.exit_code == 0, result.output
    return tmp_path / "ck"


@pytest.mark.parametrize("command", sorted(COMMANDS))
def test_every_command_has_help_with_an_example(command: str) -> None:
    result = call(command, "--help")
    assert result.exit_code == 0
    assert f"edgelm {command}" in result.output


def test_the_whole_line(checkpoint: Path, tmp_path: Path) -> None:
    made = call(
        "export",
        checkpoint,
        "--target",
        "cpu",
        "-o",
        tmp_path / "b",
        "--precision",
        "int8",
        "--json",
    )
    assert made.exit_code == 0, made.output
    assert lines(made)[0]["precision"] == "int8"
    checked = call("verify", tmp_path / "b", "--json")
    assert checked.exit_code == 0
    assert lines(checked)[0]["examples"] > 10
    ran = call("run", tmp_path / "b", "the man", "the woman")
    assert [row["text"] for row in lines(ran)] == ["the man", "the woman"]
    assert all(
        len(row["embedding"]) == 32 and not row["truncated"] for row in lines(ran)
    )
    about = lines(call("info", tmp_path / "b", "--json"))[0]
    assert about["model"]["steps"][0]["sparsity"] == "2:4"


def test_compress_reports_each_layer(
    tiny_embedding: Path, texts: Path, tmp_path: Path
) -> None:
    args = (
        "compress",
        tiny_embedding,
        "-o",
        tmp_path / "ck",
        "--sparsity",
        "0.5",
        "--calibration",
        texts,
    )
    result = call(*args, "--json", "--refine", "dsnot")
    rows = lines(result)
    assert len(rows) == 12
    assert all(row["sparsity"] == 0.5 and 0 < row["error"] < 1 for row in rows)
    about = json.loads((tmp_path / "ck" / "edgelm.json").read_text(encoding="utf-8"))
    assert about["report"] == rows
    assert about["recipe"]["steps"][0]["refine"] == "dsnot"
    assert "checkpoint" in call("info", tmp_path / "ck").stderr


def test_a_dry_run_prints_a_recipe_that_runs_the_same(
    tiny_embedding: Path, texts: Path, tmp_path: Path
) -> None:
    flags = (
        "--sparsity",
        "2:4",
        "--refine",
        "dsnot",
        "--calibration",
        texts,
        "--max-texts",
        "5",
        "--skip",
        "attention",
    )
    dry = call("compress", tiny_embedding, *flags, "--dry-run")
    assert dry.exit_code == 0
    recipe = tmp_path / "recipe.toml"
    recipe.write_text(dry.stdout, encoding="utf-8")
    again = call("compress", tiny_embedding, "--recipe", recipe, "--dry-run")
    assert again.stdout == dry.stdout
    as_json = lines(call("compress", tiny_embedding, *flags, "--dry-run", "--json"))[0]
    assert as_json["steps"][0]["skip"] == ["attention"]
    for name, extra in (("a", flags), ("b", ("--recipe", recipe))):
        assert (
            call("compress", tiny_embedding, *extra, "-o", tmp_path / name).exit_code
            == 0
        )
    weights = [(tmp_path / name / "model.safetensors").read_bytes() for name in "ab"]
    assert weights[0] == weights[1]


def test_a_flag_overrides_nothing_silently(tiny_embedding: Path, texts: Path) -> None:
    refused(
        call(
            "compress",
            tiny_embedding,
            "--recipe",
            texts,
            "--sparsity",
            "0.5",
            "--dry-run",
        ),
        "Give --recipe or what to do by flags, not both",
        code=2,
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("steps = []", "has no steps"),
        (
            "[[steps]]\nmethod = 'magic'",
            "there is no method 'magic'. Known methods: domains, factorllm, shrink, sparsify",
        ),
        (
            "[[steps]]\nmethod = 'sparsify'\nsparcity = 1",
            "step 1 has the unknown key 'sparcity'",
        ),
        (
            "[[steps]]\nmethod = 'sparsify'\nsparsity = 1.5",
            "must be a fraction of zeros in [0, 1)",
        ),
        (
            "[[steps]]\nmethod = 'sparsify'\nversion = 9",
            "'sparsify' has version 9; this edgelm reads 1",
        ),
        (
            "version = 2\n[[steps]]\nmethod = 'sparsify'",
            "has version 2; this edgelm reads version 1",
        ),
        ("[calibration]\nmax_texts = 0\n[[steps]]\nmethod = 'sparsify'", "'max_texts'"),
        ("colour = 1\n[[steps]]\nmethod = 'sparsify'", "unknown key 'colour'"),
        ("[[steps]\n", "is not TOML"),
        ("[[steps]]\nsparsity = 0.5", "lacks the key 'method'"),
    ],
)
def test_a_bad_recipe_is_named(tmp_path: Path, text: str, message: str) -> None:
    recipe = tmp_path / "r.toml"
    recipe.write_text(text, encoding="utf-8")
    refused(call("compress", "minilm", "--recipe", recipe, "--dry-run"), message)


def test_no_model(tmp_path: Path) -> None:
    refused(
        call("compress", "no/such/model", "-o", tmp_path / "x", "--sparsity", "0.5"),
        "There is no folder no/such/model",
    )
    refused(
        call("compress", tmp_path, "-o", tmp_path / "x", "--sparsity", "0.5"),
        "holds no config.json",
    )
    assert not (tmp_path / "x").exists()


def test_nothing_to_do_or_nowhere_to_put_it() -> None:
    refused(call("compress", "minilm", "-o", "x"), "Say what to do: --preset", code=2)
    refused(
        call("compress", "minilm", "--sparsity", "0.5"),
        "Say where to write the checkpoint",
        code=2,
    )


@pytest.mark.parametrize(
    ("flags", "message", "code"),
    [
        (
            ("--budget", "0.5", "--ffn-keep", "0.5"),
            "--budget goes with --ffn-keep auto",
            2,
        ),
        (("--experts", "8"), "Give --experts N with --active K", 2),
        (("--experts", "many", "--active", "2"), "Give --experts N with --active K", 2),
        (("--active", "2"), "Give --experts N with --active K", 2),
        (
            ("--experts", "8", "--active", "4", "--ffn-keep", "0.5"),
            "leave --ffn-keep out",
            2,
        ),
        (("--experts", "auto", "--active", "4"), "auto without --active", 2),
        (("--experts", "auto", "--ffn-keep", "0.3"), "in eighths", 2),
        (("--preset", "balanced", "--ffn-keep", "0.5"), "--preset says how many", 2),
        (("--ffn-keep", "half"), "'keep'", 1),
        (("--ffn-keep", "1.5"), "'keep'", 1),
        (("--heads-keep", "0"), "'keep'", 1),
        (("--experts", "4", "--active", "5"), "'keep'", 1),
        (("--experts", "7", "--active", "3"), "7 experts do not divide", 1),
        (("--experts", "16", "--active", "15"), "Give more calibration text", 1),
    ],
)
def test_flags_of_shrinking_that_do_not_fit(
    tiny_embedding: Path, tmp_path: Path, flags: Any, message: str, code: int
) -> None:
    texts = tmp_path / "t.txt"
    texts.write_text("old\n", "utf-8")
    args = ("compress", tiny_embedding, "-o", tmp_path / "x", "--calibration", texts)
    refused(call(*args, *flags), message, code=code)
    assert not (tmp_path / "x").exists()


def test_shrinking_by_flags(tiny_embedding: Path, tmp_path: Path) -> None:
    """Heads, neurons and zeros in one go; the judge of experts; the same as a recipe."""
    flags = (
        "--heads-keep",
        "0.5",
        "--ffn-keep",
        "auto",
        "--budget",
        "0.5",
        "--sparsity",
        "0.5",
    )
    shown = call("compress", tiny_embedding, *flags, "--dry-run")
    recipe = tmp_path / "r.toml"
    recipe.write_text(shown.stdout, "utf-8")
    for name, args in (("a", flags), ("b", ("--recipe", recipe))):
        done = call("compress", tiny_embedding, "-o", tmp_path / name, *args)
        assert done.exit_code == 0, done.stderr
    weights = [(tmp_path / n / "model.safetensors").read_bytes() for n in "ab"]
    assert weights[0] == weights[1]
    steps = json.loads((tmp_path / "a" / "edgelm.json").read_text())["steps"]
    assert [step["method"] for step in steps] == ["shrink", "shrink", "sparsify"]

    judged = call(
        "compress",
        tiny_embedding,
        "-o",
        tmp_path / "c",
        "--experts",
        "2",
        "--active",
        "1",
    )
    assert judged.exit_code == 0, judged.stderr
    assert "the result is static" in judged.stderr.lower()
    page = (tmp_path / "c" / "report.html").read_text("utf-8")
    assert "Would routing do better?" in page


def test_an_empty_calibration_file(tiny_embedding: Path, tmp_path: Path) -> None:
    empty = tmp_path / "empty.txt"
    empty.touch()
    args = (
        "compress",
        tiny_embedding,
        "-o",
        tmp_path / "x",
        "--sparsity",
        "0.5",
        "--calibration",
    )
    refused(call(*args, empty), "holds no text")
    refused(call(*args, tmp_path / "none.txt"), "Cannot read")
    assert not (tmp_path / "x").exists()


@pytest.mark.parametrize(
    ("sparsity", "message"),
    [("1.5", "Got 1.5"), ("5:4", "Got 5:4"), ("many", "Got many")],
)
def test_a_sparsity_out_of_range(
    tiny_embedding: Path, tmp_path: Path, sparsity: str, message: str
) -> None:
    refused(
        call("compress", tiny_embedding, "-o", tmp_path / "x", "--sparsity", sparsity),
        message,
    )


def test_a_pattern_that_does_not_fit(texts: Path, tmp_path: Path) -> None:
    from transformers import BertModel

    from tests.conftest import save_tiny, tiny_config

    odd = BertModel(
        tiny_config(hidden_size=30, num_attention_heads=3, intermediate_size=50)
    )
    folder = save_tiny(tmp_path / "odd", odd)
    args = (
        "compress",
        folder,
        "-o",
        tmp_path / "x",
        "--sparsity",
        "3:4",
        "--calibration",
        texts,
    )
    refused(
        call(*args),
        "needs a multiple of 4 inputs; encoder.layer.0.attention.self.query has 30",
    )
    assert not (tmp_path / "x").exists()


def test_an_unknown_target(tiny_embedding: Path, tmp_path: Path) -> None:
    refused(
        call("export", tiny_embedding, "--target", "toaster", "-o", tmp_path / "b"),
        "no target 'toaster'. Known targets: cpu,",
    )
    refused(call("targets", "toaster"), "no target 'toaster'")


def test_an_existing_output_is_kept(
    checkpoint: Path, tiny_embedding: Path, texts: Path, tmp_path: Path
) -> None:
    before = (checkpoint / "edgelm.json").read_bytes()
    args = (
        "compress",
        tiny_embedding,
        "-o",
        checkpoint,
        "--sparsity",
        "0.25",
        "--calibration",
        texts,
    )
    refused(call(*args), "exists already")
    assert (checkpoint / "edgelm.json").read_bytes() == before
    assert call(*args, "--force").exit_code == 0
    assert (checkpoint / "edgelm.json").read_bytes() != before
    refused(
        call("export", checkpoint, "--target", "cpu", "-o", tmp_path), "exists already"
    )
    refused(
        call("export", checkpoint, "--target", "cpu", "-o", tmp_path, "--force"),
        "was not made by edgelm",
    )


@pytest.mark.parametrize("command", [[], *([name] for name in COMMANDS)])
def test_help_is_fit_to_be_read(command: list[str]) -> None:
    text = call(*command, "--help").stdout
    assert "Usage: " in text
    assert "\\b" not in text
    assert "``" not in text


@pytest.mark.parametrize(("blocks", "left"), [(0, 0), (1, 1)])
def test_an_interrupted_compress_leaves_only_what_the_next_can_use(
    tiny_embedding: Path, tmp_path: Path, blocks: int, left: int
) -> None:
    """SIGINT as Ctrl-C sends it, before and after a block is finished."""
    code = (
        "import os, signal, sys\n"
        "from edgelm.compress import blocks\n"
        "finish, done = blocks.Blocks.finish, []\n"
        "def interrupted(*args):\n"
        f"    if len(done) == {blocks}: os.kill(os.getpid(), signal.SIGINT)\n"
        "    done.append(finish(*args))\n"
        "blocks.Blocks.finish = interrupted\n"
        "from edgelm.cli import main\nmain()\n"
    )
    output = tmp_path / "ck"
    flags = ["compress", str(tiny_embedding), "-o", str(output), "--sparsity", "0.5"]
    process = subprocess.run(
        [sys.executable, "-c", code, *flags], capture_output=True, text=True
    )
    assert process.returncode == 130
    assert "Traceback" not in process.stderr
    assert "goes on where this one stopped" in process.stderr
    assert len(list(tmp_path.glob(".ck*"))) == left
    assert call(*flags).exit_code == 0
    assert list(tmp_path.glob("*ck*")) == [output]
    assert not list(tmp_path.glob(".ck*"))


def test_a_bundle_with_one_byte_changed(tiny_bundle: Path) -> None:
    path = tiny_bundle / "model.onnx"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(bytes(data))
    for command in ("verify", "run", "info"):
        extra = ("text",) if command == "run" else ()
        refused(call(command, tiny_bundle, *extra), "model.onnx is damaged")


def test_a_bundle_from_a_newer_version(tiny_bundle: Path) -> None:
    path = tiny_bundle / MANIFEST
    data = json.loads(path.read_text(encoding="utf-8"))
    path.write_text(json.dumps({**data, "format_version": 4}), encoding="utf-8")
    refused(
        call("run", tiny_bundle, "text"),
        "bundle format 4; this edgelm reads up to 3. Update edgelm",
    )


def test_verify_fails_with_exit_code_3(bundles: Bundles, tmp_path: Path) -> None:
    """The graph of one model with the golden examples of another."""
    from dataclasses import replace

    from edgelm.bundle import seal

    folder = shutil.copytree(bundles("embedding"), tmp_path / "b")
    manifest = open_bundle(folder).manifest
    (folder / MANIFEST).unlink()
    seal(folder, replace(manifest, golden=replace(manifest.golden, min_snr_db=500.0)))
    refused(call("verify", folder), "its manifest demands 500.0 dB", code=3)


def test_a_text_of_100_000_characters(bundles: Bundles) -> None:
    text = "the man plays " * 7200
    (row,) = lines(call("run", bundles("embedding"), text))
    assert row["truncated"]
    (row,) = lines(call("run", bundles("ner"), text))
    assert row["text"] == text


def test_empty_text(bundles: Bundles) -> None:
    (row,) = lines(call("run", bundles("embedding"), ""))
    assert len(row["embedding"]) == 32
    (row,) = lines(call("run", bundles("ner"), ""))
    assert row["entities"] == []


def test_stdin_streams_lines_and_names_bad_ones(bundles: Bundles) -> None:
    result = call(
        "run", bundles("embedding"), "--input", "-", stdin=b"the man\n\nparis\n"
    )
    assert [row["text"] for row in lines(result)] == ["the man", "", "paris"]
    result = call(
        "run",
        bundles("embedding"),
        "--input",
        "-",
        stdin=b"good\nbad \xff\xfe\nlater\n",
    )
    assert [row["text"] for row in lines(result)] == ["good"]
    refused(result, "stdin, line 2: byte 0xff at position 5 is not UTF-8")


def test_input_files(bundles: Bundles, tmp_path: Path) -> None:
    plain = tmp_path / "a.txt"
    plain.write_text("the man\r\nparis \u2028 still one line\n", encoding="utf-8")
    found = [
        row["text"]
        for row in lines(call("run", bundles("embedding"), "--input", plain))
    ]
    assert found == ["the man", "paris \u2028 still one line"]
    rows = tmp_path / "a.jsonl"
    rows.write_text('{"text": "the man\\nand"}\n{"text": ""}\n', encoding="utf-8")
    found = [row["text"] for row in lines(call("run", bundles("ner"), "--input", rows))]
    assert found == ["the man\nand", ""]
    rows.write_text('{"text": "ok"}\n{"txt": ""}\n', encoding="utf-8")
    result = call("run", bundles("ner"), "--input", rows)
    assert len(lines(result)) == 1
    refused(result, "line 2: there is no string field text")
    refused(call("run", bundles("ner"), "--input", tmp_path / "none"), "Cannot read")


def test_pairs(bundles: Bundles, tmp_path: Path) -> None:
    bundle = bundles("scorer")
    (row,) = lines(call("run", bundle, "the man", "the woman"))
    assert (row["text1"], row["text2"]) == ("the man", "the woman")
    assert 0 <= row["score"] <= 1
    refused(call("run", bundle, "the man"), "an even number of texts", code=2)
    result = call("run", bundle, "--input", "-", stdin=b"a\tb\nno tab\n")
    assert len(lines(result)) == 1
    refused(result, "line 2: this bundle scores pairs; put one tab")
    rows = tmp_path / "p.jsonl"
    rows.write_text('{"text1": "a", "text2": "b"}\n', encoding="utf-8")
    assert lines(call("run", bundle, "--input", rows))[0]["text2"] == "b"


def test_texts_and_input_together(bundles: Bundles) -> None:
    refused(
        call("run", bundles("ner"), "text", "--input", "-"),
        "Give texts or --input, not both",
        code=2,
    )


def test_a_pipe_is_answered_line_by_line(bundles: Bundles) -> None:
    """An interactive reader gets its answer before stdin ends."""
    command = [
        sys.executable,
        "-m",
        "edgelm",
        "run",
        str(bundles("embedding")),
        "--input",
        "-",
    ]
    process = subprocess.Popen(
        command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
    )
    assert process.stdin is not None
    assert process.stdout is not None
    for text in ("the man", "paris"):
        process.stdin.write(text + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["text"] == text
    process.stdin.close()
    assert process.wait() == 0
    process.stdout.close()


def test_a_closed_pipe_is_no_error(bundles: Bundles) -> None:
    command = f"yes the man | head -5000 | {sys.executable} -m edgelm run {bundles('embedding')} --input - | head -1"
    done = subprocess.run(
        ["bash", "-c", command], capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout)["text"] == "the man"
    assert "Traceback" not in done.stderr


def test_the_fastest_runtime_is_measured(tiny_embedding: Path, tmp_path: Path) -> None:
    target = ("--target", "cpu-fastest", "--precision", "fp32")
    result = call("export", tiny_embedding, *target, "-o", tmp_path / "b", "--json")
    assert result.exit_code == 0
    assert lines(result)[0]["target"] in ("cpu", "cpu-openvino")
    assert "cpu-openvino: " in result.stderr
    assert "texts a second on this machine" in result.stderr


@pytest.mark.parametrize(
    ("preset", "keep"), [("accurate", 0.75), ("balanced", 0.5), ("smallest", 0.25)]
)
def test_presets_are_recipes(tiny_embedding: Path, preset: str, keep: float) -> None:
    recipe = lines(
        call("compress", tiny_embedding, "--preset", preset, "--dry-run", "--json")
    )[0]
    (step,) = recipe["steps"]
    assert (step["part"], step["keep"]) == ("neurons", keep)


def test_workers_answer_in_order(bundles: Bundles, tmp_path: Path) -> None:
    source = tmp_path / "texts.txt"
    texts = [f"book {'river ' * (i % 7)}{i}" for i in range(300)]
    source.write_text("\n".join(texts), encoding="utf-8")
    bundle = bundles("embedding")
    one = lines(call("run", bundle, "--input", source))
    two = lines(call("run", bundle, "--input", source, "--workers", "2"))
    assert [row["text"] for row in two] == texts
    for a, b in zip(one, two, strict=True):
        assert a["embedding"] == pytest.approx(b["embedding"], abs=1e-5)


def test_targets_lists_and_shows() -> None:
    names = [row["name"] for row in lines(call("targets", "--json"))]
    assert "jetson-orin-nano" in names
    assert "jetson" in call("targets").stderr
    assert "Jetson Orin Nano" in call("targets", "jetson").stdout


def test_jetson_says_which_member(tiny_embedding: Path, tmp_path: Path) -> None:
    result = call("export", tiny_embedding, "--target", "jetson", "-o", tmp_path / "b")
    assert result.exit_code == 0
    assert "exporting for jetson-orin-nano-4gb: this machine is no mem" in result.stderr


def test_targets_predicts_a_fit(tiny_embedding: Path) -> None:
    (row,) = lines(
        call("targets", "jetson-orin-nano", "--fit", tiny_embedding, "--json")
    )
    assert row["build_mib"] > row["run_mib"] > row["weights_mib"]
    shown = call("targets", "jetson-xavier-nx", "--fit", tiny_embedding).stderr
    assert "MiB to run of 8192 MiB" in shown
    refused(
        call(
            "targets",
            "jetson-xavier-nx",
            "--fit",
            tiny_embedding,
            "--precision",
            "int8",
        ),
        "has the precisions fp32",
    )
    refused(call("targets", "--fit", tiny_embedding), "needs the name", code=2)


def test_lint_names_what_tensorrt_refuses(bundles: Bundles, tmp_path: Path) -> None:
    good, bad = bundles("embedding"), bundles("embedding", "int8")
    assert "nothing that TensorRT 10.3 is known to refuse" in call("lint", good).stderr
    result = call("lint", bad, "--json", "--tensorrt", "11.4.1")
    refused(result, "breaks", code=3)
    assert {row["rule"] for row in lines(result)} >= {"operator"}
    refused(call("lint", tmp_path / "none.onnx"), "does not exist")


def test_doctor() -> None:
    rows = lines(call("doctor", "--json"))
    assert {row["what"] for row in rows} >= {
        "edgelm",
        "Python",
        "ONNX Runtime",
        "torch",
    }
    assert all(
        row["state"] == "ok"
        for row in rows
        if row["what"] in ("Python", "ONNX Runtime")
    )


def test_info_of_neither(tmp_path: Path) -> None:
    refused(call("info", tmp_path), "is neither a bundle")


def test_an_unknown_command() -> None:
    refused(call("compres"), "No such command", code=2)


@pytest.mark.parametrize("args", [["--version"], ["--help"]])
def test_the_module_runs(args: list[str]) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "edgelm", *args],
        capture_output=True,
        text=True,
        check=True,
    )
    assert "edgelm" in done.stdout
