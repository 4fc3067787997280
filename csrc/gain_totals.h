// totals[m + g, b] += (sum r, sum r^2, tokens, zero-input tokens, non-finite tokens) over the counted rows of group g
// and sample b, where r = sqrt(s_out / s_in) is the gain ||W z|| / ||z|| of one row. A group is one expert of a routed
// layer; dense layers have one group. One thread block (CPU: one thread) owns a (record, group, sample) cell and adds
// in a fixed order, in float64: no atomics, bitwise identical on every run.
#pragma once

#include "types.h"

namespace plop_ext {

// Fields of a cell of `totals`, in the order of the Python package's TOTALS_FIELDS.
enum TotalsField { kSumGain, kSumGainSq, kTokens, kSkippedZero, kSkippedNonFinite, kTotalsFields };

struct GainRecord {
  int64_t module;     // row of `totals` of its first group
  int64_t in_start;   // first element of the module's s_in in `sumsq`
  int64_t out_start;  // first element of its s_out
};

struct GainTotalsArgs {
  double* totals;          // [M, B, kTotalsFields]
  const void* sumsq;       // [C] of `dtype` (float32 or float64)
  const uint8_t* counted;  // [n_rows] 0: the row is skipped (padding, prompt)
  const int64_t* offsets;  // [C + 1] rows of cell c = g * B + b: offsets[c] .. offsets[c + 1]
  DType dtype;
  int64_t n_samples;  // B
  int64_t n_cells;    // C = G * B, cells of one record; they are consecutive in `totals`
  int64_t n_rows;     // offsets are clamped to it
};

// One call of the op: what all records share, and the records, in host memory. No two records may share a module.
struct GainTotalsCall {
  GainTotalsArgs args;
  const GainRecord* records;
  int64_t n_records;
};

// Adds cells [begin, end) of n_records * n_cells, ordered by record, on the calling thread.
void gain_totals_cpu(const GainTotalsCall& call, int64_t begin, int64_t end);

// Enqueues all cells on `stream` (a cudaStream_t). Returns nullptr, or CUDA's text for a failed launch.
const char* launch_gain_totals(const GainTotalsCall& call, void* stream);

}  // namespace plop_ext
