"""Each file of examples/ runs, shortened, as a reader would run it, and does what it says."""

import concurrent.futures
import fcntl
import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"


def run(name, *args, cwd, status=0):
    """What the example prints; its own text is in the report if it fails."""
    done = subprocess.run(
        [sys.executable, str(EXAMPLES / name), *map(str, args)],
        cwd=cwd,
        text=True,
        capture_output=True,
        timeout=300,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout


def number(pattern, text):
    match = re.search(pattern, text)
    assert match, f"{pattern!r} is not in:\n{text}"
    return float(match[1].replace(",", ""))


def test_every_example_is_run_here():
    tests = Path(__file__).read_text()
    missing = [path.name for path in EXAMPLES.glob("[0-9]*.py") if f'"{path.name}"' not in tests]
    assert not missing


def test_attention(tmp_path):
    printed = run("01_attention.py", cwd=tmp_path)
    for name in ("dq", "dk", "dv"):
        assert number(rf"{name} .* difference (\S+)", printed) < 1e-4
    plain = number(r"plain definition (\S+)", printed)
    assert number(r"loss +([-\d.]+)", printed) == pytest.approx(plain, abs=1e-2)


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """(folder, what was printed) of a short training, which the workers of a run share."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent
    folder = folder / "gpt"
    folder.mkdir(exist_ok=True)
    printed = folder / "printed.txt"
    with open(folder / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not printed.exists():
            printed.write_text(run("02_train_gpt.py", "--steps", 60, "--seconds", 240, cwd=folder))
    return folder, printed.read_text()


def test_training_learns_more_than_frequencies(trained):
    _, printed = trained
    entropy = number(r"unigram entropy +([\d.]+)", printed)
    assert 2.5 < entropy < 4, "that is not the entropy of English and Python in bytes"
    assert number(r"held-out loss +([\d.]+)", printed) < entropy - 0.2
    assert number(r"steps +\d+, ([\d,]+) tokens", printed) > 0


def test_training_plots_the_curve(trained):
    pixels = image.imread(trained[0] / "gpt_loss.png")[..., :3]
    assert min(pixels.shape[:2]) >= 400
    colours = {tuple(np.round(c * 255).astype(int)) for c in pixels.reshape(-1, 3)}
    # Both curves and the line of the entropy are there.
    assert {(0x1F, 0x5F, 0xA8), (0xB5, 0xCA, 0xE2), (0xC0, 0x39, 0x2B)} <= colours


def test_training_prints_a_sample(trained):
    sample = re.search(r"sample\n------\n(.*)\n------\n", trained[1], re.DOTALL)[1]
    assert sample.startswith("def ")
    assert len(sample) > 100
    assert len(set(sample)) > 10


def test_parameters_load_into_the_same_model(trained, monkeypatch):
    """The saved parameters give the printed sample."""
    monkeypatch.syspath_prepend(EXAMPLES)
    import gpt

    (sample,), _ = gpt.generate(gpt.load(trained[0] / "gpt.npz"), [b"def "], 252)
    assert sample.decode(errors="replace") in trained[1]


def test_two_processes_train_as_one(tmp_path):
    """Four devices each, the ring of the sequence across both, against one process and mesh."""
    script, steps = "03_multi_host.py", ("--steps", 3, "--length", 64)
    with socket.socket() as free:
        free.bind(("localhost", 0))
        coordinator = f"localhost:{free.getsockname()[1]}"
    two = ("--cpu-devices", 4, "--mesh", 1, 4, 2, "--coordinator", coordinator, "--processes", 2)
    with concurrent.futures.ThreadPoolExecutor() as pool:
        second = pool.submit(run, script, *steps, *two, "--id", 1, cwd=tmp_path)
        printed = run(script, *steps, *two, "--id", 0, cwd=tmp_path)
        assert "step" not in second.result(), "the first process alone reports"
    alone = run(script, *steps, "--cpu-devices", 8, cwd=tmp_path)

    assert "2 processes, 8 devices, {'data': 1, 'seq': 4, 'model': 2}" in printed
    assert "1 processes, 8 devices, {'data': 2, 'seq': 2, 'model': 2}" in alone
    for text in (printed, alone):
        assert "attention  ring: " in text
        assert "query kernel (128, 4, 32), on each device (128, 2, 32)" in text
    losses, expected = (
        [float(x) for x in re.findall(r"loss ([\d.]+)", text)] for text in (printed, alone)
    )
    assert len(losses) == 3
    assert losses[-1] < losses[0] - 0.5
    assert losses == pytest.approx(expected, abs=2e-3)


def test_decoder_block(tmp_path):
    printed = run("04_decoder_block.py", cwd=tmp_path)
    assert "key kernel  (256, 2, 32)" in printed
    assert number(r"gradient ([\d.]+)", printed) > 0
    assert "with 128 tokens" in printed
    assert number(r"from the whole (\S+)", printed) < 1e-5


def test_block_of_ten_lines():
    source = (EXAMPLES / "04_decoder_block.py").read_text()
    block = re.search(r"^class Block.*?(?=^\S)", source[source.index("class") :], re.S | re.M)[0]
    assert len([line for line in block.splitlines() if line.strip()]) == 10


def test_generation_equals_the_forward_without_a_cache(trained, tmp_path):
    model = trained[0] / "gpt.npz"
    printed = run("05_generate.py", "--model", model, "--length", 60, cwd=tmp_path)
    largest = number(r"logits +largest ([\d.]+)", printed)
    assert number(r"without a cache (\S+)", printed) < 1e-4 * largest
    for prompt in ("def ", "class Parser:\n    ", "import os\nimport "):
        text = next(x for x in printed.split("\n------\n") if x.startswith(prompt))
        assert len(text.encode()) >= len(prompt) + 60
    assert number(r"speed +([\d,]+)", printed) > 0
    missing = run("05_generate.py", "--model", "no.npz", cwd=tmp_path, status=1)
    assert not missing


def test_sharded_training(tmp_path):
    printed = run("06_sharded_training.py", cwd=tmp_path)
    assert "query  (64, 8, 8), on each device (64, 2, 8)" in printed
    assert "key    (64, 4, 8), on each device (64, 1, 8)" in printed
    whole = number(r"state +([\d,]+) bytes", printed)
    assert number(r"optimizer's, on each device ([\d,]+)", printed) < whole / 2
    first, last = number(r"losses ([\d.]+)", printed), number(r"\.\.\. ([\d.]+)", printed)
    assert last < first - 1
    assert number(r"difference from one device (\S+)", printed) < 1e-4
    # Two layers, each with two projections back to the width, summed forward, and their inputs'
    # gradients backward.
    assert re.findall(r"^\d+ \S+ over .*$", printed, re.MULTILINE)[0] == "8 all-reduce over model"
    others = re.findall(r"^\d+ (\S+ over .*)$", printed, re.MULTILINE)[1:]
    assert set(others) <= {"all-reduce over data", "all-reduce over data and model"}


def test_training_step(tmp_path, monkeypatch):
    monkeypatch.setenv("JAX_PLATFORMS", "cpu")  # where there is a GPU, it would train the large one
    printed = run("07_training_step.py", "--small", cwd=tmp_path)
    losses = [float(x) for x in re.findall(r"first step ([\d.]+)", printed)]
    assert len(losses) == 2, "ours and XLA's"
    assert losses[0] == pytest.approx(losses[1], abs=1e-3)
    for name in ("ours", "xla"):
        assert number(rf"{name} +([\d.]+) ms a step", printed) > 0
    refused = run("07_training_step.py", cwd=tmp_path, status=2)
    assert not refused, "the reason is on stderr"


def test_seed_decides_and_too_short_a_training_fails(tmp_path):
    args = ("--steps", 3, "--seconds", 240, "--batch", 2, "--length", 64)
    losses = [
        number(
            r"held-out loss +([\d.]+)",
            run("02_train_gpt.py", *args, "--seed", seed, cwd=tmp_path, status=1),
        )
        for seed in (1, 1, 2)
    ]
    assert losses[0] == pytest.approx(losses[1], abs=2e-3)
    assert abs(losses[0] - losses[2]) > 1e-2
