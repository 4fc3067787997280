#include <algorithm>
#include <cmath>

#include "../gain_totals.h"

namespace plop_ext {
namespace {

template <typename T>
void add_cell(const GainTotalsArgs& args, const GainRecord& record, int64_t cell_index) {
  const T* s_in = static_cast<const T*>(args.sumsq) + record.in_start;
  const T* s_out = static_cast<const T*>(args.sumsq) + record.out_start;
  double sums[kTotalsFields] = {};
  const int64_t begin = std::max<int64_t>(args.offsets[cell_index], 0);
  const int64_t end = std::min(args.offsets[cell_index + 1], args.n_rows);
  for (int64_t t = begin; t < end; ++t) {
    if (!args.counted[t]) continue;
    const double in = static_cast<double>(s_in[t]);
    const double out = static_cast<double>(s_out[t]);
    if (!std::isfinite(in) || !std::isfinite(out)) {
      sums[kSkippedNonFinite] += 1.0;
    } else if (in == 0.0) {
      sums[kSkippedZero] += 1.0;
    } else {
      const double gain_sq = out / in;
      sums[kSumGain] += std::sqrt(gain_sq);
      sums[kSumGainSq] += gain_sq;
      sums[kTokens] += 1.0;
    }
  }
  double* cell = args.totals + (record.module * args.n_samples + cell_index) * kTotalsFields;
  for (int field = 0; field < kTotalsFields; ++field) cell[field] += sums[field];
}

}  // namespace

void gain_totals_cpu(const GainTotalsCall& call, int64_t begin, int64_t end) {
  const int64_t n_cells = call.args.n_cells;
  for (int64_t cell = begin; cell < end; ++cell) {
    const GainRecord& record = call.records[cell / n_cells];
    if (call.args.dtype == DType::kFloat64) {
      add_cell<double>(call.args, record, cell % n_cells);
    } else {
      add_cell<float>(call.args, record, cell % n_cells);
    }
  }
}

}  // namespace plop_ext
