"""The server as a process of its own, and its warm-up."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import time

import httpx
import pytest

from pallas_kernels.cpu import library
from phi4mm_jax import Phi4MM
from phi4mm_jax.demo import read_cases
from phi4mm_jax.runtime.compilation import watch_compilations

COMMAND = [sys.executable, "-m", "phi4mm_jax.cli", "serve", "--model", "nano", "--dtype", "float32", "--port", "0"]
SMALL = ["--rows", "2", "--quiet", "--no-warm-up", "--set", "engine.prefill_buckets=[64, 256]"]
ENDLESS = {"messages": [{"role": "user", "content": "What is 21 plus 84?"}], "ignore_eos": True, "stream": True}


@pytest.fixture
def process():
    """The process and its URL."""
    library.available()  # compiled now: the first answer would wait for it longer than a server does that ends
    with subprocess.Popen([*COMMAND, *SMALL], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as process:
        try:
            line = process.stdout.readline()
            url = re.fullmatch(r"nano on (http://127\.0\.0\.1:\d+), 2 rows x \d+ tokens\n", line)
            assert url, process.stderr.read()
            yield process, url[1]
        finally:
            process.kill()


def test_ctrl_c_lets_answers_finish(process):
    process, url = process
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=ENDLESS | {"max_tokens": 500}, timeout=60) as answer:
        lines = answer.iter_lines()
        next(lines)
        process.send_signal(signal.SIGINT)
        # What comes while it stops listening is refused, reset or closed without an answer.
        with pytest.raises((httpx.NetworkError, httpx.RemoteProtocolError)):
            while True:
                httpx.get(f"{url}/health")
                time.sleep(0.05)
        *_, reason, done = [line for line in lines if line]
    assert json.loads(reason.removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
    assert done == "data: [DONE]"
    assert process.wait(20) == 0
    assert process.stderr.read() == ""


def test_a_second_ctrl_c_does_not_wait(process):
    process, url = process
    with httpx.stream("POST", f"{url}/v1/chat/completions", json=ENDLESS | {"max_tokens": 1900}, timeout=60) as answer:
        lines = answer.iter_lines()  # kept: an iterator that is dropped ends the answer
        next(lines)
        process.send_signal(signal.SIGTERM)
        time.sleep(0.3)
        assert process.poll() is None
        process.send_signal(signal.SIGINT)
        assert process.wait(2) == 130


def test_kill_and_restart(tmp_path):
    """A kill -9 amid an answer leaves compiled programs that the next start takes as they are."""
    kept = {"JAX_COMPILATION_CACHE_DIR": str(tmp_path), "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0"}
    found = []
    for _ in range(2):
        with subprocess.Popen([*COMMAND, *SMALL], stdout=subprocess.PIPE, env=os.environ | kept, text=True) as process:
            try:
                url = process.stdout.readline().split()[2].rstrip(",")
                with httpx.stream("POST", f"{url}/v1/chat/completions", json=ENDLESS, timeout=120) as answer:
                    lines = answer.iter_lines()
                    while '"content":"1"' not in next(lines):
                        pass
                    process.kill()
                    with pytest.raises(httpx.RemoteProtocolError):
                        list(lines)
            finally:
                process.kill()
        found.append({path.name for path in tmp_path.glob("*-cache")})
    assert found[0] and found[1] == found[0]


def test_settings_are_checked_before_anything_is_loaded():
    wrong = subprocess.run([*COMMAND, "--max-waiting", "0"], capture_output=True, text=True)
    assert (wrong.returncode, wrong.stderr) == (2, "phi4mm: max_waiting = 0: must be positive\n")


def test_warm_up(model, start, capsys):
    few = {"prefill_buckets": [64], "crop_buckets": [1], "audio_buckets": [1024]}
    config = model.steps.runtime.override(engine=few)
    model = Phi4MM.from_pretrained("nano", config=config, progress=False)
    picture, speech = (part_of(path) for path in (read_cases()[2].images[0], read_cases()[1].audios[0]))
    with start(model=model, warm_up=True, rows=2) as server, httpx.Client(base_url=server.url, timeout=60) as http:
        first = http.get("/ready")
        assert (first.status_code, first.json()["status"]) == (503, "warming up")
        assert http.get("/health").status_code == 200
        while http.get("/ready").status_code == 503:
            time.sleep(0.05)
        assert "phi4mm_requests_total{" not in http.get("/metrics").text  # the warm-up's own are not counted
        with watch_compilations() as seen:
            for content in ([], [picture], [speech], [picture, speech]):
                for settings in ({}, {"temperature": 1.0, "logprobs": True, "stream": True}):
                    content = [*content, {"type": "text", "text": "What is written?"}]
                    body = {"messages": [{"role": "user", "content": content}], **settings}
                    assert http.post("/v1/chat/completions", json=body).status_code == 200
        assert seen.count == 0
        url = server.url
    said = capsys.readouterr()
    assert said.out.startswith(f"nano on {url}, 2 rows x ")
    assert "warm-up 1/" in said.err and "ready after" in said.err


def part_of(path):
    data = base64.b64encode(path.read_bytes()).decode()
    if path.suffix == ".png":
        return {"type": "image_url", "image_url": {"url": f"data:image/png;base64,{data}"}}
    return {"type": "input_audio", "input_audio": {"data": data}}
