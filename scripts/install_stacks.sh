#!/usr/bin/env bash
# Unpacks training stacks side by side for tests/stacks, each in a folder of its own and without its dependencies, which
# exclude each other. BIN: folder of the Python that runs the tests. $1: the folder.
set -euo pipefail

# Name of the stack in `plop export`, and its release.
stacks="
trl trl==1.16.0
axolotl axolotl==0.21.0
llama-factory llamafactory==0.9.5
ms-swift ms-swift==4.6.0
verl verl==0.9.1
openrlhf openrlhf==0.11.2
nemo-automodel nemo-automodel==0.7.0
megatron-bridge megatron-bridge==0.6.2
torchtune torchtune==0.6.1
mlx-lm mlx-lm==0.32.2
diffusers diffusers==0.42.1
lycoris lycoris-lora==4.1.3
"
# What they import and the tests' own environment lacks.
shared="omegaconf==2.4.0 hydra-core==1.3.8 antlr4-python3-runtime==4.9.3 addict==2.4.0 toml==0.10.2 einops==0.8.2
  requests==2.34.2 certifi==2026.10.19.post1 charset-normalizer==3.5.3 idna==3.20 urllib3==2.8.0
  mlx==0.32.4 mlx-cpu==0.32.4"

# Some name a Python that they do not need.
unpack() { "$BIN/pip" install --quiet --no-deps --no-build-isolation --ignore-requires-python --target "$@"; }

rm -rf "$1"
while read -r name release; do
    [ -z "$name" ] || unpack "$1/$name" "$release"
done <<<"$stacks"
# shellcheck disable=SC2086
unpack "$1/shared" $shared
