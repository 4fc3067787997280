// Gated activation on the CPU: a block of a row is computed, then summed while it is in the cache.
#include <algorithm>

#include "../gated_activation.h"
#include "vector.h"

namespace plop_ext {
namespace {

// e^x within 1 ulp for 1 + e^x: zero below the normal numbers, infinite above the largest, and any number for NaN.
// Bounds are taken on integers, where the compiler knows minimum and maximum.
PLOP_INLINE float exp_vector(float x) {
  const uint32_t bits = float_to_bits(x);
  const uint32_t magnitude = std::min(bits & 0x7fffffffu, 0x42b20000u);  // 89
  x = bits_to_float(magnitude | (bits & 0x80000000u));
  // Adding and subtracting 1.5 * 2^23 rounds to an integer, which the sum's low bits hold.
  const float shifted = x * 1.44269504f + 12582912.0f;
  const float exponent = shifted - 12582912.0f;
  // The high part of ln 2 has few bits: its product with the exponent is exact.
  const float r = (x - exponent * 0.693359375f) - exponent * -2.12194440e-4f;
  float p = 1.9875691500e-4f;
  p = p * r + 1.3981999507e-3f;
  p = p * r + 8.3334519073e-3f;
  p = p * r + 4.1665795894e-2f;
  p = p * r + 1.6666665459e-1f;
  p = p * r + 5.0000001201e-1f;
  p = p * (r * r) + r + 1.0f;
  // Twice half the power, because 2^128 is no float.
  const int32_t biased = std::max(static_cast<int32_t>(float_to_bits(shifted)) - 0x4b400000 + 126, 0);
  return p * bits_to_float(static_cast<uint32_t>(biased) << 23) * 2.0f;
}

PLOP_INLINE float silu(float x) { return x / (1.0f + exp_vector(-x)); }

// 1 + tanh(z) = 2 / (1 + e^-2z), with the rounding that tanh would have had, as PyTorch's own formula has it.
PLOP_INLINE float gelu_tanh(float x) {
  const float z = 0.797884561f * (x + 0.044715f * (x * x * x));
  const float tanh = 2.0f / (1.0f + exp_vector(-2.0f * z)) - 1.0f;
  return 0.5f * x * (1.0f + tanh);
}

template <typename Element, Activation kActivation>
PLOP_INLINE void gate_block(const typename Element::Storage* gate, const typename Element::Storage* up,
                            typename Element::Storage* out, int64_t n) {
  for (int64_t k = 0; k < n; ++k) {
    const float x = Element::load(gate[k]);
    const float activated = kActivation == Activation::kSilu ? silu(x) : gelu_tanh(x);
    out[k] = Element::store(Element::round(activated) * Element::load(up[k]));
  }
}

template <typename Element>
PLOP_INLINE void gate_rows(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  using Storage = typename Element::Storage;
  const int64_t n = args.features;
  const auto* gate_bias = static_cast<const Storage*>(args.gate_bias);
  const auto* up_bias = static_cast<const Storage*>(args.up_bias);
  for (int64_t row = begin; row < end; ++row) {
    const auto* gate = static_cast<const Storage*>(args.gate) + row * args.gate_stride;
    const auto* up = static_cast<const Storage*>(args.up) + row * args.up_stride;
    auto* out = static_cast<Storage*>(args.out) + row * n;
    const int64_t slot = sum_slot(row, args.step, args.phase);
    LaneSum<Element> gate_sum, up_sum, out_sum;
    for (int64_t k = 0; k < n; k += kBlock) {
      const int64_t size = std::min(kBlock, n - k);
      if (args.activation == Activation::kSilu) {
        gate_block<Element, Activation::kSilu>(gate + k, up + k, out + k, size);
      } else {
        gate_block<Element, Activation::kGeluTanh>(gate + k, up + k, out + k, size);
      }
      if (slot < 0) continue;
      if (args.gate_sumsq) gate_sum.add(gate + k, gate_bias ? gate_bias + k : nullptr, size);
      if (args.up_sumsq) up_sum.add(up + k, up_bias ? up_bias + k : nullptr, size);
      if (args.out_sumsq) out_sum.add(out + k, nullptr, size);
    }
    if (slot < 0) continue;
    if (args.gate_sumsq) args.gate_sumsq[slot] = gate_sum.total();
    if (args.up_sumsq) args.up_sumsq[slot] = up_sum.total();
    if (args.out_sumsq) args.out_sumsq[slot] = out_sum.total();
  }
}

PLOP_VECTOR_CLONES void gate_rows_float32(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  gate_rows<Float32>(args, begin, end);
}
PLOP_VECTOR_CLONES void gate_rows_float16(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  gate_rows<Float16>(args, begin, end);
}
PLOP_VECTOR_CLONES void gate_rows_bfloat16(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  gate_rows<BFloat16>(args, begin, end);
}

}  // namespace

void gated_activation_cpu(const GatedActivationArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return gate_rows_float32(args, begin, end);
    case DType::kFloat16:
      return gate_rows_float16(args, begin, end);
    case DType::kBFloat16:
      return gate_rows_bfloat16(args, begin, end);
    case DType::kFloat64:
      return;
  }
}

}  // namespace plop_ext
