"""The README's commands, as they stand there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from phi4mm_jax.demo import read_cases

README = Path(__file__).parents[2] / "README.md"


WORD, SPEECH = read_cases()[2], read_cases()[1]


@pytest.fixture
def blocks(server, tmp_path, monkeypatch):
    """Finds the section's blocks of a language, for this server; the files that they name are in the directory."""
    shutil.copy(WORD.images[0], tmp_path / "photo.png")
    shutil.copy(SPEECH.audios[0], tmp_path / "speech.ogg")
    monkeypatch.chdir(tmp_path)
    section = README.read_text(encoding="utf-8").partition("\n## Serving\n")[2].partition("\n## ")[0]
    section = section.replace("http://127.0.0.1:8000", server)
    return lambda language: re.findall(rf"```{language}\n(.*?)```", section, re.DOTALL)


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(blocks):
    commands = next(block for block in blocks("sh") if "curl" in block)
    said = [
        subprocess.run(["bash", "-c", command], capture_output=True, text=True, check=True).stdout
        for command in commands.split("\n\n")
    ]
    assert re.findall(r'"content":"(\d)"', said[0]) == list("105") and said[0].endswith("data: [DONE]\n\n")
    assert f'"content":"{WORD.expected}"' in said[1]
    assert said[2] == f"{SPEECH.expected}\n"


def test_python(blocks, capsys):
    (block,) = blocks("python")
    exec(block, {"__name__": "readme"})
    assert re.fullmatch(rf"{SPEECH.expected}\ntotal=\d{{1,3}}\n", capsys.readouterr().out)
