// One step of AdamW (Loshchilov and Hutter, https://arxiv.org/abs/1711.05101) over a list of tensors: one launch for the
// scalars of all tensors, then launches over all elements. The formula is in shardcomp/kernels/adamw.py.
//
// Memory traffic for an element with float32 weights: 16 bytes read (gradient, weight, two moments) and 12 written, and 2 more
// for a 16-bit copy of the weight; a 16-bit gradient saves 2. torch's foreach AdamW makes a dozen passes over the same memory.
//
// The scalars are computed on the device in float64: 1 - beta^t loses its digits in float32 for small t, and reading lr, scale
// or found_inf on the host would wait for the device. The elements are computed in the dtype of the weight, in torch's order.

#include "lists.h"

namespace shardcomp::cuda {
namespace {

DEVICE double number(const Number& x, double otherwise) {
  if (x.value == nullptr) return otherwise;
  switch (x.dtype) {
    case DType::bf16: return widen(*static_cast<const bf16*>(x.value));
    case DType::fp16: return widen(*static_cast<const fp16*>(x.value));
    case DType::fp32: return *static_cast<const float*>(x.value);
    default: return *static_cast<const double*>(x.value);
  }
}

// The numbers of the whole step, before those of the tensors: found_inf, the scale of gradients, the decay of weights.
constexpr int shared_numbers = 3;

__global__ void __launch_bounds__(AdamWNumbers::most) adamw_numbers(const __grid_constant__ AdamWNumbers a) {
  const int at = threadIdx.x;
  const double lr = number(a.lr, 0), scale = number(a.scale, 1), found_inf = number(a.found_inf, 0);
  if (at == 0 && a.first == 0) {
    a.numbers[0] = found_inf;
    a.numbers[1] = a.maximize ? -scale : scale;
    a.numbers[2] = 1 - lr * a.weight_decay;
  }
  // A step that overflowed is skipped as a whole: neither weights nor step counts change.
  if (at >= a.count || found_inf != 0) return;
  const float step = *a.steps[at] + 1;
  *a.steps[at] = step;
  double* of_tensor = a.numbers + shared_numbers + 2 * (a.first + at);
  of_tensor[0] = lr / (1 - pow(a.beta1, double(step)));
  of_tensor[1] = sqrt(1 - pow(a.beta2, double(step)));
}

template <class G, class W>
DEVICE void update(const AdamW& a, const AdamWShard& shard, const double* of_tensor, int64_t first, int64_t last) {
  constexpr int n = lanes<W>;
  const W scale = W(a.numbers[1]), decay = W(a.numbers[2]), size = W(of_tensor[0]), root = W(of_tensor[1]), eps = W(a.eps);
  const W of_square = W(1 - a.beta2), kept_square = W(a.beta2);
  // torch's lerp: m + s (g - m), or from s = 1/2 on g - (1 - s) (g - m), which is exact at s = 1. The bits follow that branch.
  const bool from_old = W(1 - a.beta1) < W(0.5);
  const W part = from_old ? W(1 - a.beta1) : W(1 - a.beta1) - W(1);
  const bool vectorized = aligned_to_16(shard.gradient) && aligned_to_16(shard.weight) && aligned_to_16(shard.exp_avg) &&
                     aligned_to_16(shard.exp_avg_sq) && aligned_to_16(shard.copy);
  for (int64_t at = first + threadIdx.x * n; at < last; at += int64_t(blockDim.x) * n) {
    W* const weight = static_cast<W*>(shard.weight) + at;
    W* const exp_avg = static_cast<W*>(shard.exp_avg) + at;
    W* const exp_avg_sq = static_cast<W*>(shard.exp_avg_sq) + at;
    W g[n], w[n], m[n], v[n];
    load(g, static_cast<const G*>(shard.gradient) + at, last - at, vectorized);
    load(w, weight, last - at, vectorized);
    load(m, exp_avg, last - at, vectorized);
    load(v, exp_avg_sq, last - at, vectorized);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      g[j] *= scale;
      m[j] = fused(part, g[j] - m[j], from_old ? m[j] : g[j]);
      v[j] = fused(of_square * g[j], g[j], v[j] * kept_square);
      w[j] = w[j] * decay - m[j] / (square_root(v[j]) / root + eps) * size;
    }
    store(exp_avg, m, last - at, vectorized);
    store(exp_avg_sq, v, last - at, vectorized);
    store(weight, w, last - at, vectorized);
    if constexpr (sizeof(W) == 4) {
      if (shard.copy == nullptr) continue;
      if (DType(shard.copy_dtype) == DType::bf16) {
        store(static_cast<bf16*>(shard.copy) + at, w, last - at, vectorized);
      } else {
        store(static_cast<fp16*>(shard.copy) + at, w, last - at, vectorized);
      }
    }
  }
}

// The dtype of the gradient is one of the tensor, so the whole block takes one branch. 256 threads with 4 elements of float32
// each go over a block's 32768 elements in 32 steps.
template <class W>
__global__ void __launch_bounds__(256) adamw(const __grid_constant__ AdamW a) {
  if (a.numbers[0] != 0) return;
  const AdamWShard& shard = a.shards[shard_of(a, blockIdx.x)];
  const double* of_tensor = a.numbers + shared_numbers + 2 * shard.place;
  const int64_t first = (blockIdx.x - shard.first_block) * list_block;
  const int64_t last = first + list_block < shard.size ? first + list_block : shard.size;
  if constexpr (sizeof(W) == 8) {
    update<double, double>(a, shard, of_tensor, first, last);
  } else {
    switch (DType(shard.gradient_dtype)) {
      case DType::bf16: return update<bf16, float>(a, shard, of_tensor, first, last);
      case DType::fp16: return update<fp16, float>(a, shard, of_tensor, first, last);
      default: return update<float, float>(a, shard, of_tensor, first, last);
    }
  }
}

}  // namespace

void run(const AdamWNumbers& a, const Device& device) {
  start(device, adamw_numbers, Shape{1, AdamWNumbers::most, 1, 0}, a);
}

void run(const AdamW& a, const Device& device) {
  const Shape shape{a.blocks, 256, 1, 0};
  if (a.dtype == DType::fp64) {
    start(device, adamw<double>, shape, a);
  } else {
    start(device, adamw<float>, shape, a);
  }
}

}  // namespace shardcomp::cuda
