// totals[m, b] += (sum g, sum g^2, tokens, zero-input tokens, non-finite tokens) over the counted rows of sample b,
// where g = sqrt(s_out / s_in) is the gain ||W z|| / ||z|| of one token. One thread block (CPU: one task) owns a
// (record, sample) cell and adds in a fixed order, in float64: no atomics, the same bits on every run.
#pragma once

#include "types.h"

namespace plop_ext {

constexpr int kTotalsFields = 5;

struct GainRecord {
  int64_t module;     // row of `totals`
  int64_t in_start;   // first element of the module's s_in in `sumsq`
  int64_t out_start;  // first element of its s_out
};

struct GainTotalsArgs {
  double* totals;          // [M, B, kTotalsFields]
  const void* sumsq;       // [C] of `dtype` (float32 or float64)
  const uint8_t* counted;  // [n_rows] 0: row left out (padding, prompt)
  const int64_t* offsets;  // [B + 1] rows of sample b: offsets[b] .. offsets[b + 1]
  DType dtype;
  int64_t n_samples;  // B
  int64_t n_rows;     // offsets past it are cut to it
};

// Adds one (record, sample) cell on the calling thread.
void gain_totals_cpu(const GainTotalsArgs& args, const GainRecord& record, int64_t sample);

// Enqueues all cells on `stream` (a cudaStream_t). Records must name each module at most once.
const char* launch_gain_totals(const GainTotalsArgs& args, const GainRecord* records, int64_t n_records, void* stream);

}  // namespace plop_ext
