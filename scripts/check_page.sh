#!/usr/bin/env bash
# Opens reports in headless Chromium at two widths and in both colour schemes, and fails on a serious finding of
# axe-core, on a page wider than its window, and on text in figures below 8 pixels. Installs what it needs.
# BIN: folder of the Python that has plop_ext.
set -euo pipefail
cd "$(dirname "$0")/.."

find_chromium() { command -v chromium || command -v chromium-browser || command -v google-chrome; }
chromium=$(find_chromium) || {
    apt-get -qq update
    apt-get -qq -y install chromium nodejs npm >/dev/null
    chromium=$(find_chromium)
}
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
npm install --silent --no-audit --no-fund --prefix "$work" axe-core@4.14.1 puppeteer-core@24.43.1 >/dev/null
for data in arithmetic prose; do
    "$BIN/plop" score plop-tiny $data --samples 16 --quiet -o "$work/$data.json" >/dev/null
done
"$BIN/plop" report "$work/arithmetic.json" -o "$work/one.html" >/dev/null
"$BIN/plop" report "$work/prose.json" --types auto --against "$work/arithmetic.json" -o "$work/two.html" >/dev/null
NODE_PATH=$work/node_modules CHROMIUM=$chromium node scripts/check_page.cjs "$work/one.html" "$work/two.html"
