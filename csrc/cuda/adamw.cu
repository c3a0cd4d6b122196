// A step of AdamW over many tensors: a few numbers for each tensor, then all elements, each read and written once.

#include "lists.h"

namespace shardcomp::cuda {
namespace {

DEVICE double number(const Number& x, double otherwise) {
  if (x.held == nullptr) return otherwise;
  switch (x.dtype) {
    case DType::bf16: return widen(*static_cast<const bf16*>(x.held));
    case DType::fp16: return widen(*static_cast<const fp16*>(x.held));
    case DType::fp32: return *static_cast<const float*>(x.held);
    default: return *static_cast<const double*>(x.held);
  }
}

// What stands before the numbers of the tensors.
constexpr int shared_numbers = 3;

__global__ void __launch_bounds__(AdamWNumbers::most) adamw_numbers(const __grid_constant__ AdamWNumbers a) {
  const int at = threadIdx.x;
  const double lr = number(a.lr, 0), scale = number(a.scale, 1), found_inf = number(a.found_inf, 0);
  if (at == 0 && a.first == 0) {
    a.made[0] = found_inf;
    a.made[1] = a.maximize ? -scale : scale;
    a.made[2] = 1 - lr * a.weight_decay;
  }
  if (at >= a.count || found_inf != 0) return;
  const float step = *a.steps[at] + 1;
  *a.steps[at] = step;
  double* made = a.made + shared_numbers + 2 * (a.first + at);
  made[0] = lr / (1 - pow(a.beta1, double(step)));
  made[1] = sqrt(1 - pow(a.beta2, double(step)));
}

template <class G, class W>
DEVICE void update(const AdamW& a, const AdamWShard& shard, const double* of_tensor, int64_t first, int64_t last) {
  constexpr int n = lanes<W>;
  const W scale = W(a.numbers[1]), decay = W(a.numbers[2]), size = W(of_tensor[0]), root = W(of_tensor[1]), eps = W(a.eps);
  const W of_square = W(1 - a.beta2), kept_square = W(a.beta2);
  // m + s (g - m), or g - (1 - s) (g - m) from a half on, as torch's lerp.
  const bool from_old = W(1 - a.beta1) < W(0.5);
  const W part = from_old ? W(1 - a.beta1) : W(1 - a.beta1) - W(1);
  const bool whole = aligned_to_16(shard.gradient) && aligned_to_16(shard.weight) && aligned_to_16(shard.exp_avg) &&
                     aligned_to_16(shard.exp_avg_sq) && aligned_to_16(shard.copy);
  for (int64_t at = first + threadIdx.x * n; at < last; at += int64_t(blockDim.x) * n) {
    W* const weight = static_cast<W*>(shard.weight) + at;
    W* const exp_avg = static_cast<W*>(shard.exp_avg) + at;
    W* const exp_avg_sq = static_cast<W*>(shard.exp_avg_sq) + at;
    W g[n], w[n], m[n], v[n];
    load(g, static_cast<const G*>(shard.gradient) + at, last - at, whole);
    load(w, weight, last - at, whole);
    load(m, exp_avg, last - at, whole);
    load(v, exp_avg_sq, last - at, whole);
#pragma unroll
    for (int j = 0; j < n; ++j) {
      g[j] *= scale;
      m[j] = fused(part, g[j] - m[j], from_old ? m[j] : g[j]);
      v[j] = fused(of_square * g[j], g[j], v[j] * kept_square);
      w[j] = w[j] * decay - m[j] / (square_root(v[j]) / root + eps) * size;
    }
    store(exp_avg, m, last - at, whole);
    store(exp_avg_sq, v, last - at, whole);
    store(weight, w, last - at, whole);
    if constexpr (sizeof(W) == 4) {
      if (shard.copy == nullptr) continue;
      if (DType(shard.copy_dtype) == DType::bf16) {
        store(static_cast<bf16*>(shard.copy) + at, w, last - at, whole);
      } else {
        store(static_cast<fp16*>(shard.copy) + at, w, last - at, whole);
      }
    }
  }
}

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
