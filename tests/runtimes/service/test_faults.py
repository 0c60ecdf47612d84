"""Keys, overload, clients that leave or dawdle, SIGTERM, and what cannot start."""

from __future__ import annotations

import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx2 as httpx

from edgelm.runtimes.service.server import listen
from tests.runtimes.service.conftest import serving

Bundles = Callable[..., Path]


def until(condition: Callable[[], bool]) -> None:
    while not condition():
        os.sched_yield()


def under_way(client: httpx.Client) -> int:
    count: int = client.get("/status").json()["inputs_under_way"]
    return count


def test_a_key_is_asked_for_in_the_shape_of_the_route(bundles: Bundles) -> None:
    arguments = [str(bundles("embedding"))]
    with serving(*arguments, EDGELM_API_KEY="k3y") as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            body = {"inputs": "the man", "input": "the man"}
            for wrong in (
                {},
                {"authorization": "Bearer k3z"},
                {"authorization": "k3y"},
            ):
                refused = client.post("/embed", json=body, headers=wrong)
                assert refused.status_code == 401
                assert refused.json()["error_type"] == "Unauthorized"
                for path in ("/metrics", "/status", "/openapi.json", "/info"):
                    assert client.get(path, headers=wrong).status_code == 401
            refused = client.post("/v1/embeddings", json=body)
            assert refused.json()["error"]["code"] == "invalid_api_key"
            right = {"authorization": "Bearer k3y"}
            assert client.post("/embed", json=body, headers=right).status_code == 200
            assert client.get("/health").status_code == 200
            assert client.get("/").status_code == 200
        assert server.stop() == 0


BIG = {"inputs": ["the old man plays a flute in the garden"] * 200}


def raw_post(url: str, body: Any) -> socket.socket:
    """A connection on which a request has been sent."""
    host, port = url.removeprefix("http://").split(":")
    data = json.dumps(body).encode()
    connection = socket.create_connection((host, int(port)), 60)
    head = f"POST /embed HTTP/1.1\r\nhost: x\r\ncontent-type: application/json\r\ncontent-length: {len(data)}\r\n\r\n"
    connection.sendall(head.encode() + data)
    return connection


def test_too_much_is_told_to_come_again_and_who_leaves_makes_room(
    bundles: Bundles,
) -> None:
    limits = [
        "--max-queue",
        "200",
        "--max-client-batch",
        "200",
        "--max-batch-tokens",
        "1",
    ]
    minilm = str(bundles("minilm", "int8"))
    with serving(minilm, *limits) as server:
        with httpx.Client(base_url=server.url, timeout=60) as client:
            leaving = raw_post(server.url, BIG)
            until(lambda: under_way(client) == 200)
            refused = client.post("/embed", json={"inputs": "the man"})
            assert refused.status_code == 429, refused.text
            assert refused.headers["retry-after"] == "1"
            assert refused.json()["error_type"] == "Overloaded"
            other = client.post("/v1/embeddings", json={"input": "the man"})
            assert other.status_code == 429
            assert other.json()["error"]["type"] == "rate_limit_error"
            leaving.close()
            until(lambda: under_way(client) == 0)
            waiting = client.get("/status").json()["models"][0]["waiting"]
            assert waiting == 0
            assert client.post("/embed", json={"inputs": "the man"}).status_code == 200
        assert server.stop() == 0
        lines = [line for line in server.log() if line.get("path") == "/embed"]
        assert [line["status"] for line in lines] == [429, 499, 200]


def test_a_request_that_dawdles_is_ended_and_holds_up_nobody(bundles: Bundles) -> None:
    with serving(str(bundles("embedding")), "--timeout", "1") as server:
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port)), 60) as slow:
            head = "POST /embed HTTP/1.1\r\nhost: x\r\ncontent-length: 100\r\n\r\n{"
            slow.sendall(head.encode())
            for _ in range(5):
                found = httpx.post(f"{server.url}/embed", json={"inputs": "the man"})
                assert found.status_code == 200
            assert b" 408 " in slow.recv(4096).split(b"\r\n")[0]
        assert server.stop() == 0


def test_no_accepted_request_is_lost_on_sigterm(bundles: Bundles) -> None:
    """Clients under load see answers until the port is closed, and every logged answer arrived."""
    with serving(str(bundles("embedding")), "--max-queue", "2000") as server:
        answered: list[int] = []
        enough = threading.Event()

        def load() -> None:
            while True:
                try:
                    found = httpx.post(f"{server.url}/embed", json=BIG, timeout=60)
                except httpx.TransportError:
                    return  # the port is closed
                assert len(found.json()) == 200
                answered.append(found.status_code)
                if len(answered) >= 8:
                    enough.set()

        with ThreadPoolExecutor(6) as pool:
            clients = [pool.submit(load) for _ in range(6)]
            enough.wait(60)
            server.process.send_signal(signal.SIGTERM)
            for client in clients:
                client.result()
        assert server.process.wait(60) == 0
        lines = [line for line in server.log() if line["event"] == "request"]
        assert [line["status"] for line in lines] == [200] * len(lines)
        assert len(lines) == len(answered) >= 8


def run(*arguments: str, hide: str = "") -> subprocess.CompletedProcess[str]:
    code = f"import sys; sys.modules[{hide!r}] = None\n" if hide else ""
    code += "from edgelm.cli import main; main()"
    command = [sys.executable, "-c", code, "serve", *arguments]
    return subprocess.run(command, capture_output=True, text=True, check=False)


def test_what_cannot_start_says_why_in_a_sentence(
    bundles: Bundles, tmp_path: Path
) -> None:
    bundle = str(bundles("embedding"))
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = str(taken.getsockname()[1])
        failures = {
            "Choose another with --host and --port": run(bundle, "--port", port),
            "none is not a bundle: it does not exist": run(
                str(tmp_path / "none"), "--port", "0"
            ),
            "write NAME=PATH": run(bundle, bundle, "--port", "0"),
            "lower --max-client-batch": run(bundle, "--max-queue", "8"),
            "pip install 'edgelm[serve]'": run(bundle, hide="fastapi"),
        }
    for message, done in failures.items():
        if done is not None:
            assert done.returncode == 1, done.stderr
            assert message in done.stderr
            assert "Traceback" not in done.stderr
            assert len(done.stderr.strip().split("\n")) == 1


def test_answers_do_not_wait_for_the_acknowledgement_of_their_headers() -> None:
    async def accepted() -> int:
        got: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()
        bound = listen("127.0.0.1", 0)
        server = await asyncio.start_server(lambda _, w: got.put(w), sock=bound)
        async with server:
            _, client = await asyncio.open_connection(*bound.getsockname())
            writer = await got.get()
            option = socket.IPPROTO_TCP, socket.TCP_NODELAY
            flag: int = writer.get_extra_info("socket").getsockopt(*option)
            writer.close()
            client.close()
        return flag

    assert asyncio.run(accepted()) != 0


def test_the_service_loads_no_torch(bundles: Bundles) -> None:
    code = (
        "import sys; from edgelm.runtimes.service.app import create_app\n"
        "from edgelm.runtimes.service.models import Models, open_models\n"
        "create_app(Models(open_models([sys.argv[1]], max_batch_tokens=None, max_queue=9)))\n"
        "print(sorted({m.split('.')[0] for m in sys.modules} & {'torch', 'transformers', 'onnx', 'scipy'}))"
    )
    command = [sys.executable, "-c", code, str(bundles("embedding"))]
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
