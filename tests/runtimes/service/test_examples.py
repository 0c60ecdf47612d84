"""The examples of docs/service.md run as printed, against a server."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.runtimes.service.conftest import Server

DOCUMENT = Path(__file__).parents[3] / "docs" / "service.md"
ADDRESS = "http://127.0.0.1:8080"
BLOCKS = [
    (language, code)
    for language, code in re.findall(
        r"```(sh|python)\n(.*?)```", DOCUMENT.read_text("utf-8"), re.DOTALL
    )
    if ADDRESS in code
]


def test_there_are_examples_for_every_client() -> None:
    assert [language for language, _ in BLOCKS] == ["sh", "python", "python", "python"]


@pytest.mark.parametrize(("language", "code"), BLOCKS)
def test_an_example_runs_as_printed(server: Server, language: str, code: str) -> None:
    code = code.replace(ADDRESS, server.url)
    if language == "python":
        environment = {
            **os.environ,
            "HF_HUB_OFFLINE": "0",
        }  # only this machine is asked
        subprocess.run([sys.executable, "-c", code], check=True, env=environment)
        return
    commands = re.findall(r"^curl .*?(?<!\\)$", code, re.MULTILINE | re.DOTALL)
    assert len(commands) == code.count("curl ")
    for command in commands:
        quiet = command.replace("curl ", "curl -sS --fail-with-body ", 1)
        done = subprocess.run(["bash", "-c", quiet], capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        json.loads(done.stdout)
