"""The recipe for Ray in docs/distributed.md runs on a local cluster. Needs ray, which nothing else does."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from plop_ext.scores import Scores
from tests.support.paths import ROOT


@pytest.mark.slow
def test_the_recipe_scores_on_a_local_cluster(tmp_path: Path) -> None:
    pytest.importorskip("ray")
    text = (ROOT / "docs" / "distributed.md").read_text(encoding="utf-8")
    recipe = next(code for code in re.findall(r"```python\n(.*?)```", text, re.DOTALL) if "@ray.remote" in code)
    path = os.pathsep.join([str(ROOT), *os.environ.get("PYTHONPATH", "").split(os.pathsep)])
    env = {**os.environ, "PYTHONPATH": path, "CUDA_VISIBLE_DEVICES": "", "RAY_USAGE_STATS_ENABLED": "0"}
    done = subprocess.run(
        [sys.executable, "-c", recipe], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=240
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[-1] == "scores/plop-tiny"
    found = [Scores.load(path) for path in sorted((tmp_path / "scores" / "plop-tiny").iterdir())]
    assert [scores.provenance["data"]["name"] for scores in found] == ["arithmetic", "prose"]
    assert len(found[0].sample_ids) == 64
