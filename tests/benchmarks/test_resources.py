"""What the compiler says of registers and spills is understood, and a stale report fails."""

from __future__ import annotations

import pytest

from benchmarks import resources

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
