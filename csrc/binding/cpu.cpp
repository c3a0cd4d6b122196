// The CPU's implementations of shardcomp's operators: the split over threads, and the operators on lists of tensors.

#include <cmath>
#include <numeric>

#include "levels.h"
#include "operators.h"

namespace shardcomp {
namespace {

// The elements that are worth a thread: fewer take less time than waking it up.
constexpr int64_t grain = 1 << 14;

// Runs a kernel over `count` items of `item_size` elements each on torch's threads.
template <class Kernel, class Arguments>
void parallel(Kernel kernel, const Arguments& arguments, int64_t count, int64_t item_size) {
  if (count == 0) return;
  const int64_t least = std::max<int64_t>(1, grain / std::max<int64_t>(1, item_size));
  torch::stable::parallel_for(0, count, least, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

struct Cpu {
  // The bits of torch's layer norm and gelu depend on the vector library that it was built with, so torch computes them here.
  static constexpr bool own_layer_norm = false, own_gelu = false;

  explicit Cpu(const Tensor&) {}

  // At most 64 blocks, whatever the number of threads: then the weight's gradient has the same bits on every machine. At least
  // 16 rows for each, since a block writes h sums.
  static int64_t block_rows(DType, const Rows& rows, int) { return std::max<int64_t>(16, (rows.count + 63) / 64); }

  static Vector factor(const Maybe& vector, const Tensor& x, double offset, bool round_first) {
    return {offset_by(vector, x, offset, round_first)};
  }
  static Vector table(const Tensor& table, const Tensor& x) { return {with_rows(as(table, wide_of(x)))}; }

  static void run(const RmsNorm& a) { parallel(cpu::rms_norm, a, a.rows.count, a.rows.width); }
  static void run(const RmsNormBwd& a) { parallel(cpu::rms_norm_bwd, a, blocks(a), a.block_rows * a.rows.width); }
  static void run(const LayerNorm& a) { parallel(cpu::layer_norm, a, a.rows.count, a.rows.width); }
  static void run(const LayerNormBwd& a) { parallel(cpu::layer_norm_bwd, a, blocks(a), a.block_rows * a.rows.width); }
  static void run(const Summed& a) { parallel(cpu::summed, a, a.width, a.blocks); }
  static void run(const Rotary& a) { parallel(cpu::rotary, a, a.rows.count, a.rows.width); }
  static void run(const Gated& a) { parallel(cpu::gated, a, a.rows.count * a.rows.width, 1); }
  static void run(const GatedBwd& a) { parallel(cpu::gated_bwd, a, a.rows.count * a.rows.width, 1); }
  static void run(const CrossEntropyStatistics& a) { parallel(cpu::cross_entropy_statistics, a, a.rows.count, a.rows.width); }
  static void run(const CrossEntropyGradient& a) { parallel(cpu::cross_entropy_gradient, a, a.rows.count, a.rows.width); }

 private:
  template <class Arguments>
  static int64_t blocks(const Arguments& a) {
    return (a.rows.count + a.block_rows - 1) / a.block_rows;
  }
};

// The elements of a block in a kernel over a list of tensors.
constexpr int64_t shard_block = 1 << 13;

// Appends a shard and numbers its blocks after the `blocks` before it.
template <class Shard>
void append(std::vector<Shard>& shards, Shard shard, int64_t& blocks) {
  shard.first_block = blocks;
  blocks += (shard.rows.width * shard.rows.count + shard_block - 1) / shard_block;
  shards.push_back(shard);
}

double number(const Tensor& x) {
  STD_TORCH_CHECK(x.numel() == 1, "adamw_: lr, scale and found_inf have one element");
  return *static_cast<const double*>(data(as(x, ScalarType::Double)));
}

void adamw_(const Tensors& weights, const Tensors& copies, const Tensors& gradients, const Tensors& exp_avgs,
            const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps,
            double weight_decay, bool maximize, const Maybe& scale, const Maybe& found_inf) {
  if (found_inf && number(*found_inf) != 0) return;
  const double rate = number(lr), factor = scale ? number(*scale) : 1;
  Tensors alive;                                  // tensors that shards point into
  std::vector<std::pair<Tensor, Tensor>> packed;  // a tensor and the dense copy of it that the kernel updates
  std::vector<AdamWShard> shards;
  int64_t blocks = 0;
  for (size_t i = 0; i < weights.size(); ++i) {
    const bool wide = dtype_of(weights[i]) == DType::fp64, copied = !copies.empty() && !wide;
    Tensors all{as(gradients[i], wide ? ScalarType::Double : gradients[i].scalar_type()), weights[i], exp_avgs[i], exp_avg_sqs[i]};
    if (!wide && dtype_of(all[0]) == DType::fp64) all[0] = as(all[0], ScalarType::Float);
    if (copied) all.push_back(copies[i]);
    const Tensors before = all;
    AdamWShard shard{};
    shard.rows = shard_rows(all);
    for (size_t t = 1; t < all.size(); ++t) {
      if (data(all[t]) != data(before[t])) packed.emplace_back(before[t], all[t]);
    }
    if (wide && !copies.empty()) packed.emplace_back(copies[i], all[1]);
    float& step = *static_cast<float*>(Tensor(steps[i]).mutable_data_ptr());
    step += 1;
    shard.gradient_dtype = dtype_of(all[0]);
    shard.gradient = data(all[0]);
    shard.weight = all[1].mutable_data_ptr();
    shard.exp_avg = all[2].mutable_data_ptr();
    shard.exp_avg_sq = all[3].mutable_data_ptr();
    shard.copy = copied ? all[4].mutable_data_ptr() : nullptr;
    shard.copy_dtype = copied ? dtype_of(all[4]) : DType::bf16;
    shard.size = rate / (1 - std::pow(beta1, double(step)));
    shard.root = std::sqrt(1 - std::pow(beta2, double(step)));
    append(shards, shard, blocks);
    alive.insert(alive.end(), all.begin(), all.end());
  }
  const AdamW arguments{shard_block, int64_t(shards.size()), shards.data(), beta1, beta2, eps, 1 - rate * weight_decay,
                        maximize ? -factor : factor};
  parallel(cpu::adamw, arguments, blocks, shard_block);
  for (auto& [to, from] : packed) copy_into(to, from);
}

Tensor grad_norm(const Tensors& gradients) {
  Tensors alive;
  std::vector<SquaresShard> shards;
  int64_t blocks = 0;
  ScalarType dtype = ScalarType::Float;
  for (const Tensor& gradient : gradients) {
    Tensors dense{gradient};
    SquaresShard shard{};
    shard.rows = shard_rows(dense);
    shard.dtype = dtype_of(gradient);
    shard.x = data(dense[0]);
    if (shard.dtype == DType::fp64) dtype = ScalarType::Double;
    append(shards, shard, blocks);
    alive.push_back(dense[0]);
  }
  std::vector<double> partial(blocks);
  const Squares arguments{shard_block, int64_t(shards.size()), shards.data(), partial.data()};
  parallel(cpu::squares, arguments, blocks, shard_block);
  const double sum = double(std::accumulate(partial.begin(), partial.end(), 0.0L));
  return torch::stable::full({}, dtype == ScalarType::Float ? double(float(sum)) : sum, dtype);
}

}  // namespace
}  // namespace shardcomp

STABLE_TORCH_LIBRARY_IMPL(shardcomp, CPU, library) {
  shardcomp::implement<shardcomp::Cpu>(library);
  library.impl("adamw_", TORCH_BOX(&shardcomp::adamw_));
  library.impl("grad_norm", TORCH_BOX(&shardcomp::grad_norm));
}
