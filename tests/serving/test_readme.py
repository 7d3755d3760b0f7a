"""The README's commands, as they stand there."""

import re
import shutil
import subprocess
from pathlib import Path

import pytest

from phi4mm_jax.demo import read_cases

README = Path(__file__).parents[2] / "README.md"


@pytest.mark.skipif(not shutil.which("curl"), reason="needs curl")
def test_curl(server, tmp_path):
    word, speech = read_cases()[2], read_cases()[1]
    shutil.copy(word.images[0], tmp_path / "photo.png")
    shutil.copy(speech.audios[0], tmp_path / "speech.ogg")
    section = README.read_text(encoding="utf-8").partition("\n## Serving\n")[2].partition("\n## ")[0]
    commands = next(block for block in re.findall(r"```sh\n(.*?)```", section, re.DOTALL) if "curl" in block)
    said = [
        subprocess.run(["bash", "-c", command], cwd=tmp_path, capture_output=True, text=True, check=True).stdout
        for command in commands.replace("http://127.0.0.1:8000", server).split("\n\n")
    ]
    assert re.findall(r'"content":"(\d)"', said[0]) == list("105") and said[0].endswith("data: [DONE]\n\n")
    assert f'"content":"{word.expected}"' in said[1]
    assert said[2] == f"{speech.expected}\n"
