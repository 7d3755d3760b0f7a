"""The command line over a stand-in for the model: how arguments map, what is printed, which exit code."""

import contextlib
import dataclasses
import io
import json
import re
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import soundfile
from PIL import Image

import phi4mm_jax
from phi4mm_jax import cli
from phi4mm_jax.config import ConfigError
from phi4mm_jax.serving.settings import ServerSettings
from phi4mm_jax.terminal import TerminalChat


@dataclasses.dataclass
class Usage:
    prompt_tokens: int = 3


@dataclasses.dataclass
class Output:
    text: str = "héllo"
    token_ids: Any = dataclasses.field(default_factory=lambda: [0, 1])
    finish_reason: str = "stop"
    logprobs: None = None
    usage: Usage = dataclasses.field(default_factory=Usage)


@dataclasses.dataclass
class Piece:
    text: str


class FakeModel:
    """Records what it is asked and says "Hi there"; `error` is raised by the next call instead."""

    def __init__(self) -> None:
        self.loaded: dict[str, Any] = {}
        self.asked: list[tuple[list, dict[str, Any]]] = []
        self.error: BaseException | None = None
        self.closed = 0
        self.interrupt = False

    def from_pretrained(self, name: str, **options: Any) -> "FakeModel":
        self.loaded = {"name": name, **options}
        return self

    def _ask(self, conversation: list, sampling: dict[str, Any]) -> None:
        self.asked.append((conversation, sampling))
        if self.error:
            error, self.error = self.error, None
            raise error

    def generate(self, conversation: list, **sampling: Any) -> Output:
        self._ask(conversation, sampling)
        return Output()

    def stream(self, conversation: list, **sampling: Any) -> Iterator[Piece]:
        try:
            self._ask(conversation, sampling)
            yield Piece("Hi")
            if self.interrupt:
                signal.raise_signal(signal.SIGINT)
            yield Piece(" there")
            yield Piece("!")
        finally:
            self.closed += 1


@pytest.fixture
def model(monkeypatch: pytest.MonkeyPatch) -> FakeModel:
    fake = FakeModel()
    monkeypatch.setitem(vars(phi4mm_jax), "Phi4MM", fake)
    return fake


def test_generate_streams(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "Hello"]) == 0
    assert capsys.readouterr().out == "Hi there!\n"
    assert model.loaded == {
        "name": "microsoft/Phi-4-multimodal-instruct",
        "revision": None,
        "config": "auto",
        "dtype": None,
        "quantize": None,
        "progress": True,
    }
    assert model.asked == [([{"role": "user", "content": [{"type": "text", "text": "Hello"}]}], {})]


def test_every_option_reaches_the_library(model: FakeModel) -> None:
    options = "--model M --revision R --config cpu --dtype float32 --quantize int4 --quiet --system S"
    options += " --set engine.max_batch=2"
    sampling = (
        "--temperature 0.5 --top-k 4 --top-p 0.9 --min-p 0.1 --presence-penalty 1 --frequency-penalty -1 "
        "--repetition-penalty 1.1 --logit-bias 7=-2.5 --logit-bias 8=1 --seed 3 --stop A --stop B --max-tokens 9 "
        "--min-tokens 2 --ignore-eos"
    )
    assert cli.main(["generate", *options.split(), *sampling.split(), "Hello"]) == 0
    assert model.loaded == {
        "name": "M",
        "revision": "R",
        "config": "cpu",
        "dtype": "float32",
        "quantize": "int4",
        "progress": False,
        "engine": {"max_batch": 2},
    }
    messages, given = model.asked[0]
    assert messages[0] == {"role": "system", "content": "S"}
    assert given == {
        "temperature": 0.5,
        "top_k": 4,
        "top_p": 0.9,
        "min_p": 0.1,
        "presence_penalty": 1.0,
        "frequency_penalty": -1.0,
        "repetition_penalty": 1.1,
        "logit_bias": {7: -2.5, 8: 1.0},
        "seed": 3,
        "stop": ["A", "B"],
        "max_tokens": 9,
        "min_tokens": 2,
        "ignore_eos": True,
    }


def serving(monkeypatch: pytest.MonkeyPatch) -> list[tuple]:
    """What would be served; no address is taken."""
    served = []
    monkeypatch.setattr("phi4mm_jax.serving.process.bind", lambda _: contextlib.nullcontext())
    monkeypatch.setattr("phi4mm_jax.serving.process.serve", lambda *args: served.append(args))
    return served


def test_an_address_that_is_taken(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        assert cli.main(["serve", "--port", str(port)]) == 2
    expected = f"phi4mm: cannot listen on 127.0.0.1, port {port}: Address already in use\n"
    assert capsys.readouterr().err == expected
    assert not model.loaded


def test_every_option_reaches_the_server(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving(monkeypatch)
    options = "--host 0.0.0.0 --port 80 --rows 2 --context 900 --max-waiting 5 --request-timeout 9 --drain-timeout 3 "
    options += "--max-body-bytes 1000 --model-name a --model-name b --any-model-name --api-key k --cors-origin x "
    options += "--media-directory /media --private-hosts --no-warm-up --verbose"
    assert cli.main(["serve", "--model", "M", *options.split()]) == 0
    ((asked, settings, _, verbose),) = served
    assert (asked, model.loaded["name"], verbose) == (model, "M", True)
    media = dataclasses.replace(ServerSettings().media, local_files=True, directory=Path("/media"), private_hosts=True)
    assert settings == ServerSettings(
        host="0.0.0.0",
        port=80,
        rows=2,
        context=900,
        max_waiting=5,
        request_timeout_s=9,
        drain_timeout_s=3,
        max_body_bytes=1000,
        model_names=("a", "b"),
        any_model_name=True,
        api_key="k",
        cors_origins=("x",),
        media=media,
        warm_up=False,
    )


def test_a_server_is_closed_unless_it_is_opened(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    served = serving(monkeypatch)
    monkeypatch.setenv("PHI4MM_API_KEY", "from the environment")
    assert cli.main(["serve"]) == 0
    settings = served[0][1]
    assert settings.api_key == "from the environment"
    assert (settings.host, settings.media.local_files, settings.media.private_hosts) == ("127.0.0.1", False, False)


def test_json_is_one_object(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--json", "--logprobs", "2", "Hello"]) == 0
    out = capsys.readouterr().out
    assert json.loads(out) == {
        "text": "héllo",
        "token_ids": [0, 1],
        "finish_reason": "stop",
        "logprobs": None,
        "usage": {"prompt_tokens": 3},
    }
    assert "é" in out
    assert model.asked[0][1] == {"logprobs": 2}


def test_json_keeps_standard_output_clean(oracle_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["generate", "--model", str(oracle_checkpoint), "--json", "--max-tokens", "1", "Hello"]) == 0
    captured = capsys.readouterr()
    assert json.loads(captured.out)["usage"]["completion_tokens"] == 1 and captured.err


@pytest.mark.parametrize("prompt", ["", " \n", "-"])
def test_an_empty_prompt_needs_media(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, clip: str, capsys: pytest.CaptureFixture[str], prompt: str
) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("\n"))
    assert cli.main(["generate", prompt]) == 2
    assert capsys.readouterr().err.startswith("phi4mm: PROMPT: is empty; ")
    assert not model.loaded
    assert cli.main(["generate", prompt, "--audio", clip]) == 0  # a spoken question


def test_standard_input_must_be_text(
    model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "stdin", io.TextIOWrapper(io.BytesIO(b"\xff"), encoding="utf-8"))
    assert cli.main(["generate", "-"]) == 2
    assert capsys.readouterr().err == "phi4mm: PROMPT: standard input is not UTF-8 text\n"


def test_prompt_from_standard_input(model: FakeModel, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", io.StringIO("from a pipe\n"))
    assert cli.main(["generate", "-"]) == 0
    assert model.asked[0][0][0]["content"][-1]["text"] == "from a pipe"


@pytest.fixture
def picture(tmp_path: Path) -> str:
    path = tmp_path / "a picture.png"
    Image.new("RGB", (4, 2), "red").save(path)
    return str(path)


@pytest.fixture
def clip(tmp_path: Path) -> str:
    path = tmp_path / "clip.wav"
    soundfile.write(path, np.zeros(1600, np.float32), 16000)
    return str(path)


@pytest.fixture
def film(tmp_path: Path) -> str:
    path = tmp_path / "film.gif"
    frames = [Image.new("RGB", (4, 2), colour) for colour in ("red", "blue")]
    frames[0].save(path, save_all=True, append_images=frames[1:], duration=1000)
    return str(path)


def test_media_come_before_the_text(model: FakeModel, picture: str, clip: str, film: str) -> None:
    media = ["--audio", clip, "--image", picture, "--video", film, "--image", picture]
    assert cli.main(["generate", *media, "What?"]) == 0
    ((message,), _), parts = model.asked[0], model.asked[0][0][0]["content"]
    assert message["role"] == "user"
    assert [part["type"] for part in parts] == ["image", "image", "video", "audio", "text"]
    assert parts[0]["image"].size == (4, 2)
    assert [frame.getpixel((0, 0)) for frame in parts[2]["video"]] == [(255, 0, 0), (0, 0, 255)]
    samples, rate = parts[3]["audio"]
    assert (len(samples), rate) == (1600, 16000)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["generate", "--image", "absent.png", "x"], "phi4mm: --image absent.png: no such file"),
        (["generate", "--video", "absent.mp4", "x"], "phi4mm: --video absent.mp4: no such file"),
        (["generate", "--audio", "data:audio/wav,noise", "x"], "phi4mm: --audio data:audio/wav,...: "),
        (["generate", "--top-p", "2", "x"], "phi4mm: top_p = 2.0: expected"),
        (["generate", "--set", "engine", "x"], "phi4mm: --set engine: expected section.name=value"),
    ],
)
def test_bad_values_exit_2_before_loading(
    model: FakeModel, arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert cli.main(arguments) == 2
    error = capsys.readouterr().err
    assert error.startswith(message) and error.count("\n") == 1
    assert not model.loaded


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "required: COMMAND"),
        (["generate"], "required: PROMPT"),
        (["generate", "--temperature", "hot", "x"], "invalid float value: 'hot'"),
        (["generate", "--logit-bias", "7", "x"], "'7': expected ID=V"),
        (["generate", "--logprobs", "2", "x"], "--logprobs needs --json"),
        (["describe"], "invalid choice: 'describe'"),
    ],
)
def test_bad_usage_exits_2(arguments: list[str], message: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as exit_info:
        cli.main(arguments)
    assert exit_info.value.code == 2
    assert message in capsys.readouterr().err


def test_an_error_of_ours_is_one_line(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    model.error = ConfigError("the prompt is too long")
    assert cli.main(["generate", "Hello"]) == 2
    assert capsys.readouterr().err == "phi4mm: the prompt is too long\n"


@pytest.mark.parametrize("system", [[], ["--system", "Be brief"]])
def test_errors_use_the_names_of_the_arguments(
    oracle_checkpoint: Path,
    tmp_path: Path,
    picture: str,
    film: str,
    capsys: pytest.CaptureFixture[str],
    system: list[str],
) -> None:
    Image.new("RGB", (9000, 3)).save(tmp_path / "thin.png")
    arguments = ["generate", "--model", str(oracle_checkpoint), "--quiet", "--image", picture, *system]
    for more, message in [
        (["--image", str(tmp_path / "thin.png"), "?"], f"--image {tmp_path / 'thin.png'}: image of 9000x3 is too long"),
        (["<|audio_1|>?"], "PROMPT: <|audio_1|> has no audio; PROMPT has 1 audio tag(s) and 0 audio part(s)"),
        (
            ["--video", film, "<|image_1|>?"],
            f"--video {film}: a message with a video has no image tags, but PROMPT has",
        ),
        (["--image", picture, "<|image_1|>?"], f"--image {picture}: no tag for this image; PROMPT has 1"),
    ]:
        assert cli.main([*arguments, *more]) == 2
        assert capsys.readouterr().err.startswith(f"phi4mm: {message}")


def test_a_bug_keeps_its_traceback(model: FakeModel) -> None:
    model.error = ValueError("operands could not be broadcast")
    with pytest.raises(ValueError, match="broadcast"):
        cli.main(["generate", "Hello"])


def test_ctrl_c_exits_130(model: FakeModel) -> None:
    model.error = KeyboardInterrupt()
    assert cli.main(["generate", "Hello"]) == 130


def test_help_is_light() -> None:
    """No JAX, and no restart: the replaced `execv` would show."""
    code = (
        "import sys, os, phi4mm_jax.cli as cli\n"
        "os.execv = lambda *_: sys.exit('restarted')\n"
        "sys.argv = ['phi4mm', '--help']\n"
        "try: cli.main()\n"
        "finally: assert not {'jax', 'numpy'} & set(sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert "generate" in result.stdout


@pytest.mark.skipif(sys.platform != "linux", reason="a glibc setting")
def test_restart_happens_once(monkeypatch: pytest.MonkeyPatch) -> None:
    restarts = []
    monkeypatch.setattr("os.execv", lambda path, arguments: restarts.append((path, arguments)))
    monkeypatch.delenv("GLIBC_TUNABLES", raising=False)
    cli._restart_with_large_pages()
    cli._restart_with_large_pages()
    assert restarts == [(sys.executable, [sys.executable, *sys.orig_argv[1:]])]


def test_a_real_model_answers(
    oracle_checkpoint: Path, picture: str, clip: str, film: str, capsys: pytest.CaptureFixture[str]
) -> None:
    sampling = ["--max-tokens", "3", "--logprobs", "1", "--ignore-eos"]
    media = ["--image", picture, "--audio", clip, "--video", film]
    assert cli.main(["generate", "--model", str(oracle_checkpoint), "--json", *sampling, *media, "Hello"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert len(answer["token_ids"]) == len(answer["logprobs"]) == 3
    assert answer["finish_reason"] == "length"
    assert answer["usage"]["image_tokens"] > 0 and answer["usage"]["audio_tokens"] > 0
    assert answer["usage"]["video_frames"] == 2


# --- info ----------------------------------------------------------------------------------------------------


def test_info_needs_no_weights(capsys: pytest.CaptureFixture[str]) -> None:
    description = Path(__file__).parents[1] / "configs" / "model" / "phi4mm.toml"
    assert cli.main(["info", str(description), "--config", "tpu_v5e_8", "--set", "engine.max_batch=4"]) == 0
    out = capsys.readouterr().out
    assert "32 layers, width 3072" in out and "26 of 27 layers" in out
    assert re.search(r"^vision adapter +369,098,752 ", out, re.MULTILINE)
    assert re.search(r"^total +5,543,980,224 ", out, re.MULTILINE)
    assert "4 x 132096 tokens" in out


def test_info_of_a_checkpoint(oracle_checkpoint: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(oracle_checkpoint), "--config", "cpu"]) == 0
    assert "3 layers, width 96" in capsys.readouterr().out


def test_info_of_nothing(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.main(["info", str(tmp_path), "--config", "cpu"]) == 2
    assert cli.main(["info", str(tmp_path / "absent.toml")]) == 2
    assert "config.json" in capsys.readouterr().err


# --- chat ----------------------------------------------------------------------------------------------------


def type_lines(monkeypatch: pytest.MonkeyPatch, *lines: str | type[BaseException]) -> None:
    """Feeds `input` these lines, then the end of the input."""
    script = iter([*lines, EOFError])

    def fake_input(_prompt: str) -> str:
        line = next(script)
        if isinstance(line, str):
            return line
        raise line

    monkeypatch.setattr("builtins.input", fake_input)


def texts(messages: list) -> list[str]:
    return [m["content"] if isinstance(m["content"], str) else m["content"][-1]["text"] for m in messages]


def test_chat_remembers(model: FakeModel, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    type_lines(monkeypatch, "One", "", KeyboardInterrupt, "Two", "/clear", "Three", "/quit now", "Never")
    assert cli.main(["chat", "--system", "Be brief", "--temperature", "0.5"]) == 0
    assert [texts(messages) for messages, _ in model.asked] == [
        ["Be brief", "One"],
        ["Be brief", "One", "Hi there!", "Two"],
        ["Be brief", "Three"],
    ]
    assert all(sampling == {"temperature": 0.5} for _, sampling in model.asked)
    assert "Hi there!\n" in capsys.readouterr().out


def test_chat_survives_an_input_error(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(model)
    chat.handle("One")
    model.error = ConfigError("too long")
    chat.handle("Two")
    assert capsys.readouterr().err == "error: too long\n"
    chat.handle("Three")
    assert texts(model.asked[-1][0]) == ["One", "Hi there!", "Three"]


def test_ctrl_c_stops_only_the_answer(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    handler = signal.getsignal(signal.SIGINT)
    chat = TerminalChat(model)
    model.interrupt = True
    chat.handle("One")
    assert capsys.readouterr().out == "Hi there [stopped]\n"
    assert model.closed == 1 and signal.getsignal(signal.SIGINT) is handler
    model.interrupt = False
    chat.handle("Two")
    assert texts(model.asked[-1][0]) == ["One", "Hi there", "Two"]


def test_chat_attaches_to_one_message(
    model: FakeModel, picture: str, clip: str, film: str, capsys: pytest.CaptureFixture[str]
) -> None:
    chat = TerminalChat(model)
    assert chat.handle("/image absent.png")
    assert capsys.readouterr().err == "error: /image absent.png: no such file\n"
    for line in ("/image", "/audio ", "/video", "/IMAGE ''"):
        chat.handle(line)
        assert capsys.readouterr() == (f"usage: {line.split()[0].lower()} PATH\n", "")
    chat.handle(f"/audio {clip}")
    chat.handle(f"/IMAGE '{picture}'")
    chat.handle(f"/video {film}")
    chat.handle("One")
    chat.handle("Two")
    first, _, second = model.asked[-1][0]
    assert [part["type"] for part in first["content"]] == ["audio", "image", "video", "text"]
    assert [part["type"] for part in second["content"]] == ["text"]


def test_chat_commands(model: FakeModel, capsys: pytest.CaptureFixture[str]) -> None:
    chat = TerminalChat(model)
    chat.handle("/system Be kind")
    chat.handle("/etc/hosts is what?")
    chat.handle("/system")
    chat.handle("Two")
    assert [texts(messages)[0] for messages, _ in model.asked] == ["Be kind", "/etc/hosts is what?"]
    for line, answer in [("/help", "/image PATH"), ("/Help me", "/image PATH"), ("/Wave", "unknown command /Wave")]:
        assert chat.handle(line)
        assert answer in capsys.readouterr().out
    for line in ("/quit", "/quit now", "/QUIT"):
        assert not chat.handle(line)
