"""What Nsight Compute writes is assigned to the calls that were profiled."""

from __future__ import annotations

import pytest
import torch

from benchmarks import profile_kernels

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
    planned = [call for call in profile_kernels.launches(torch.device("cpu")) if call.op == "rotary"][:2]
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
    profile_kernels.run(torch.device("cpu"))
