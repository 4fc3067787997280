// The steps of an RMSNorm on the CPU: callers process a row in blocks that stay in the cache.
#pragma once

#include <cmath>

#include "vector.h"

namespace plop_ext {

PLOP_INLINE float reciprocal_rms(float sum_of_squares, int64_t n, float eps) {
  return 1.0f / std::sqrt(sum_of_squares / static_cast<float>(n) + eps);
}

// out = x * rstd * weight. x * rstd is rounded before the product with the weight, unless the weight is stored as its
// distance from 1. `out` may be `x`.
template <typename Element>
PLOP_INLINE void scale(const typename Element::Storage* x, float rstd, const typename Element::Storage* weight,
                       bool unit_offset, typename Element::Storage* out, int64_t n) {
  if (unit_offset) {
    for (int64_t k = 0; k < n; ++k) {
      out[k] = Element::store(Element::load(x[k]) * rstd * (1.0f + Element::load(weight[k])));
    }
  } else {
    for (int64_t k = 0; k < n; ++k) {
      out[k] = Element::store(Element::round(Element::load(x[k]) * rstd) * Element::load(weight[k]));
    }
  }
}

}  // namespace plop_ext
