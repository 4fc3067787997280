// totals[m + g, b] += (sum r, sum r^2, tokens, zero-input tokens, non-finite tokens) over the counted rows of group g
// and sample b, where r = sqrt(s_out / s_in) is the gain ||W z|| / ||z|| of one row. A group is one expert of a routed
// layer; dense layers have one group. One thread block (CPU: one task) owns a (record, group, sample) cell and adds in
// a fixed order, in float64: no atomics, the same bits on every run.
#pragma once

#include "types.h"

namespace plop_ext {

constexpr int kTotalsFields = 5;

struct GainRecord {
  int64_t module;     // row of `totals` of its first group
  int64_t in_start;   // first element of the module's s_in in `sumsq`
  int64_t out_start;  // first element of its s_out
};

struct GainTotalsArgs {
  double* totals;          // [M, B, kTotalsFields]
  const void* sumsq;       // [C] of `dtype` (float32 or float64)
  const uint8_t* counted;  // [n_rows] 0: row left out (padding, prompt)
  const int64_t* offsets;  // [C + 1] rows of cell c = g * B + b: offsets[c] .. offsets[c + 1]
  DType dtype;
  int64_t n_samples;  // B
  int64_t n_cells;    // C = G * B, cells of one record; they are consecutive in `totals`
  int64_t n_rows;     // offsets past it are cut to it
};

// Adds one cell of a record on the calling thread.
void gain_totals_cpu(const GainTotalsArgs& args, const GainRecord& record, int64_t cell_index);

// Enqueues all cells on `stream` (a cudaStream_t). No two records may share a module.
const char* launch_gain_totals(const GainTotalsArgs& args, const GainRecord* records, int64_t n_records, void* stream);

}  // namespace plop_ext
