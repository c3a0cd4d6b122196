// Rotary positions of one tensor, forward and backward. A row is the features of one head at one position.

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

template <class T>
DEVICE Wide<T> one_of(const Factor& table, int64_t at) {
  return table.narrow ? Wide<T>(widen(static_cast<const T*>(table.held)[at])) : static_cast<const Wide<T>*>(table.held)[at];
}

// whole: rows may be moved 16 bytes at a time, and what lies in one such vector is turned with what lies in one.
template <class T>
__global__ void __launch_bounds__(256) rotary(const __grid_constant__ Rotary a, bool whole) {
  typedef Wide<T> W;
  constexpr int n = lanes<T>;
  const int64_t vectors = (a.rows.width + n - 1) / n, low = a.turned / 2, high = a.turned - low;
  const int64_t step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t each = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; each < vectors * a.rows.count; each += step) {
    int64_t row = each;
    const int64_t at = divided(row, vectors) * n, left = a.rows.width - at;
    int64_t offset[4];
    place(offset, a.rows, row);
    const T* x = static_cast<const T*>(a.x) + offset[0];
    W v[n], other[n], cos[n], sin[n];
    load(v, x + at, left, whole);
    if (at < a.turned) {
      // What each feature is turned with, and the sines; a backward takes those of the features that it is turned with.
      if (whole) {
        const int64_t partner = a.interleaved ? at : at < low ? at + high : at - low;
        load_factor<T>(cos, a.cos, offset[1] + at, n, true);
        load_factor<T>(sin, a.sin, offset[2] + (a.back ? partner : at), n, true);
        load(other, x + partner, n, true);
        if (a.interleaved) {
#pragma unroll
          for (int j = 0; j < n; j += 2) {
            other[j] = v[j + 1];
            other[j + 1] = v[j];
            if (!a.back) continue;
            const W held = sin[j];
            sin[j] = sin[j + 1];
            sin[j + 1] = held;
          }
        }
      } else {
#pragma unroll
        for (int j = 0; j < n; ++j) {
          const int64_t i = at + j;
          other[j] = cos[j] = sin[j] = 0;
          if (i >= a.turned) continue;
          const int64_t partner = a.interleaved ? i ^ 1 : i < low ? i + high : i - low;
          other[j] = widen(x[partner]);
          cos[j] = one_of<T>(a.cos, offset[1] + i);
          sin[j] = one_of<T>(a.sin, offset[2] + (a.back ? partner : i));
        }
      }
#pragma unroll
      for (int j = 0; j < n; ++j) {
        const bool first = a.interleaved ? j % 2 == 0 : at + j < low;
        W straight = v[j] * cos[j], turned = (first != a.back ? -other[j] : other[j]) * sin[j];
        if (a.round_cos) straight = rounded<T>(straight);
        if (a.round_sin) turned = rounded<T>(turned);
        if (at + j < a.turned) v[j] = straight + turned;
      }
    }
    store(static_cast<T*>(a.y) + offset[3] + at, v, left, whole);
  }
}

}  // namespace

void run(const Rotary& a, const Device& device) {
  of_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    constexpr int n = lanes<T>;
    const bool whole = aligned(a.rows, sizeof(T), {a.x, a.cos.held, a.sin.held, a.y}, 4) && a.rows.width % n == 0 &&
                       a.turned % n == 0 && (a.interleaved || a.turned % (2 * n) == 0);
    Shape shape{quotient_up(quotient_up(a.rows.width, n) * a.rows.count, 256), 256, 1, 0};
    shape.blocks = std::min(shape.blocks, most_blocks);
    start(device, rotary<T>, shape, a, whole);
  });
}

}  // namespace shardcomp::cuda
