"""Loads a checkpoint to the CUDA device by one of several libraries, and prints the seconds that it takes.

python -m benchmarks.loaders NAME FOLDER

torch is imported and the device is ready before the clock starts, and every tensor is on the device when it stops.
`reader` is plop_ext's own reader alone; `transformers` and `plop_ext` give a model, the others give tensors.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from plop_ext.read_ahead import weight_files

DEVICE = "cuda:0"


def transformers(folder: Path) -> Any:
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", device_map={"": DEVICE})


def plop_ext(folder: Path) -> Any:
    from plop_ext.models import load_model

    return load_model(folder, device=DEVICE)


def safetensors(folder: Path) -> Any:
    from safetensors.torch import load_file

    return [load_file(path, device=DEVICE) for path in weight_files(folder)]


def fastsafetensors(folder: Path) -> Any:
    from fastsafetensors import SafeTensorsFileLoader, SingleGroup  # type: ignore[import-not-found]

    loader = SafeTensorsFileLoader(SingleGroup(), torch.device(DEVICE))
    loader.add_filenames({0: [str(path) for path in weight_files(folder)]})
    files = loader.copy_files_to_device()
    return loader, files, [files.get_tensor(key) for key in files.key_to_rank_lidx]


def runai_model_streamer(folder: Path) -> Any:
    from runai_model_streamer import SafetensorsStreamer  # type: ignore[import-not-found]

    with SafetensorsStreamer() as streamer:
        streamer.stream_files([str(path) for path in weight_files(folder)])
        return [tensor.to(DEVICE) for _, tensor in streamer.get_tensors()]


def reader(folder: Path) -> Any:
    from plop_ext.models.checkpoint import Checkpoint
    from plop_ext.models.direct import DirectWeights
    from plop_ext.models.reader import Reader

    entries = Checkpoint(folder).entries
    with DirectWeights(entries, Reader(torch.device(DEVICE))) as weights:
        return [weights.tensor(key) for key in entries]


LOADERS: dict[str, Callable[[Path], Any]] = {
    function.__name__: function
    for function in (transformers, plop_ext, safetensors, fastsafetensors, runai_model_streamer, reader)
}


def main() -> None:
    name, folder = sys.argv[1:]
    torch.ones(1, device=DEVICE).sum().item()
    began = time.perf_counter()
    kept = LOADERS[name](Path(folder))
    torch.cuda.synchronize()
    print(time.perf_counter() - began)
    del kept


if __name__ == "__main__":
    main()
