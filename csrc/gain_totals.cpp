// plop_ext::gain_totals_: checks, then the CPU or the CUDA kernel. The schema and its documentation:
// plop_ext/ops/gain_totals.py.
#include "gain_totals.h"

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>

#include <unordered_set>
#include <vector>

#include "checks.h"
#ifdef PLOP_WITH_CUDA
#include "stream.h"
#endif

namespace plop_ext {
namespace {

constexpr const char* kOp = "gain_totals_";
constexpr int64_t kRecordFields = 3;

struct Checked {
  GainTotalsArgs args;
  std::vector<GainRecord> records;
};

Checked checked_args(const Tensor& totals,   // [M, B, 5]
                     const Tensor& sumsq,    // [C]
                     const Tensor& counted,  // [R]
                     const Tensor& offsets,  // [G * B + 1]
                     const std::vector<int64_t>& records) {
  check_same_device(kOp, totals, "totals", sumsq);
  check_same_device(kOp, counted, "counted", sumsq);
  check_same_device(kOp, offsets, "offsets", sumsq);
  check_dtype(kOp, totals, "totals", ScalarType::Double);
  check_dtype(kOp, counted, "counted", ScalarType::Bool);
  check_dtype(kOp, offsets, "offsets", ScalarType::Long);
  Checked checked = {};
  const bool is_double = sumsq.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || sumsq.scalar_type() == ScalarType::Float, kOp,
                  ": sumsq must be float32 or float64, got ", torch::headeronly::toString(sumsq.scalar_type()));
  checked.args.dtype = is_double ? DType::kFloat64 : DType::kFloat32;
  check_dim(kOp, totals, "totals", 3);
  check_dim(kOp, sumsq, "sumsq", 1);
  check_dim(kOp, counted, "counted", 1);
  check_dim(kOp, offsets, "offsets", 1);
  check_contiguous(kOp, totals, "totals");
  check_contiguous(kOp, sumsq, "sumsq");
  check_contiguous(kOp, counted, "counted");
  check_contiguous(kOp, offsets, "offsets");
  STD_TORCH_CHECK(totals.size(2) == kTotalsFields, kOp, ": totals must be [M, B, ", kTotalsFields, "], got ",
                  totals.size(2), " fields");
  const int64_t samples = totals.size(1);
  const int64_t cells = offsets.size(0) - 1;
  STD_TORCH_CHECK(samples == 0 ? cells == 0 : cells >= samples, kOp, ": offsets must have ", samples + 1,
                  " elements, got ", offsets.size(0));
  STD_TORCH_CHECK(samples == 0 || cells % samples == 0, kOp, ": offsets must have one element and ", samples,
                  " per group, got ", offsets.size(0));
  const int64_t groups = samples == 0 ? 1 : cells / samples;
  STD_TORCH_CHECK(records.size() % kRecordFields == 0, kOp,
                  ": records must be (module, in_start, out_start) triples, got ", records.size(), " numbers");

  const int64_t rows = counted.size(0);
  const int64_t last = sumsq.size(0) - rows;
  std::unordered_set<int64_t> seen;
  for (size_t i = 0; i < records.size(); i += kRecordFields) {
    const GainRecord record = {records[i], records[i + 1], records[i + 2]};
    STD_TORCH_CHECK(record.module >= 0 && record.module <= totals.size(0) - groups, kOp,
                    ": records must name modules in [0, ", totals.size(0) - groups + 1, "), got ", record.module);
    STD_TORCH_CHECK(
        record.in_start >= 0 && record.in_start <= last && record.out_start >= 0 && record.out_start <= last, kOp,
        ": records must start in [0, ", last, "], got ", record.in_start, " and ", record.out_start);
    for (int64_t group = 0; group < groups; ++group) {
      STD_TORCH_CHECK(seen.insert(record.module + group).second, kOp,
                      ": records must name each module once, got module ", record.module + group, " twice");
    }
    checked.records.push_back(record);
  }
  checked.args.totals = static_cast<double*>(totals.mutable_data_ptr());
  checked.args.sumsq = sumsq.const_data_ptr();
  checked.args.counted = static_cast<const uint8_t*>(counted.const_data_ptr());
  checked.args.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  checked.args.n_samples = samples;
  checked.args.n_cells = cells;
  checked.args.n_rows = rows;
  return checked;
}

void gain_totals_on_cpu(Tensor totals, Tensor sumsq, Tensor counted, Tensor offsets, std::vector<int64_t> records) {
  const Checked checked = checked_args(totals, sumsq, counted, offsets, records);
  const int64_t n_cells = checked.args.n_cells;
  const int64_t cells = static_cast<int64_t>(checked.records.size()) * n_cells;
  if (cells == 0 || counted.size(0) == 0) return;
  // A cell is one sample of one module; below this many rows a second thread costs more than it saves.
  constexpr int64_t kGrain = 4096;
  const int64_t grain = 1 + kGrain * n_cells / counted.size(0);
  torch::stable::parallel_for(0, cells, grain, [&checked, n_cells](int64_t begin, int64_t end) {
    for (int64_t cell = begin; cell < end; ++cell) {
      gain_totals_cpu(checked.args, checked.records[static_cast<size_t>(cell / n_cells)], cell % n_cells);
    }
  });
}

#ifdef PLOP_WITH_CUDA
void gain_totals_on_cuda(Tensor totals, Tensor sumsq, Tensor counted, Tensor offsets, std::vector<int64_t> records) {
  const Checked checked = checked_args(totals, sumsq, counted, offsets, records);
  if (checked.records.empty() || checked.args.n_cells == 0 || counted.size(0) == 0) return;
  const torch::stable::accelerator::DeviceGuard guard(sumsq.get_device_index());
  const char* error =
      launch_gain_totals(checked.args, checked.records.data(), static_cast<int64_t>(checked.records.size()),
                         current_cuda_stream(sumsq.get_device_index()));
  STD_TORCH_CHECK(error == nullptr, kOp, ": the CUDA kernel failed to launch: ", error);
}
#endif

}  // namespace
}  // namespace plop_ext

STABLE_TORCH_LIBRARY_IMPL(plop_ext, CPU, m) { m.impl("gain_totals_", TORCH_BOX(&plop_ext::gain_totals_on_cpu)); }
#ifdef PLOP_WITH_CUDA
STABLE_TORCH_LIBRARY_IMPL(plop_ext, CUDA, m) { m.impl("gain_totals_", TORCH_BOX(&plop_ext::gain_totals_on_cuda)); }
#endif
