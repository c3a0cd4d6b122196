// y = activation(gate) · up, the inner part of a gated MLP (Shazeer, https://arxiv.org/abs/2002.05202), and its backward.
// Arithmetic is in float with torch's exp, erf and tanh (functions.h), so that the bits are those of the unfused operators.
//
//   backward:  of_up = gradient · activation(gate);  of_gate = gradient · up · activation'(gate)
//
// Memory traffic for an element: 3 accesses forward, 5 backward, which computes the activation again instead of saving it.

#include "functions.h"

namespace shardcomp::cpu::SHARDCOMP_LEVEL {

constexpr float sqrt_half = 0.707106781186547524400844362104849039f;
constexpr float inner_scale = 0.797884560802865355879892119868763737f;  // √(2/π)
constexpr float cubic = 0.044715f;

INLINE Floats sigmoid(Floats x) { return 1.0f / (1.0f + exponential(-x)); }

// The activation; in the second form its derivative as well. The first has no gelu: torch's forward calls the erf of whatever
// vector library it was built with, so the binding calls torch for it.
template <Activation which>
INLINE Floats activated(Floats x) {
  if constexpr (which == Activation::silu) {
    return x / (1.0f + exponential(-x));
  } else {
    return 0.5f * x * (1.0f + hyperbolic_tangent(inner_scale * fma(splat(cubic), x * x * x, x)));
  }
}

template <Activation which>
INLINE Floats activated(Floats x, Floats& slope) {
  if constexpr (which == Activation::silu) {
    const Floats s = sigmoid(x);
    slope = s * (1.0f + x * (1.0f - s));
    return x * s;
  } else if constexpr (which == Activation::gelu) {
    const Floats below = 0.5f * (1.0f + error_function(x * sqrt_half));
    slope = below + x * (0.5f * inner_scale * exponential(-0.5f * x * x));
    return x * below;
  } else {
    const Floats t = hyperbolic_tangent(inner_scale * fma(splat(cubic), x * x * x, x));
    const Floats inner_slope = inner_scale * (1.0f + 3.0f * cubic * x * x);
    slope = 0.5f * (1.0f + t) + 0.5f * x * (1.0f - t * t) * inner_slope;
    return 0.5f * x * (1.0f + t);
  }
}

template <class F>
INLINE void of_activation(Activation activation, F body) {
  switch (activation) {
    case Activation::silu: return body(Constant<Activation, Activation::silu>{});
    case Activation::gelu: return body(Constant<Activation, Activation::gelu>{});
    case Activation::gelu_tanh: return body(Constant<Activation, Activation::gelu_tanh>{});
  }
}

template <class F>
INLINE void of_narrow_dtype(DType dtype, F body) {
  switch (dtype) {
    case DType::bf16: return body(bf16{});
    case DType::fp16: return body(fp16{});
    default: return body(float{});
  }
}

void gated(const Gated& a, int64_t begin, int64_t end) {
  of_narrow_dtype(a.dtype, [&](auto element) INLINED {
    typedef decltype(element) T;
    const auto run = [&](auto which) INLINED {
      row_segments(a.rows, begin, end, [&](const int64_t* offset, int64_t size) INLINED {
        const T* gate = static_cast<const T*>(a.gate) + offset[0];
        const T* up = static_cast<const T*>(a.up) + offset[1];
        T* y = static_cast<T*>(a.y) + offset[2];
        for_vectors<float>(size, [&](int64_t i, int n) INLINED {
          Floats value = activated<which.value>(load(gate + i, n));
          if (a.round_first) value = Round<T>::to(value);
          store(y + i, value * load(up + i, n), n);
        });
      });
    };
    if (a.activation == Activation::silu) {
      run(Constant<Activation, Activation::silu>{});
    } else {
      run(Constant<Activation, Activation::gelu_tanh>{});
    }
  });
}

void gated_bwd(const GatedBwd& a, int64_t begin, int64_t end) {
  of_narrow_dtype(a.dtype, [&](auto element) INLINED {
    typedef decltype(element) T;
    of_activation(a.activation, [&](auto which) INLINED {
      row_segments(a.rows, begin, end, [&](const int64_t* offset, int64_t size) INLINED {
        const T* gradient = static_cast<const T*>(a.gradient) + offset[0];
        const T* gate = static_cast<const T*>(a.gate) + offset[1];
        const T* up = static_cast<const T*>(a.up) + offset[2];
        T* of_gate = static_cast<T*>(a.of_gate) + offset[3];
        T* of_up = static_cast<T*>(a.of_up) + offset[4];
        for_vectors<float>(size, [&](int64_t i, int n) INLINED {
          Floats slope;
          const Floats g = load(gradient + i, n), value = activated<which.value>(load(gate + i, n), slope);
          store(of_up + i, g * value, n);
          store(of_gate + i, g * load(up + i, n) * slope, n);
        });
      });
    });
  });
}

}  // namespace shardcomp::cpu::SHARDCOMP_LEVEL
