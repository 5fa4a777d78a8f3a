"""The parts of benchmarks/gpu.py that need no GPU; what it measures, only a GPU shows."""

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from matplotlib import image

SCRIPT = Path(__file__).resolve().parents[1] / "benchmarks" / "gpu.py"
_spec = importlib.util.spec_from_file_location("gpu", SCRIPT)
gpu = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(gpu)


@pytest.mark.parametrize(("causal", "window"), [(False, None), (True, (5, 0)), (True, (99, 0))])
def test_kept_pairs(causal, window):
    t = 40
    left = t if window is None else window[0]
    i, j = np.indices((t, t))
    kept = ((j <= i) & (i - j <= left)) if causal else np.full((t, t), True)
    assert gpu.kept_pairs(t, causal, window) == kept.sum()


def test_causal_counts_half():
    assert gpu.kept_pairs(40, True, None) == 40 * 40 / 2


def test_every_case_has_the_same_tokens():
    for grid in ("core", "gqa", "window"):
        assert {b * t for _, b, t, *_ in gpu.make_cases(grid)} == {gpu.TOKENS}
    with pytest.raises(SystemExit, match="no grid 'corr': core, gqa"):
        gpu.make_cases("corr")


def read(path, *args, status=0):
    done = subprocess.run(
        [sys.executable, "-P", str(SCRIPT), "--read", str(path), *map(str, args)],
        text=True,
        capture_output=True,
        timeout=120,
    )
    assert done.returncode == status, done.stdout + done.stderr
    return done.stdout + done.stderr


def test_rows_become_a_table_and_a_figure(tmp_path):
    """Out of a file, an implementation that lacks a case among them."""
    rows = [
        {"case": case[0], "pass": direction, "ours": 100.0 + i, "fa3": None if i < 2 else 90.0}
        for i, case in enumerate(gpu.make_cases("core"))
        for direction in ("forward", "backward")
    ]
    file, figure = tmp_path / "rows.jsonl", tmp_path / "rows.png"
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    table = [line for line in read(file, "--plot", figure).splitlines() if line[:1] == "|"]
    assert table[0] == "| case | pass | ours | fa3 |"
    assert table[2] == "| d128 s1024 full | forward | 100 |  |"
    assert table[6] == "| d128 s4096 full | forward | 102 | 90 |"
    assert len(table) == 2 + len(rows)
    assert image.imread(figure).std() > 0.01


def test_a_figure_needs_the_grid_that_it_draws(tmp_path):
    file = tmp_path / "rows.jsonl"
    file.write_text(json.dumps({"case": "d64 s512 full", "pass": "forward", "ours": 1.0}) + "\n")
    assert 'draws the grid "core"' in read(file, "--plot", tmp_path / "no.png", status=1)
