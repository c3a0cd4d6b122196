// The product of an activated gate and another value, and its backward.

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

constexpr float sqrt_half = 0.707106781186547524400844362104849039f;
constexpr float inner_scale = 0.797884560802865355879892119868763737f;  // √(2/π)
constexpr float cubic = 0.044715f;

DEVICE float activated(Activation which, float x) {
  if (which == Activation::silu) return x / (1.0f + expf(-x));
  if (which == Activation::gelu) return x * 0.5f * (1.0f + erff(x * sqrt_half));
  return 0.5f * x * (1.0f + tanhf(inner_scale * fmaf(cubic, x * x * x, x)));
}

DEVICE float activated(Activation which, float x, float& slope) {
  if (which == Activation::silu) {
    const float s = 1.0f / (1.0f + expf(-x));
    slope = s * (1.0f + x * (1.0f - s));
    return x * s;
  }
  if (which == Activation::gelu) {
    const float below = 0.5f * (1.0f + erff(x * sqrt_half));
    slope = below + x * (0.5f * inner_scale * expf(-0.5f * x * x));
    return x * below;
  }
  const float t = tanhf(inner_scale * fmaf(cubic, x * x * x, x));
  const float inner_slope = inner_scale * (1.0f + 3.0f * cubic * x * x);
  slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner_slope;
  return 0.5f * x * (1.0f + t);
}

template <class T>
__global__ void __launch_bounds__(256) gated(const __grid_constant__ Gated a, bool whole) {
  constexpr int n = lanes<T>;
  const int64_t vectors = (a.rows.width + n - 1) / n, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t each = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; each < vectors * a.rows.count; each += step) {
    int64_t row = a.rows.dims == 0 ? 0 : each;
    const int64_t at = (a.rows.dims == 0 ? each : divided(row, vectors)) * n, left = a.rows.width - at;
    int64_t offset[3];
    place(offset, a.rows, row);
    float v[n], up[n];
    load(v, static_cast<const T*>(a.gate) + offset[0] + at, left, whole);
    load(up, static_cast<const T*>(a.up) + offset[1] + at, left, whole);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      v[j] = activated(a.activation, v[j]);
      v[j] = (a.round_first ? rounded<T>(v[j]) : v[j]) * up[j];
    }
    store(static_cast<T*>(a.y) + offset[2] + at, v, left, whole);
  }
}

template <class T>
__global__ void __launch_bounds__(256) gated_bwd(const __grid_constant__ GatedBwd a, bool whole) {
  constexpr int n = lanes<T>;
  const int64_t vectors = (a.rows.width + n - 1) / n, step = int64_t(gridDim.x) * blockDim.x;
  for (int64_t each = int64_t(blockIdx.x) * blockDim.x + threadIdx.x; each < vectors * a.rows.count; each += step) {
    int64_t row = a.rows.dims == 0 ? 0 : each;
    const int64_t at = (a.rows.dims == 0 ? each : divided(row, vectors)) * n, left = a.rows.width - at;
    int64_t offset[5];
    place(offset, a.rows, row);
    float g[n], v[n], up[n];
    load(g, static_cast<const T*>(a.gradient) + offset[0] + at, left, whole);
    load(v, static_cast<const T*>(a.gate) + offset[1] + at, left, whole);
    load(up, static_cast<const T*>(a.up) + offset[2] + at, left, whole);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      float slope;
      const float value = activated(a.activation, v[j], slope);
      v[j] = g[j] * up[j] * slope;
      up[j] = g[j] * value;
    }
    store(static_cast<T*>(a.of_gate) + offset[3] + at, v, left, whole);
    store(static_cast<T*>(a.of_up) + offset[4] + at, up, left, whole);
  }
}

// Of the dtypes that are computed in float.
template <class F>
void of_narrow_dtype(DType dtype, F body) {
  switch (dtype) {
    case DType::bf16: return body(bf16{});
    case DType::fp16: return body(fp16{});
    default: return body(float{});
  }
}

Shape elementwise(const Rows& rows, int n) {
  return {std::min(quotient_up(quotient_up(rows.width, n) * rows.count, 256), most_blocks), 256, 1, 0};
}

}  // namespace

void run(const Gated& a, const Device& device) {
  of_narrow_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    const bool whole = aligned(a.rows, sizeof(T), {a.gate, a.up, a.y}, 3);
    start(device, gated<T>, elementwise(a.rows, lanes<T>), a, whole);
  });
}

void run(const GatedBwd& a, const Device& device) {
  of_narrow_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    const bool whole = aligned(a.rows, sizeof(T), {a.gradient, a.gate, a.up, a.of_gate, a.of_up}, 5);
    start(device, gated_bwd<T>, elementwise(a.rows, lanes<T>), a, whole);
  });
}

}  // namespace shardcomp::cuda
