// The product of an activated gate and another value, and its backward.

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

constexpr float sqrt_half = 0.707106781186547524400844362104849039f;
constexpr float inner_scale = 0.797884560802865355879892119868763737f;  // √(2/π)
constexpr float cubic = 0.044715f;
constexpr float log2_e = 1.44269504088896340735992468100189214f;

// 1 / x but for one unit in its last place, zero where that is no normal number; x is at least 1/4.
DEVICE float about_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float made;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
  return made;
#else
  return x > 0x1p126f ? 0.0f : 1.0f / x;
#endif
}

// 2ˣ but for two units in its last place.
DEVICE float about_power_of_2(float x) {
#if defined(__CUDA_ARCH__)
  float made;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(made) : "f"(x));
  return made;
#else
  return exp2f(x);
#endif
}

// x / d, where d is at least 1, to the last bit: the steps of a division of any two numbers, without its branches for those that
// are too large or too small. about: 4 / d as above.
DEVICE float quotient(float x, float d, float about) {
  constexpr float most = 3.40282346638528859812e+38f;
  const float finite = fminf(d, most);  // for infinity, 1 / d is zero and so is what corrects it
  const float first = about * 0.25f;    // d itself may be so large that `about` would be no normal number
  const float reciprocal = fmaf(first, fmaf(-finite, first, 1.0f), first);
  const float near = x * reciprocal;
  // By how much d · near is more than x, in this order for the sign of zero; no number where x is infinite, which it stays.
  const float more = fminf(fmaf(finite, near, -x), most);
  return fmaf(-more, reciprocal, near);
}
DEVICE float quotient(float x, float d) { return quotient(x, d, about_reciprocal(d * 0.25f)); }

DEVICE float silu(float x) { return quotient(x, 1.0f + expf(-x)); }

// The same in a third of the instructions, for an x that is a bf16 and a result that is rounded to one: what it is off by may be
// seen for no more than four of all x, whose value lies almost halfway between two bf16. It divides by a fourth of 1 + e⁻ˣ, whose
// reciprocal is a normal number as long as e⁻ˣ is finite.
DEVICE float silu_of_bf16(float x) {
  const float fourth = 0.25f + about_power_of_2(fmaf(x, -log2_e, -2.0f));
  return 0.25f * x * about_reciprocal(fourth);
}

DEVICE float gelu(float x) { return x * 0.5f * (1.0f + erff(x * sqrt_half)); }
DEVICE float gelu_tanh(float x) { return 0.5f * x * (1.0f + tanhf(inner_scale * fmaf(cubic, x * x * x, x))); }

// The activation, and its derivative.
DEVICE float silu(float x, float& slope) {
  const float s = quotient(1.0f, 1.0f + expf(-x));
  slope = s * (1.0f + x * (1.0f - s));
  return x * s;
}
DEVICE float gelu(float x, float& slope) {
  const float below = 0.5f * (1.0f + erff(x * sqrt_half));
  slope = below + x * (0.5f * inner_scale * expf(-0.5f * x * x));
  return x * below;
}
DEVICE float gelu_tanh(float x, float& slope) {
  const float t = tanhf(inner_scale * fmaf(cubic, x * x * x, x));
  const float inner_slope = inner_scale * (1.0f + 3.0f * cubic * x * x);
  slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner_slope;
  return 0.5f * x * (1.0f + t);
}

// Every number by `each`; which activation it is, is asked once for all of them.
template <int n, class F>
DEVICE void for_all(F each) {
#pragma unroll
  for (int j = 0; j < n; ++j) each(j);
}

// The gate becomes the result.
template <class T, int n>
DEVICE void combine(const Gated& a, float (&gate)[n], const float (&up)[n]) {
  if (a.activation == Activation::silu) {
    for_all<n>([&](int j) { gate[j] = std::is_same_v<T, bf16> ? silu_of_bf16(gate[j]) : silu(gate[j]); });
  } else if (a.activation == Activation::gelu) {
    for_all<n>([&](int j) { gate[j] = gelu(gate[j]); });
  } else {
    for_all<n>([&](int j) { gate[j] = gelu_tanh(gate[j]); });
  }
  if (a.round_first) for_all<n>([&](int j) { gate[j] = rounded<T>(gate[j]); });
  for_all<n>([&](int j) { gate[j] *= up[j]; });
}

// Gate and up become their gradients.
template <int n>
DEVICE void combine(const GatedBwd& a, const float (&gradient)[n], float (&gate)[n], float (&up)[n]) {
  const auto make = [&](int j, float value, float slope) {
    gate[j] = gradient[j] * up[j] * slope;
    up[j] = gradient[j] * value;
  };
  float slope;
  if (a.activation == Activation::silu) {
    for_all<n>([&](int j) {
      const float value = silu(gate[j], slope);
      make(j, value, slope);
    });
  } else if (a.activation == Activation::gelu) {
    for_all<n>([&](int j) {
      const float value = gelu(gate[j], slope);
      make(j, value, slope);
    });
  } else {
    for_all<n>([&](int j) {
      const float value = gelu_tanh(gate[j], slope);
      make(j, value, slope);
    });
  }
}

// Some neighbours in a row: the first is element offset[t] of tensor t, and there are `left` to the row's end, none behind the
// last row.
template <int tensors>
struct Some {
  int64_t left = 0;
  int64_t offset[tensors];

  __device__ __forceinline__ Some(const Rows& rows, int n, int64_t each) {
    const int64_t vectors = rows.dims == 0 ? 0 : (rows.width + n - 1) / n;
    int64_t at = each * n;
#pragma unroll
    for (int t = 0; t < tensors; ++t) offset[t] = 0;
    if (rows.dims != 0) {
      if (each >= vectors * rows.count) return;
      at = divided(each, vectors) * n;
      place(offset, rows, each);
    }
    left = rows.width - at;
#pragma unroll
    for (int t = 0; t < tensors; ++t) offset[t] += at;
  }
};

constexpr int threads = 256, ahead = 2;  // vectors of each tensor that are on their way at once

// Where all elements lie one behind another, in whole vectors.
template <class T>
__global__ void __launch_bounds__(threads) gated_flat(const __grid_constant__ Gated a) {
  constexpr int n = lanes<T>;
  const int64_t vectors = a.rows.width / n, first = int64_t(blockIdx.x) * ahead * threads + threadIdx.x;
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T* y = static_cast<T*>(a.y);
  uint4 words[ahead][2] = {};
#pragma unroll
  for (int k = 0; k < ahead; ++k) {
    const int64_t at = first + k * threads;
    if (at >= vectors) continue;
    words[k][0] = fetched(gate + at * n);
    words[k][1] = fetched(up + at * n);
  }
#pragma unroll
  for (int k = 0; k < ahead; ++k) {
    const int64_t at = first + k * threads;
    if (at >= vectors) continue;
    float v[n], other[n];
    unpack<T>(v, words[k][0]);
    unpack<T>(other, words[k][1]);
    combine<T>(a, v, other);
    store(y + at * n, v, n, true);
  }
}

template <class T>
__global__ void __launch_bounds__(threads) gated(const __grid_constant__ Gated a, bool whole) {
  constexpr int n = lanes<T>;
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T* y = static_cast<T*>(a.y);
  const int64_t vectors = (a.rows.width + n - 1) / n * a.rows.count, step = int64_t(gridDim.x) * ahead * threads;
  for (int64_t first = int64_t(blockIdx.x) * ahead * threads + threadIdx.x; first < vectors; first += step) {
    uint4 words[ahead][2];
    int64_t to[ahead];
    bool every = true;
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      const Some<3> some(a.rows, n, first + k * threads);
      to[k] = whole && some.left >= n ? some.offset[2] : -1;
      if (to[k] >= 0) {
        words[k][0] = fetched(gate + some.offset[0]);
        words[k][1] = fetched(up + some.offset[1]);
      } else {
        every = false;
      }
    }
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      if (to[k] < 0) continue;
      float v[n], other[n];
      unpack<T>(v, words[k][0]);
      unpack<T>(other, words[k][1]);
      combine<T>(a, v, other);
      store(y + to[k], v, n, true);
    }
    if (every) continue;
#pragma unroll 1
    for (int k = 0; k < ahead; ++k) {
      const Some<3> some(a.rows, n, first + k * threads);
      if (whole && some.left >= n) continue;
#pragma unroll 1
      for (int j = 0; j < n && j < some.left; ++j) {
        float v[1] = {widen(gate[some.offset[0] + j])};
        const float other[1] = {widen(up[some.offset[1] + j])};
        combine<T>(a, v, other);
        y[some.offset[2] + j] = Narrow<T>::of(v[0]);
      }
    }
  }
}

template <class T>
__global__ void __launch_bounds__(threads) gated_bwd(const __grid_constant__ GatedBwd a, bool whole) {
  constexpr int n = lanes<T>;
  const T *gradient = static_cast<const T*>(a.gradient), *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T *of_gate = static_cast<T*>(a.of_gate), *of_up = static_cast<T*>(a.of_up);
  const int64_t vectors = (a.rows.width + n - 1) / n * a.rows.count, step = int64_t(gridDim.x) * threads;
  for (int64_t each = int64_t(blockIdx.x) * threads + threadIdx.x; each < vectors; each += step) {
    const Some<5> some(a.rows, n, each);
    if (whole && some.left >= n) {
      const uint4 words[] = {fetched(gradient + some.offset[0]), fetched(gate + some.offset[1]), fetched(up + some.offset[2])};
      float g[n], v[n], other[n];
      unpack<T>(g, words[0]);
      unpack<T>(v, words[1]);
      unpack<T>(other, words[2]);
      combine(a, g, v, other);
      store(of_gate + some.offset[3], v, n, true);
      store(of_up + some.offset[4], other, n, true);
      continue;
    }
#pragma unroll 1
    for (int j = 0; j < n && j < some.left; ++j) {
      const float g[1] = {widen(gradient[some.offset[0] + j])};
      float v[1] = {widen(gate[some.offset[1] + j])}, other[1] = {widen(up[some.offset[2] + j])};
      combine(a, g, v, other);
      of_gate[some.offset[3] + j] = Narrow<T>::of(v[0]);
      of_up[some.offset[4] + j] = Narrow<T>::of(other[0]);
    }
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

Shape elementwise(const Rows& rows, int n, int each) {
  return {std::min(quotient_up(quotient_up(rows.width, n) * rows.count, threads * each), most_blocks), threads, 1, 0};
}

}  // namespace

void run(const Gated& a, const Device& device) {
  of_narrow_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    const bool whole = aligned(a.rows, sizeof(T), {a.gate, a.up, a.y}, 3);
    const Shape shape = elementwise(a.rows, lanes<T>, ahead);
    if (whole && a.rows.dims == 0 && a.rows.width % lanes<T> == 0 && shape.blocks < most_blocks) {
      return start(device, gated_flat<T>, shape, a);
    }
    start(device, gated<T>, shape, a, whole);
  });
}

void run(const GatedBwd& a, const Device& device) {
  of_narrow_dtype(a.dtype, [&](auto held) {
    typedef decltype(held) T;
    const bool whole = aligned(a.rows, sizeof(T), {a.gradient, a.gate, a.up, a.of_gate, a.of_up}, 5);
    start(device, gated_bwd<T>, elementwise(a.rows, lanes<T>, 1), a, whole);
  });
}

}  // namespace shardcomp::cuda
