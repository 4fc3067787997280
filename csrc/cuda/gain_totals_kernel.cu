// One block per (record, group, sample) cell. The records are a kernel parameter: no copy to the device, no
// synchronization. No two records share a module, so each cell has one owner.
#include "../gain_totals.h"
#include "launch.cuh"
#include "reduce.cuh"

namespace plop_ext {
namespace {

constexpr int kThreads = 128;
// 128 records of 24 bytes stay under the 4 KiB of parameters that every architecture takes.
constexpr int kMaxRecords = 128;

struct RecordBatch {
  GainRecord records[kMaxRecords];
};

template <typename T>
__global__ void __launch_bounds__(kThreads) gain_totals_kernel(const GainTotalsArgs args, const RecordBatch batch) {
  __shared__ double scratch[kThreads / kWarpSize];
  await_previous_kernel();
  const GainRecord& record = batch.records[blockIdx.y];
  const T* __restrict__ s_in = static_cast<const T*>(args.sumsq) + record.in_start;
  const T* __restrict__ s_out = static_cast<const T*>(args.sumsq) + record.out_start;

  for (int64_t index = blockIdx.x; index < args.n_cells; index += gridDim.x) {
    double sums[kTotalsFields] = {};
    const int64_t begin = max(args.offsets[index], int64_t{0});
    const int64_t end = min(args.offsets[index + 1], args.n_rows);
    for (int64_t t = begin + threadIdx.x; t < end; t += kThreads) {
      if (!args.counted[t]) continue;
      const double in = static_cast<double>(s_in[t]);
      const double out = static_cast<double>(s_out[t]);
      if (!isfinite(in) || !isfinite(out)) {
        sums[kSkippedNonFinite] += 1.0;
      } else if (in == 0.0) {
        sums[kSkippedZero] += 1.0;
      } else {
        const double gain_sq = out / in;
        sums[kSumGain] += sqrt(gain_sq);
        sums[kSumGainSq] += gain_sq;
        sums[kTokens] += 1.0;
      }
    }
    double* cell = args.totals + (record.module * args.n_samples + index) * kTotalsFields;
#pragma unroll
    for (int field = 0; field < kTotalsFields; ++field) {
      const double sum = block_sum<kThreads>(sums[field], scratch);
      if (threadIdx.x == 0) cell[field] += sum;
    }
  }
}

}  // namespace

const char* launch_gain_totals(const GainTotalsCall& call, void* stream) {
  const GainTotalsArgs& args = call.args;
  const auto cuda_stream = static_cast<cudaStream_t>(stream);
  const unsigned cells = static_cast<unsigned>(args.n_cells < kMaxGrid ? args.n_cells : kMaxGrid);
  for (int64_t first = 0; first < call.n_records; first += kMaxRecords) {
    const int64_t count = call.n_records - first < kMaxRecords ? call.n_records - first : kMaxRecords;
    RecordBatch batch = {};
    for (int64_t i = 0; i < count; ++i) batch.records[i] = call.records[first + i];
    const dim3 grid(cells, static_cast<unsigned>(count));
    if (args.dtype == DType::kFloat64) {
      launch(gain_totals_kernel<double>, grid, kThreads, cuda_stream, args, batch);
    } else {
      launch(gain_totals_kernel<float>, grid, kThreads, cuda_stream, args, batch);
    }
    if (const char* error = launch_error()) return error;
  }
  return nullptr;
}

}  // namespace plop_ext
