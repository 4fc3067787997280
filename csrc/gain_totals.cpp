// plop_ext::gain_totals_: checks, then the CPU or the CUDA kernel. The schema and its documentation:
// plop_ext/ops/gain_totals.py.
#include "gain_totals.h"

#include <unordered_set>
#include <vector>

#include "checks.h"
#include "run.h"

namespace plop_ext {
namespace {

constexpr const char* kOp = "gain_totals_";
constexpr int64_t kRecordFields = 3;

void gain_totals(const Tensor& totals,   // [M, B, 5]
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
  const bool is_double = sumsq.scalar_type() == ScalarType::Double;
  STD_TORCH_CHECK(is_double || sumsq.scalar_type() == ScalarType::Float, kOp,
                  ": sumsq must be float32 or float64, got ", torch::headeronly::toString(sumsq.scalar_type()));
  check_dim(kOp, totals, "totals", 3);
  check_dim(kOp, sumsq, "sumsq", 1);
  check_dim(kOp, counted, "counted", 1);
  check_dim(kOp, offsets, "offsets", 1);
  check_contiguous(kOp, totals, "totals");
  check_contiguous(kOp, sumsq, "sumsq");
  check_contiguous(kOp, counted, "counted");
  check_contiguous(kOp, offsets, "offsets");
  STD_TORCH_CHECK(totals.size(2) == kTotalsFields, kOp, ": totals must be [M, B, ", int{kTotalsFields}, "], got ",
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
  std::vector<GainRecord> checked;
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
    checked.push_back(record);
  }

  GainTotalsArgs args = {};
  args.totals = static_cast<double*>(totals.mutable_data_ptr());
  args.sumsq = sumsq.const_data_ptr();
  args.counted = static_cast<const uint8_t*>(counted.const_data_ptr());
  args.offsets = static_cast<const int64_t*>(offsets.const_data_ptr());
  args.dtype = is_double ? DType::kFloat64 : DType::kFloat32;
  args.n_samples = samples;
  args.n_cells = cells;
  args.n_rows = rows;
  const GainTotalsCall call = {args, checked.data(), static_cast<int64_t>(checked.size())};
  if (rows == 0) return;
  run_tasks<gain_totals_cpu, launch_gain_totals>(kOp, sumsq, call, call.n_records * cells,
                                                 1 + kTotalsGrain * cells / rows);
}

}  // namespace
}  // namespace plop_ext

PLOP_REGISTER("gain_totals_", plop_ext::gain_totals)
