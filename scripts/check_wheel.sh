#!/usr/bin/env bash
# Builds the sdist, a wheel from the sdist, and scores a small model with the wheel in an empty environment.
# BIN: folder of the Python that builds. TORCH: what pip installs as torch.
set -euo pipefail

work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT

"$BIN/python" -m build --sdist --no-isolation --outdir "$work/dist" . >"$work/log" 2>&1 || { cat "$work/log"; exit 1; }
tar -xzf "$work"/dist/plop_ext-*.tar.gz -C "$work"
for file in LICENSE CONTRIBUTING.md CHANGELOG.md; do
    cmp "$file" "$work"/plop_ext-*/"$file"
done
"$BIN/python" -m build --wheel --no-isolation --outdir "$work/dist" "$work"/plop_ext-*/ >"$work/log" 2>&1 \
    || { cat "$work/log"; exit 1; }

"$BIN/python" -m venv "$work/venv"
"$work/venv/bin/pip" install --quiet "$TORCH" numpy orjson
"$work/venv/bin/pip" install --quiet --no-deps "$work"/dist/plop_ext-*.whl
cd "$work"
"$work/venv/bin/python" - <<'PYTHON'
from importlib import metadata

import torch

import plop_ext
from plop_ext import demo_assets, ops

assert ops.STATUS.loaded, ops.STATUS.reason
assert plop_ext.build_info()["version"] == plop_ext.__version__
assert (demo_assets.model_path() / "model.safetensors").stat().st_size > 1_000_000
installed = metadata.distribution("plop_ext")
assert installed.metadata["License-Expression"] == "Apache-2.0", installed.metadata["License-Expression"]
assert installed.metadata.get_all("License-File") == ["LICENSE"], installed.metadata.get_all("License-File")
assert "Apache License" in (installed.read_text("licenses/LICENSE") or "")
model = torch.nn.Sequential(torch.nn.Linear(64, 32), torch.nn.ReLU(), torch.nn.Linear(32, 8))
scores = plop_ext.score(model, [torch.randn(16, 20, 64)], progress=False)
print(f"wheel: NFN {dict(zip(scores.module_names, scores.nfn.round(3).tolist()))} on {scores.provenance['backend']}")
PYTHON
