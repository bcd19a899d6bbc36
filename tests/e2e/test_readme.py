"""The README's examples, run as they stand against a cluster; only the address is another."""

import re
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.cluster import ROOT, Cluster
from tests.support.video import decode

README = (ROOT / "README.md").read_text()


def block(language: str, after: str) -> str:
    found = re.search(rf"{re.escape(after)}.*?```{language}\n(.*?)```", README, re.DOTALL)
    assert found is not None
    return found[1]


@pytest.fixture(scope="module")
def directory(cluster: Cluster, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where a reader stands: the development key is in `.data`, and the Python example has been run."""
    here = tmp_path_factory.mktemp("reader")
    (here / ".data").mkdir()
    (here / ".data" / "dev-key").write_text(f"{cluster.key}\n")
    code = block("python", "With the public client").replace("http://127.0.0.1:8000", cluster.base_url)
    run = subprocess.run([sys.executable, "-c", code], cwd=here, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert run.stdout == "49 0.0245\n8 0.196\n"
    return here


def test_the_python_example_prints_what_it_says_and_saves_a_video(directory: Path) -> None:
    assert len(decode((directory / "rollout.mp4").read_bytes())) == 49


def test_the_curl_example_saves_a_video_and_shows_the_balance(cluster: Cluster, directory: Path) -> None:
    (directory / "rollout.mp4").unlink()
    commands = block("", "With curl:").replace("http://127.0.0.1:8000", cluster.base_url)
    run = subprocess.run(["bash", "-ec", commands], cwd=directory, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert '"balance_mils"' in run.stdout
    assert len(decode((directory / "rollout.mp4").read_bytes())) == 49
