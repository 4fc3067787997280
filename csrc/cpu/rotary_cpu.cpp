// Rotary position embedding on the CPU, one token at a time: its cosines and sines are widened once, for all heads.
#include <algorithm>
#include <cstring>

#include "../rotary.h"
#include "rms_norm.h"

namespace plop_ext {
namespace {

constexpr int64_t kHeadsAtOnce = 4;
static_assert(kHeadsAtOnce * kRotaryUnit % kLanes == 0, "the narrowest heads end at the last lane");

template <typename Element>
PLOP_INLINE void rotate_head(const typename Element::Storage* x, const float* cos, const float* sin,
                             typename Element::Storage* __restrict__ out, int64_t half) {
  for (int64_t d = 0; d < half; ++d) {
    const float a = Element::load(x[d]);
    const float b = Element::load(x[d + half]);
    out[d] = Element::store(Element::round(a * cos[d]) - Element::round(b * sin[d]));
    out[d + half] = Element::store(Element::round(b * cos[d + half]) + Element::round(a * sin[d + half]));
  }
}

template <typename Element>
PLOP_INLINE void rotate_heads(const RotaryArgs& args, const RotaryHeads& heads, const float* cos, const float* sin,
                              int64_t token) {
  using Storage = typename Element::Storage;
  const int64_t head_dim = args.head_dim;
  const int64_t half = args.rotary_dim / 2;
  const auto* x = static_cast<const Storage*>(heads.x) + token * heads.stride;
  const auto* weight = static_cast<const Storage*>(heads.weight);
  const auto* bias = static_cast<const Storage*>(heads.bias);
  auto* out = static_cast<Storage*>(heads.out) + token * heads.heads * head_dim;
  const int64_t slot = sum_slot(token, args.step, args.phase);
  const bool wants_sum = heads.sumsq && slot >= 0;
  LaneSum<Element> sum;
  for (int64_t head = 0; head < heads.heads; ++head) {
    const int64_t first = head * head_dim;
    if (wants_sum && head % kHeadsAtOnce == 0) {
      const int64_t size = std::min(kHeadsAtOnce, heads.heads - head) * head_dim;
      sum.add(x + first, bias ? bias + first : nullptr, size);
    }
    Storage n[kMaxHeadDim];
    if (weight) {
      const float rstd = reciprocal_rms(sumsq<Element>(x + first, nullptr, head_dim), head_dim, args.eps);
      scale<Element>(x + first, rstd, weight, args.unit_offset, n, head_dim);
    } else {
      std::memcpy(n, x + first, static_cast<size_t>(head_dim) * sizeof(Storage));
    }
    rotate_head<Element>(n, cos, sin, out + first, half);
    for (int64_t d = args.rotary_dim; d < head_dim; ++d) out[first + d] = n[d];
  }
  if (wants_sum) heads.sumsq[slot] = sum.total();
}

template <typename Element>
PLOP_INLINE void rotate_tokens(const RotaryArgs& args, int64_t begin, int64_t end) {
  using Storage = typename Element::Storage;
  float cos[kMaxHeadDim];
  float sin[kMaxHeadDim];
  for (int64_t token = begin; token < end; ++token) {
    const int64_t start = token % args.cos_rows * args.rotary_dim;
    for (int64_t d = 0; d < args.rotary_dim; ++d) {
      cos[d] = Element::load(static_cast<const Storage*>(args.cos)[start + d]);
      sin[d] = Element::load(static_cast<const Storage*>(args.sin)[start + d]);
    }
    rotate_heads<Element>(args, args.q, cos, sin, token);
    rotate_heads<Element>(args, args.k, cos, sin, token);
  }
}

PLOP_VECTOR_CLONES void rotate_tokens_float32(const RotaryArgs& args, int64_t begin, int64_t end) {
  rotate_tokens<Float32>(args, begin, end);
}
PLOP_VECTOR_CLONES void rotate_tokens_float16(const RotaryArgs& args, int64_t begin, int64_t end) {
  rotate_tokens<Float16>(args, begin, end);
}
PLOP_VECTOR_CLONES void rotate_tokens_bfloat16(const RotaryArgs& args, int64_t begin, int64_t end) {
  rotate_tokens<BFloat16>(args, begin, end);
}

}  // namespace

void rotary_cpu(const RotaryArgs& args, int64_t begin, int64_t end) {
  switch (args.dtype) {
    case DType::kFloat32:
      return rotate_tokens_float32(args, begin, end);
    case DType::kFloat16:
      return rotate_tokens_float16(args, begin, end);
    case DType::kBFloat16:
      return rotate_tokens_bfloat16(args, begin, end);
    case DType::kFloat64:
      return;
  }
}

}  // namespace plop_ext
