"""The parts of the fast path's benchmarks: what they compare is the same work, and what they read is understood."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import masking_utils

from benchmarks import compiled, model_forward, plot_model_forward, profile_kernels, resources, roofline, variants
from benchmarks.fused_cases import CASES, FusedCase
from benchmarks.headlines import HEADLINES
from benchmarks.overhead import Case, make_case, read_bytes
from benchmarks.rivals import BestHooks
from benchmarks.shapes import SHAPES, build
from benchmarks.variants import BASE, Ready, Variant
from plop_ext.collecting.totals_queue import TotalsQueue
from plop_ext.forwards import choose
from plop_ext.forwards.graph import capture
from plop_ext.layers import discover
from tests.support.graphed import Repeated

CPU = torch.device("cpu")


@pytest.fixture
def case() -> Case:
    return make_case(build("tiny", {"num_hidden_layers": 3}), SHAPES["tiny"]["vocab_size"], 2, 16, CPU)


def copy_of(case: Case) -> Case:
    model = compiled.shared_copy(case.model)
    return replace(case, model=model, layers=discover(model).layers)


def test_a_shared_copy_has_the_weights_and_no_hooks(case: Case) -> None:
    copied = compiled.shared_copy(case.model)
    pairs = zip(case.model.parameters(), copied.parameters(), strict=True)
    assert all(ours is theirs for ours, theirs in pairs)
    seen: list[object] = []
    copied.layers[0].mlp.register_forward_hook(lambda *args: seen.append(args))
    case.forward()
    assert not seen


@pytest.mark.slow
@pytest.mark.parametrize("native", [False, True])
@pytest.mark.parametrize("whole", [False, True])
def test_compiled_hooks_score_as_the_best_hooks_in_one_graph(case: Case, native: bool, whole: bool) -> None:
    best = BestHooks({layer.name: layer.module for layer in case.layers}, case.input_ids.numel(), CPU)
    with best:
        case.forward()
        best.end()
    copied = copy_of(case)
    hooks = compiled.StaticHooks(copied.hookable, copied.forward, case.input_ids.numel(), CPU, native=native)
    # Code compiled without hooks in the same process must not serve the model that has them.
    plain, compiler = copy_of(case), compiled.Compiler()
    for model in (plain.model, copied.model):
        (compiler.whole if whole else compiler.blocks)(model)
    for _ in range(2):
        with compiled.eager_masks():
            plain.forward()
            copied.forward()
        hooks.end()
    assert compiler.graphs == 2
    assert hooks.gains() == pytest.approx(list(best.gains().values()), rel=1e-5)


def test_compiled_forwards_get_the_attention_of_eager_ones(case: Case) -> None:
    masks: list[object] = []
    copied, compiler = copy_of(case), compiled.Compiler()
    copied.model.layers[0].self_attn.register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    compiler.whole(copied.model)
    with compiled.eager_masks():
        copied.forward()
    assert masks == [None]


def test_captured_forwards_get_the_attention_of_eager_ones(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    masks: list[object] = []
    case.model.layers[0].register_forward_pre_hook(
        lambda module, args, kwargs: masks.append(kwargs["attention_mask"]), with_kwargs=True
    )
    monkeypatch.setattr(masking_utils, "is_tracing", lambda tensor=None: True)  # as during a capture
    case.forward()
    with compiled.eager_masks():
        case.forward()
    assert masks[0] is not None and masks[1] is None


def test_the_graphed_forward_is_replayed_on_the_fast_path(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(variants, "_require_cuda", lambda case: None)
    monkeypatch.setattr(capture, "Recorder", Repeated)
    monkeypatch.setattr(choose, "check_graph", lambda model: None)
    graphed = next(variant for variant in variants.VARIANTS if variant.name == variants.FAST_GRAPH)
    sent: list[object] = []
    send = TotalsQueue.send
    monkeypatch.setattr(TotalsQueue, "send", lambda self, totals: (sent.append(totals), send(self, totals)))
    with graphed.start(case) as ready:
        before = len(sent)
        ready.candidate.run(None)
        ready.candidate.run(None)
        assert len(sent) == before + 2 and sent[-1] is sent[-2]  # what a replay writes
        assert ready.note() == "3 of 3 blocks on the fast path"


@pytest.mark.parametrize("shape", ["tiny", "qwen3-0.6b"])
def test_the_roofline_counts_what_scoring_reads(shape: str) -> None:
    overrides = {"num_hidden_layers": 2, "vocab_size": 256}
    case = make_case(build(shape, overrides), 256, 2, 8, CPU)
    counted = roofline.scoring_bytes({**SHAPES[shape], **overrides}, 16, 4)
    assert {name: counted[name] for name in ("shared", "per_module")} == read_bytes(case)
    assert 0 < counted["fast"] < counted["shared"] / 4


@pytest.mark.parametrize("shape", ["tiny", "tiny-moe"])
def test_the_roofline_counts_the_operations_of_the_matrix_products(shape: str) -> None:
    case = make_case(build(shape), 256, 2, 8, CPU)
    if shape == "tiny-moe":
        case.model.set_experts_implementation("eager")  # the counter knows no grouped product
    with FlopCounterMode(display=False) as counter:
        case.forward()
    counts = counter.get_flop_counts()["Global"]
    measured = sum(value for op, value in counts.items() if str(op) in ("aten.mm", "aten.addmm"))
    parts = roofline.forward_parts(SHAPES[shape], 2, 8, 4)
    assert sum(part.flops for part in parts if part.name != "attention") == measured


def test_a_part_takes_the_longer_of_its_bytes_and_its_operations() -> None:
    rates = roofline.Rates(bytes_per_s=10.0, flops_per_s=100.0)
    assert roofline.Stage("a", 20.0, 100.0).seconds(rates) == 2.0
    assert roofline.Stage("b", 20.0, 400.0).seconds(rates) == 4.0


@pytest.mark.parametrize("model", ["llama-3.1-8b", "qwen3-0.6b", "gemma-2-9b"])
@pytest.mark.parametrize("kind", CASES)
def test_the_rival_does_what_the_op_does(kind: type[FusedCase], model: str) -> None:
    case = kind(model, 6, torch.float32, CPU)
    tensors = case.tensors()
    case.run(tensors)
    expected = case.modules(tensors)
    for name, value in zip(case.written, expected, strict=True):
        torch.testing.assert_close(tensors[name], value, rtol=1e-5, atol=1e-5)
    values = {**tensors, **dict(zip(case.written, expected, strict=True))}
    sums = {name.removesuffix("_sumsq"): value for name, value in tensors.items() if name.endswith("_sumsq")}
    assert len(sums) == case.vectors
    for name, value in sums.items():
        torch.testing.assert_close(value, values[name].reshape(6, -1).square().sum(1), rtol=1e-5, atol=0.0)
    activations = [value for name, value in tensors.items() if name not in ("cos", "sin")]
    assert case.bytes == sum(value.nbytes for value in activations)


def quick(folder: Path, *arguments: str) -> dict[str, object]:
    output = folder / "model_forward.json"
    model_forward.main(
        ["--device", "cpu", "--output", str(output), "--rounds", "1", "--seconds-per-case", "0", *arguments]
    )
    return json.loads(output.read_text())


def test_runs_add_up_to_one_result(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    def broken(case: Case) -> Ready:
        raise RuntimeError("first line\nsecond line")

    monkeypatch.setattr(model_forward, "VARIANTS", (BASE, Variant("plop_ext fast", broken)))
    first = quick(tmp_path, "--model", "tiny", "--case", "1x8", "--case", "2x8")
    assert [(row["batch"], row["candidate"]) for row in first["rows"]] == [
        (batch, name) for batch in (1, 2) for name in ("plain forward", "plop_ext fast", "published script")
    ]
    assert [row["error"] for row in first["rows"] if "error" in row] == ["RuntimeError: first line"] * 2
    both = quick(tmp_path, "--append", "--model", "tiny", "--case", "2x8", "--case", "4x8")
    assert [row["batch"] for row in both["rows"]] == [1] * 3 + [2] * 3 + [4] * 3
    assert both["environment"]["measured"] == [["tiny", 2, 8], ["tiny", 4, 8]]
    assert both["earlier_environments"] == [first["environment"] | {"measured": [["tiny", 1, 8]]}]
    again = quick(tmp_path, "--append", "--model", "tiny", "--case", "1x8")
    assert again["earlier_environments"] == [both["environment"]]  # of the first run no row is left
    assert [row["batch"] for row in again["rows"]] == [1] * 3 + [2] * 3 + [4] * 3
    with pytest.raises(SystemExit, match="2"):
        quick(tmp_path, "--append", "--quick")
    assert "--append: model_forward.json has quick False, this run True" in capsys.readouterr().err


def test_a_long_published_script_is_left_out(case: Case, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(model_forward, "PUBLISHED_TOKENS", 31)
    assert "ms" not in model_forward.published_row(case, None)
    monkeypatch.setattr(model_forward, "PUBLISHED_TOKENS", 32)
    assert model_forward.published_row(case, None)["ms"] > 0


def test_the_plot_shows_every_case(tmp_path: Path) -> None:
    row = {"candidate": "plop_ext", "ratio_p20": 1.0, "ratio_p80": 1.1, "tokens": 8}
    rows = [
        {**row, "model": "a", "batch": 1, "ratio": 1.05},
        {**row, "model": "b", "batch": 2, "ratio": 5.0},
        {"candidate": "plop_ext fast", "model": "b", "batch": 2, "tokens": 8, "error": "none"},
    ]
    source, target = tmp_path / "model_forward.json", tmp_path / "model_forward.svg"
    source.write_text(json.dumps({"rows": rows}))
    plot_model_forward.main([str(source), "--output", str(target)])
    text = target.read_text()
    assert all(part in text for part in ("a, 1 x 8", "b, 2 x 8", "5.0 &gt;", "plop_ext"))


def test_the_headlines_are_those_of_the_fast_path() -> None:
    row = {"model": "llama-3.1-8b", "batch": 8, "tokens": 1024}
    rows = [
        {**row, "candidate": "plain forward", "ratio": 1.0, "of_compiled": 1.1},
        {**row, "candidate": "plop_ext fast", "ratio": 0.75, "of_compiled": 0.85},
        {**row, "candidate": "plop_ext fast, CUDA graph", "error": "none"},
    ]
    found = HEADLINES["model_forward"]({"rows": rows, "environment": {"gpu": "a GPU"}})
    assert found == [
        ("plop_ext fast / plain forward, llama-3.1-8b, 8 x 1024", "0.750", "a GPU"),
        ("plop_ext fast / plain forward, compiled, llama-3.1-8b, 8 x 1024", "0.850", "a GPU"),
    ]


NCU = """==PROF== Connected to process 1
"ID","Process ID","Kernel Name","Metric Name","Metric Unit","Metric Value"
{rows}
"""


def ncu_rows(number: int, kernel: str, **values: str) -> list[str]:
    units = {"us": "ns", "dram_bytes": "byte"}
    return [
        f'"{number}","1","{kernel}","{metric}","{units.get(name, "%")}","{values.get(name, "10")}"'
        for name, metric in profile_kernels.METRICS.items()
    ]


@pytest.mark.parametrize(
    "namespace", ["plop_ext::<unnamed>::", "unnamed>::", ""], ids=["whole", "as ncu cuts it", "none"]
)
def test_what_ncu_wrote_is_assigned_to_calls(namespace: str) -> None:
    planned = [call for call in profile_kernels.launches(CPU) if call.op == "rotary"][:2]
    name = f"void {namespace}rotary_kernel<__nv_bfloat16, (bool)1>(RotaryArgs)"
    rows = ncu_rows(0, name, us="52,500", dram_share="93.5") + ncu_rows(1, name, l2_hit_rate="n/a", occupancy="70")
    found = profile_kernels.read(NCU.format(rows="\n".join(rows)).splitlines(), planned)
    assert [row["shape"] for row in found] == [call.shape for call in planned]
    assert found[0]["kernel"] == "rotary_kernel<__nv_bfloat16, 1>"
    assert found[0]["us"] == 52.5 and found[0]["bound"] == "memory bandwidth"
    assert found[1]["l2_hit_rate"] is None and found[1]["bound"] == "latency"
    with pytest.raises(ValueError, match="rotary: 1 kernels do not belong to 2 calls"):
        profile_kernels.read(NCU.format(rows="\n".join(ncu_rows(0, name))).splitlines(), planned)
    with pytest.raises(ValueError, match="CSV output of ncu"):
        profile_kernels.read(["==ERROR== No kernels were profiled"], planned)


def test_every_profiled_call_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(profile_kernels, "TOKENS", 8)
    monkeypatch.setattr(profile_kernels, "FEW_TOKENS", 8)
    profile_kernels.run(CPU)


PTXAS = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'void plop_ext::(anonymous namespace)::a_kernel<float, 2>(Args)' for 'sm_90a'
ptxas info    : Function properties for void plop_ext::(anonymous namespace)::a_kernel<float, 2>(Args)
    8 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 40 registers, used 1 barriers, 8 bytes cumulative stack size, 384 bytes smem
ptxas info    : Compiling entry function 'b_kernel(int)' for 'sm_90'
ptxas info    : Function properties for b_kernel(int)
    16 bytes stack frame, 12 bytes spill stores, 4 bytes spill loads
ptxas info    : Used 255 registers, used 0 barriers
"""


def test_the_compilers_report_is_understood() -> None:
    first, second = resources.parse(PTXAS)
    assert first == {
        "kernel": "a_kernel<float, 2>",
        "arch": "90",
        "registers": 40,
        "shared_bytes": 384,
        "stack_bytes": 8,
        "spill_bytes": 0,
    }
    assert second["spill_bytes"] == 16 and second["shared_bytes"] == 0


PTX = """
.visible .entry patient(.param .u64 a) {{
	ld.param.u64 %rd1, [a];
	st.shared.f32 [%r1], %f1;
	griddepcontrol.wait;
	ld.global.f32 %f2, [%rd1];
}}
.entry impatient(.param .u64 a) {{
	{access} %f2, [%rd1];
	griddepcontrol.wait;
}}
.weak .entry never() {{
	ret;
}}
"""


@pytest.mark.parametrize("access", ["ld.global.nc.f32", "st.global.f32", "ld.f32", "atom.global.add.f32"])
def test_kernels_that_do_not_wait_are_found(access: str) -> None:
    assert resources.impatient(PTX.format(access=access)) == ["impatient", "never"]
    assert resources.impatient(PTX.format(access="ld.param.u64")) == ["never"]


def test_spills_and_stale_reports_fail() -> None:
    rows = list(resources.parse(PTXAS))
    fresh = {"sources": resources.source_digest(), "access_before_wait": []}
    resources.check({"settings": fresh, "rows": rows[:1]})
    with pytest.raises(SystemExit, match="accessed before the wait for the kernel in front in:\na_kernel"):
        resources.check({"settings": {**fresh, "access_before_wait": ["a_kernel"]}, "rows": rows[:1]})
    with pytest.raises(SystemExit, match="registers spill to memory in:\nb_kernel"):
        resources.check({"settings": fresh, "rows": rows})
    with pytest.raises(SystemExit, match="csrc/cuda has changed"):
        resources.check({"settings": {"sources": "0"}, "rows": []})
