// y = activation(gate) · up, the inner part of a gated MLP (Shazeer, https://arxiv.org/abs/2002.05202), and its backward.
// Tensors of one shape, in bf16, fp16 or float32; all arithmetic is in float32.
//
//   forward:   y = activation(gate) · up; with `round_first` the activation is rounded to T first, as a model in T does
//   backward:  of_up = gradient · activation(gate);  of_gate = gradient · up · activation'(gate)
//
// Memory traffic for an element: 3 accesses forward, 5 backward (3 reads, 2 writes). The backward computes the activation
// again: to save it would cost two more accesses and a tensor of memory.
//
// In bf16 an element has only 6 bytes forward, so that even an exp and a division count beside the memory traffic. Hence the
// division without branches and the approximate exp below, each with a bound on what they change. gelu calls erff
// and tanhf, as torch's CUDA kernels do.

#include <algorithm>

#include "device.h"

namespace shardcomp::cuda {
namespace {

constexpr float sqrt_half = 0.707106781186547524400844362104849039f;
constexpr float inner_scale = 0.797884560802865355879892119868763737f;  // √(2/π)
constexpr float cubic = 0.044715f;
constexpr float log2_e = 1.44269504088896340735992468100189214f;

// 1 / x to within one unit in the last place; zero where 1 / x is subnormal. x is at least 1/4.
DEVICE float about_reciprocal(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return x > 0x1p126f ? 0.0f : 1.0f / x;
#endif
}

// 2ˣ to within two units in the last place.
DEVICE float about_power_of_2(float x) {
#if defined(__CUDA_ARCH__)
  float result;
  asm("ex2.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
#else
  return exp2f(x);
#endif
}

// x / d for d ≥ 1, correctly rounded: the Newton and remainder steps that nvcc makes of a division, without its branches for
// operands of extreme size, which cost a subroutine. about: an approximate 4 / d. tests/kernels/test_quotient.py compares the
// bits with those of a division and shows that no step can go.
DEVICE float quotient(float x, float d, float about) {
  constexpr float most = 3.40282346638528859812e+38f;
  const float finite = fminf(d, most);  // d = infinity: 1 / d is zero, and so is its correction
  const float first = about * 0.25f;    // 1 / d may be subnormal, which the approximate reciprocal flushes to zero; 4 / d is not
  const float reciprocal = fmaf(first, fmaf(-finite, first, 1.0f), first);
  const float near = x * reciprocal;
  // The remainder d · near - x, in this order for the sign of a zero quotient. It is NaN for an infinite x; fminf then makes it
  // finite, and the quotient stays infinite.
  const float more = fminf(fmaf(finite, near, -x), most);
  return fmaf(-more, reciprocal, near);
}
DEVICE float quotient(float x, float d) { return quotient(x, d, about_reciprocal(d * 0.25f)); }

DEVICE float silu(float x) { return quotient(x, 1.0f + expf(-x)); }

// silu in a third of the instructions, for a bf16 x and a result that is rounded to bf16. Its error changes the rounded result
// for at most 4 of the 65536 values of x, those that lie almost halfway between two bf16 (the emulation's tests count them).
// The divisor is a fourth of 1 + e⁻ˣ, so that its reciprocal is a normal number as long as e⁻ˣ is finite.
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

// Calls `body` for every element. The branch on the activation stays outside, so that it is taken once for n elements.
template <int n, class F>
DEVICE void for_all(F body) {
#pragma unroll
  for (int j = 0; j < n; ++j) body(j);
}

// Overwrites the gate with the result: registers are the limit on loads in flight.
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

// Overwrites gate and up with their gradients.
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

// The `index`-th vector of n neighbours in a row: it begins at element offset[t] of tensor t, and the row has `left` more
// elements from there, none for an index past the last row. Without leading dimensions all offsets are alike and no division is
// needed.
template <int tensors>
struct RowVector {
  int64_t left = 0;
  int64_t offset[tensors];

  __device__ __forceinline__ RowVector(const Rows& rows, int n, int64_t index) {
    const int64_t vectors = rows.dims == 0 ? 0 : (rows.width + n - 1) / n;
    int64_t at = index * n;
#pragma unroll
    for (int t = 0; t < tensors; ++t) offset[t] = 0;
    if (rows.dims != 0) {
      if (index >= vectors * rows.count) return;
      at = divided(index, vectors) * n;
      row_offsets(offset, rows, index);
    }
    left = rows.width - at;
#pragma unroll
    for (int t = 0; t < tensors; ++t) offset[t] += at;
  }
};

constexpr int threads = 256, ahead = 2;  // vectors of each tensor that a thread has in flight

// All tensors are contiguous and whole vectors: one step for each thread, no offsets but the index. This is the case of a model
// with separate gate and up projections.
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

// Any strides and widths, such as the two halves of one packed projection. Full vectors first; then, only if there were others,
// the ends of rows and unaligned rows, element by element.
template <class T>
__global__ void __launch_bounds__(threads) gated(const __grid_constant__ Gated a, bool vectorized) {
  constexpr int n = lanes<T>;
  const T *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T* y = static_cast<T*>(a.y);
  const int64_t vectors = (a.rows.width + n - 1) / n * a.rows.count, step = int64_t(gridDim.x) * ahead * threads;
  for (int64_t first = int64_t(blockIdx.x) * ahead * threads + threadIdx.x; first < vectors; first += step) {
    uint4 words[ahead][2];
    int64_t to[ahead];
    bool all_vectorized = true;
#pragma unroll
    for (int k = 0; k < ahead; ++k) {
      const RowVector<3> vec(a.rows, n, first + k * threads);
      to[k] = vectorized && vec.left >= n ? vec.offset[2] : -1;
      if (to[k] >= 0) {
        words[k][0] = fetched(gate + vec.offset[0]);
        words[k][1] = fetched(up + vec.offset[1]);
      } else {
        all_vectorized = false;
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
    if (all_vectorized) continue;
#pragma unroll 1
    for (int k = 0; k < ahead; ++k) {
      const RowVector<3> vec(a.rows, n, first + k * threads);
      if (vectorized && vec.left >= n) continue;
#pragma unroll 1
      for (int j = 0; j < n && j < vec.left; ++j) {
        float v[1] = {widen(gate[vec.offset[0] + j])};
        const float other[1] = {widen(up[vec.offset[1] + j])};
        combine<T>(a, v, other);
        y[vec.offset[2] + j] = Narrow<T>::of(v[0]);
      }
    }
  }
}

// One vector of each tensor at a time: its three loads are already in flight together.
template <class T>
__global__ void __launch_bounds__(threads) gated_bwd(const __grid_constant__ GatedBwd a, bool vectorized) {
  constexpr int n = lanes<T>;
  const T *gradient = static_cast<const T*>(a.gradient), *gate = static_cast<const T*>(a.gate), *up = static_cast<const T*>(a.up);
  T *of_gate = static_cast<T*>(a.of_gate), *of_up = static_cast<T*>(a.of_up);
  const int64_t vectors = (a.rows.width + n - 1) / n * a.rows.count, step = int64_t(gridDim.x) * threads;
  for (int64_t index = int64_t(blockIdx.x) * threads + threadIdx.x; index < vectors; index += step) {
    const RowVector<5> vec(a.rows, n, index);
    if (vectorized && vec.left >= n) {
      const uint4 words[] = {fetched(gradient + vec.offset[0]), fetched(gate + vec.offset[1]), fetched(up + vec.offset[2])};
      float g[n], v[n], other[n];
      unpack<T>(g, words[0]);
      unpack<T>(v, words[1]);
      unpack<T>(other, words[2]);
      combine(a, g, v, other);
      store(of_gate + vec.offset[3], v, n, true);
      store(of_up + vec.offset[4], other, n, true);
      continue;
    }
#pragma unroll 1
    for (int j = 0; j < n && j < vec.left; ++j) {
      const float g[1] = {widen(gradient[vec.offset[0] + j])};
      float v[1] = {widen(gate[vec.offset[1] + j])}, other[1] = {widen(up[vec.offset[2] + j])};
      combine(a, g, v, other);
      of_gate[vec.offset[3] + j] = Narrow<T>::of(v[0]);
      of_up[vec.offset[4] + j] = Narrow<T>::of(other[0]);
    }
  }
}

// The dtypes that are computed in float32.
template <class F>
void of_narrow_dtype(DType dtype, F body) {
  switch (dtype) {
    case DType::bf16: return body(bf16{});
    case DType::fp16: return body(fp16{});
    default: return body(float{});
  }
}

Shape elementwise(const Rows& rows, int n, int thread_vectors) {
  return {std::min(quotient_up(quotient_up(rows.width, n) * rows.count, threads * thread_vectors), most_blocks), threads, 1, 0};
}

}  // namespace

void run(const Gated& a, const Device& device) {
  of_narrow_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    const bool vectorized = aligned(a.rows, sizeof(T), {a.gate, a.up, a.y}, 3);
    const Shape shape = elementwise(a.rows, lanes<T>, ahead);
    if (vectorized && a.rows.dims == 0 && a.rows.width % lanes<T> == 0 && shape.blocks < most_blocks) {
      return start(device, gated_flat<T>, shape, a);
    }
    start(device, gated<T>, shape, a, vectorized);
  });
}

void run(const GatedBwd& a, const Device& device) {
  of_narrow_dtype(a.dtype, [&](auto element) {
    typedef decltype(element) T;
    const bool vectorized = aligned(a.rows, sizeof(T), {a.gradient, a.gate, a.up, a.of_gate, a.of_up}, 5);
    start(device, gated_bwd<T>, elementwise(a.rows, lanes<T>, 1), a, vectorized);
  });
}

}  // namespace shardcomp::cuda
