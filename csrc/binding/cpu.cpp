// The CPU's implementations of shardcomp's operators. Their schemas, shapes and gradients are in shardcomp/kernels/*.py, whose
// references they follow, cast by cast.

#include <cmath>
#include <numeric>
#include <utility>

#include "levels.h"
#include "tensors.h"

namespace shardcomp {
namespace {

using torch::stable::empty_like;

// So many elements are worth a thread.
constexpr int64_t grain = 1 << 14;

template <class Kernel, class Arguments>
void parallel(Kernel kernel, const Arguments& arguments, int64_t count, int64_t each) {
  if (count == 0) return;
  const int64_t least = std::max<int64_t>(1, grain / std::max<int64_t>(1, each));
  torch::stable::parallel_for(0, count, least, [&](int64_t begin, int64_t end) { kernel(arguments, begin, end); });
}

// A norm's rows are cut into as many blocks whatever the number of threads, so that a weight's gradient has the same bits.
int64_t block_rows(int64_t rows) { return std::max<int64_t>(16, (rows + 63) / 64); }

struct Partials {
  int64_t blocks, width;
  Tensor held;

  Partials(const Tensor& x, int64_t blocks, int64_t width)
      : blocks(blocks), width(width), held(with_shape(x, {blocks, width}, wide_of(x))) {}

  Tensor sum(const Tensor& weight) const {
    const bool direct = held.scalar_type() != ScalarType::Double && dtype_of(weight) != DType::fp64;
    Tensor made = with_shape(held, {width}, direct ? weight.scalar_type() : held.scalar_type());
    const Summed arguments{dtype_of(held), dtype_of(made), blocks, width, data(held), made.mutable_data_ptr()};
    parallel(cpu::summed, arguments, width, blocks);
    return as(made, weight.scalar_type());
  }
};

std::vector<int64_t> moment_shape(const Tensor& x) {
  std::vector<int64_t> shape = sizes_of(x);
  shape.back() = 1;
  return shape;
}

void check_norm(const Tensor& x, const Maybe& vector) {
  STD_TORCH_CHECK(x.dim() > 0, "a norm is over the last dimension, and this tensor has none");
  STD_TORCH_CHECK(!vector || (vector->dim() == 1 && vector->size(0) == x.size(x.dim() - 1)),
                  "a norm's weight and bias have the size of the last dimension");
}

// offset + weight, added up in its own dtype where it meets values that were rounded, else in at least float32.
Maybe factor(const Maybe& weight, const Tensor& x, double offset, bool round_first) {
  if (!weight) return weight;
  if (offset == 0) return widened(weight, x);
  const Tensor held = round_first ? *weight : as(*weight, wide_of(*weight));
  return widened(torch::stable::subtract(held, torch::stable::full({}, -offset, ScalarType::Double)), x);
}

std::tuple<Tensor, Tensor, Tensor> normed(
    const Tensor& x, const Maybe& residual, const Maybe& weight, double eps, double offset, bool round_first) {
  check_norm(x, weight);
  Tensor a = x, b = residual ? *residual : x;
  const Rows rows = residual ? norm_rows({&a, &b}) : norm_rows({&a});
  Tensor y = with_shape(x, sizes_of(x), x.scalar_type());
  Tensor total = residual ? with_shape(x, sizes_of(x), x.scalar_type()) : y;
  Tensor rstd = with_shape(x, moment_shape(x), wide_of(x));
  const Maybe factors = factor(weight, x, offset, round_first);
  const RmsNorm arguments{dtype_of(x), rows, data(a), residual ? data(b) : nullptr, data(factors), eps, round_first,
                          y.mutable_data_ptr(), residual ? total.mutable_data_ptr() : nullptr, rstd.mutable_data_ptr()};
  parallel(cpu::rms_norm, arguments, rows.count, rows.width);
  return {y, total, rstd};
}

std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Maybe& weight, double eps, double offset, bool round_first) {
  auto [y, _, rstd] = normed(x, std::nullopt, weight, eps, offset, round_first);
  return {y, rstd};
}

std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Maybe& weight, double eps, double offset, bool round_first) {
  STD_TORCH_CHECK(sizes_of(x) == sizes_of(residual) && x.scalar_type() == residual.scalar_type(),
                  "add_rms_norm: x and residual are of one shape and dtype");
  return normed(x, residual, weight, eps, offset, round_first);
}

std::tuple<Tensor, Tensor> rms_norm_bwd(
    const Tensor& gradient, const Maybe& added, const Tensor& x, const Maybe& weight, const Tensor& rstd, double offset) {
  check_norm(x, weight);
  Tensor g = as(gradient, x.scalar_type()), a = added ? as(*added, x.scalar_type()) : g, held = x;
  const Rows rows = norm_rows({&g, &a, &held});
  const int64_t block = block_rows(rows.count), blocks = (rows.count + block - 1) / block;
  Tensor of_x = with_shape(x, sizes_of(x), x.scalar_type());
  const Maybe factors = factor(weight, x, offset, false);
  const Tensor factor_of_rows = torch::stable::contiguous(as(rstd, wide_of(x)));
  const Partials partials(x, weight ? blocks : 0, rows.width);
  const RmsNormBwd arguments{dtype_of(x), rows, block, data(g), added ? data(a) : nullptr, data(held), data(factors),
                             data(factor_of_rows), of_x.mutable_data_ptr(),
                             weight ? partials.held.mutable_data_ptr() : nullptr};
  parallel(cpu::rms_norm_bwd, arguments, blocks, block * rows.width);
  return {of_x, weight ? partials.sum(*weight) : with_shape(x, {0}, x.scalar_type())};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, bool stepwise) {
  check_norm(x, weight);
  check_norm(x, bias);
  Tensor held = x;
  const Rows rows = norm_rows({&held});
  Tensor mean = with_shape(x, moment_shape(x), wide_of(x)), rstd = empty_like(mean);
  // The values that are not stepwise have the bits of torch's own operator, so that makes them.
  Tensor y = stepwise ? with_shape(x, sizes_of(x), x.scalar_type()) : x;
  if (!stepwise) {
    std::array<StableIValue, 5> stack{
        torch::stable::detail::from(x), torch::stable::detail::from(std::vector<int64_t>{rows.width}),
        torch::stable::detail::from(weight), torch::stable::detail::from(bias), torch::stable::detail::from(eps)};
    STABLE_TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::native_layer_norm", "", stack.data(), TORCH_ABI_VERSION));
    y = torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
    torch::stable::detail::to<Tensor>(stack[1]);
    torch::stable::detail::to<Tensor>(stack[2]);
  }
  const Maybe w = widened(weight, x), b = widened(bias, x);
  const LayerNorm arguments{dtype_of(x), rows, data(held), data(w), data(b), eps,
                            stepwise ? y.mutable_data_ptr() : nullptr, mean.mutable_data_ptr(), rstd.mutable_data_ptr()};
  parallel(cpu::layer_norm, arguments, rows.count, rows.width);
  return {y, mean, rstd};
}

std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(
    const Tensor& gradient, const Tensor& x, const Maybe& weight, const Maybe& bias, const Tensor& mean, const Tensor& rstd) {
  check_norm(x, weight);
  check_norm(x, bias);
  Tensor g = as(gradient, x.scalar_type()), held = x;
  const Rows rows = norm_rows({&g, &held});
  const int64_t block = block_rows(rows.count), blocks = (rows.count + block - 1) / block;
  Tensor of_x = with_shape(x, sizes_of(x), x.scalar_type());
  const Maybe w = widened(weight, x);
  const Tensor means = torch::stable::contiguous(as(mean, wide_of(x)));
  const Tensor factors = torch::stable::contiguous(as(rstd, wide_of(x)));
  const Partials of_weight(x, weight ? blocks : 0, rows.width), of_bias(x, bias ? blocks : 0, rows.width);
  const LayerNormBwd arguments{dtype_of(x), rows, block, data(g), data(held), data(w), data(means), data(factors),
                               of_x.mutable_data_ptr(), weight ? of_weight.held.mutable_data_ptr() : nullptr,
                               bias ? of_bias.held.mutable_data_ptr() : nullptr};
  parallel(cpu::layer_norm_bwd, arguments, blocks, block * rows.width);
  const auto none = [&] { return with_shape(x, {0}, x.scalar_type()); };
  return {of_x, weight ? of_weight.sum(*weight) : none(), bias ? of_bias.sum(*bias) : none()};
}

Tensor turned(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool round_each, bool back) {
  const int64_t size = cos.dim() == 0 ? -1 : cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(x.dim() > 0 && size >= 0 && size <= x.size(x.dim() - 1) && sin.dim() > 0 && sin.size(sin.dim() - 1) == size,
                  "rotary: the tables turn the first features, and have as many in cos as in sin");
  STD_TORCH_CHECK(!interleaved || size % 2 == 0, "rotary: pairs of neighbours need an even number of features");
  Tensor made = empty_like(x);
  if (dtype_of(x) != DType::fp64 && (dtype_of(cos) == DType::fp64 || dtype_of(sin) == DType::fp64)) {
    copy_into(made, turned(as(x, ScalarType::Double), cos, sin, interleaved, round_each, back));
    return made;
  }
  const Tensor held = with_rows(x);
  const Tensor c = with_rows(as(cos, wide_of(x))), s = with_rows(as(sin, wide_of(x)));
  const bool direct = with_rows(made).const_data_ptr() == made.const_data_ptr();
  Tensor y = direct ? made : with_shape(x, sizes_of(x), x.scalar_type());
  std::optional<Rows> rows = rows_of({held, y, c, s}, false, false);
  STD_TORCH_CHECK(rows, "rotary: too many dimensions that do not lie one after the other");
  const Rotary arguments{dtype_of(x), *rows, size, interleaved, back, round_each && cos.scalar_type() == x.scalar_type(),
                         round_each && sin.scalar_type() == x.scalar_type(), data(held), data(c), data(s),
                         y.mutable_data_ptr()};
  parallel(cpu::rotary, arguments, rows->count, rows->width);
  if (!direct) copy_into(made, y);
  return made;
}

std::tuple<Tensor, Tensor> rotary(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved, bool round_each) {
  return {turned(q, cos, sin, interleaved, round_each, false), turned(k, cos, sin, interleaved, round_each, false)};
}

std::tuple<Tensor, Tensor> rotary_bwd(
    const Tensor& of_q, const Tensor& of_k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return {turned(of_q, cos, sin, interleaved, false, true), turned(of_k, cos, sin, interleaved, false, true)};
}

Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "gated knows silu, gelu and gelu_tanh, not ", name);
  return Activation::gelu_tanh;
}

std::string approximation(Activation activation) { return activation == Activation::gelu_tanh ? "tanh" : "none"; }

// The activation as torch itself computes it: what float64 is for is comparison with it, and its gelu has the bits of whatever
// library torch was built with.
Tensor activated(const Tensor& x, Activation activation) {
  if (activation == Activation::silu) return call("aten::silu", "", x);
  return call("aten::gelu", "", x, approximation(activation));
}

// Goes through some tensors of one shape and through results that have the strides of some of them. run(rows, tensors): all of
// them, the results last.
template <class Run>
std::vector<Tensor> pointwise(const std::vector<Tensor>& given, const std::vector<Tensor>& likes, const Run& run) {
  std::vector<Tensor> made, all = given;
  for (const Tensor& like : likes) {
    STD_TORCH_CHECK(sizes_of(like) == sizes_of(given[0]), "gated: gate, up and gradient are of one shape");
    made.push_back(empty_like(like));
  }
  all.insert(all.end(), made.begin(), made.end());
  if (const auto rows = rows_of(all, true, true)) {
    run(*rows, all);
    return made;
  }
  std::vector<Tensor> packed;
  for (const Tensor& each : given) packed.push_back(torch::stable::contiguous(each));
  for (const Tensor& like : likes) packed.push_back(with_shape(like, sizes_of(like), like.scalar_type()));
  run(*rows_of(packed, true, true), packed);
  for (size_t i = 0; i < made.size(); ++i) copy_into(made[i], packed[given.size() + i]);
  return made;
}

Tensor gated(const Tensor& gate, const Tensor& up, const std::string& name, bool round_first) {
  const Activation activation = activation_of(name);
  if (dtype_of(gate) == DType::fp64 || activation == Activation::gelu || gate.scalar_type() != up.scalar_type()) {
    const Tensor inner = round_first ? gate : as(gate, wide_of(gate)), other = round_first ? up : as(up, wide_of(up));
    Tensor made = empty_like(gate);
    copy_into(made, call("aten::mul", "Tensor", activated(inner, activation), other));
    return made;
  }
  return pointwise({gate, up}, {gate}, [&](const Rows& rows, const std::vector<Tensor>& all) {
    const Gated arguments{dtype_of(gate), activation, rows, round_first, data(all[0]), data(all[1]), all[2].mutable_data_ptr()};
    parallel(cpu::gated, arguments, rows.count * rows.width, 1);
  })[0];
}

std::tuple<Tensor, Tensor> gated_bwd(const Tensor& gradient, const Tensor& gate, const Tensor& up, const std::string& name) {
  const Activation activation = activation_of(name);
  if (dtype_of(gate) == DType::fp64 || gate.scalar_type() != up.scalar_type()) {
    const Tensor g = as(gradient, wide_of(gradient)), inner = as(gate, wide_of(gate));
    const Tensor outer = call("aten::mul", "Tensor", g, as(up, wide_of(up)));
    Tensor of_gate = empty_like(gate), of_up = empty_like(up);
    copy_into(of_gate, activation == Activation::silu
                           ? call("aten::silu_backward", "", outer, inner)
                           : call("aten::gelu_backward", "", outer, inner, approximation(activation)));
    copy_into(of_up, call("aten::mul", "Tensor", g, activated(inner, activation)));
    return {of_gate, of_up};
  }
  const Tensor g = as(gradient, gate.scalar_type());
  const auto made = pointwise({g, gate, up}, {gate, up}, [&](const Rows& rows, const std::vector<Tensor>& all) {
    const GatedBwd arguments{dtype_of(gate), activation, rows, data(all[0]), data(all[1]), data(all[2]),
                             all[3].mutable_data_ptr(), all[4].mutable_data_ptr()};
    parallel(cpu::gated_bwd, arguments, rows.count * rows.width, 1);
  });
  return {made[0], made[1]};
}

// What the operators of the cross entropy are given beside the logits, as the kernels take it.
struct Labels {
  Tensor labels, counted;

  Labels(const Tensor& logits, const Tensor& labels, const Tensor& counted)
      : labels(torch::stable::contiguous(labels)), counted(torch::stable::contiguous(counted)) {
    STD_TORCH_CHECK(logits.dim() == 2 && labels.scalar_type() == ScalarType::Long && counted.scalar_type() == ScalarType::Bool,
                    "cross entropy: the logits are [t, v], the labels int64, and what counts is bool");
    for (const Tensor& each : {labels, counted}) check(each, 1, logits);
  }
  static void check(const Tensor& x, int64_t dims, const Tensor& logits) {
    STD_TORCH_CHECK(x.dim() == dims && x.size(dims - 1) == logits.size(0), "cross entropy: every token has its own numbers");
  }
  const int64_t* label() const { return static_cast<const int64_t*>(data(labels)); }
  const bool* count() const { return static_cast<const bool*>(data(counted)); }
};

Tensor cross_entropy_statistics(const Tensor& logits, const Tensor& labels, const Tensor& counted, int64_t first) {
  const Labels given(logits, labels, counted);
  Tensor held = logits, made = with_shape(logits, {3, logits.size(0)}, wide_of(logits));
  const Rows rows = norm_rows({&held});
  const CrossEntropyStatistics arguments{dtype_of(logits), rows, data(held), given.label(), given.count(), first,
                                         made.mutable_data_ptr()};
  parallel(cpu::cross_entropy_statistics, arguments, rows.count, rows.width);
  return made;
}

// Into a tensor whose rows lie one element after the other; it may be the logits.
void cross_entropy_gradient_into(Tensor& made, const Tensor& logits, const Tensor& labels, const Tensor& counted,
                                 const Tensor& normaliser, const Tensor& scale, int64_t first) {
  const Labels given(logits, labels, counted);
  Labels::check(normaliser, 2, logits);
  Labels::check(scale, 1, logits);
  STD_TORCH_CHECK(normaliser.size(0) == 2, "cross entropy: the normaliser is [2, t]");
  const Tensor held = with_rows(logits);
  const Tensor n = torch::stable::contiguous(as(normaliser, wide_of(logits)));
  const Tensor s = torch::stable::contiguous(as(scale, wide_of(logits)));
  const Rows rows = *rows_of({held, made}, false, false);
  const CrossEntropyGradient arguments{dtype_of(logits), rows, data(held), given.label(), given.count(), data(n), data(s), first,
                                       made.mutable_data_ptr()};
  parallel(cpu::cross_entropy_gradient, arguments, rows.count, rows.width);
}

Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& labels, const Tensor& counted, const Tensor& normaliser,
                              const Tensor& scale, int64_t first) {
  Tensor made = with_shape(logits, sizes_of(logits), logits.scalar_type());
  cross_entropy_gradient_into(made, logits, labels, counted, normaliser, scale, first);
  return made;
}

void cross_entropy_gradient_(const Tensor& logits, const Tensor& labels, const Tensor& counted, const Tensor& normaliser,
                             const Tensor& scale, int64_t first) {
  Tensor made = with_rows(logits);
  cross_entropy_gradient_into(made, made, labels, counted, normaliser, scale, first);
  Tensor held = logits;
  if (made.const_data_ptr() != held.const_data_ptr()) copy_into(held, made);
}

typedef std::vector<Tensor> Tensors;

// So many elements of one tensor are a block of a kernel over many.
constexpr int64_t shard_block = 1 << 13;

// Put a shard's first block behind those before it, of which there are `blocks`.
template <class Shard>
void append(std::vector<Shard>& shards, Shard shard, int64_t& blocks) {
  shard.first_block = blocks;
  blocks += (shard.rows.width * shard.rows.count + shard_block - 1) / shard_block;
  shards.push_back(shard);
}

// Rows of tensors of one shape, contiguous copies of which take their place where they do not lie alike.
Rows shard_rows(Tensors& tensors) {
  if (const auto rows = rows_of(tensors, true, true)) return *rows;
  for (Tensor& each : tensors) each = torch::stable::contiguous(each);
  return *rows_of(tensors, true, true);
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
  Tensors kept;                                   // what the shards point to
  std::vector<std::pair<Tensor, Tensor>> packed;  // what is to be written to, and what that is then
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
    kept.insert(kept.end(), all.begin(), all.end());
  }
  const AdamW arguments{shard_block, int64_t(shards.size()), shards.data(), beta1, beta2, eps, 1 - rate * weight_decay,
                        maximize ? -factor : factor};
  parallel(cpu::adamw, arguments, blocks, shard_block);
  for (auto& [to, from] : packed) copy_into(to, from);
}

Tensor grad_norm(const Tensors& gradients) {
  Tensors kept;
  std::vector<SquaresShard> shards;
  int64_t blocks = 0;
  ScalarType dtype = ScalarType::Float;
  for (const Tensor& each : gradients) {
    Tensors held{each};
    SquaresShard shard{};
    shard.rows = shard_rows(held);
    shard.dtype = dtype_of(each);
    shard.x = data(held[0]);
    if (shard.dtype == DType::fp64) dtype = ScalarType::Double;
    append(shards, shard, blocks);
    kept.push_back(held[0]);
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
  library.impl("rms_norm", TORCH_BOX(&shardcomp::rms_norm));
  library.impl("rms_norm_bwd", TORCH_BOX(&shardcomp::rms_norm_bwd));
  library.impl("add_rms_norm", TORCH_BOX(&shardcomp::add_rms_norm));
  library.impl("layer_norm", TORCH_BOX(&shardcomp::layer_norm));
  library.impl("layer_norm_bwd", TORCH_BOX(&shardcomp::layer_norm_bwd));
  library.impl("rotary", TORCH_BOX(&shardcomp::rotary));
  library.impl("rotary_bwd", TORCH_BOX(&shardcomp::rotary_bwd));
  library.impl("gated", TORCH_BOX(&shardcomp::gated));
  library.impl("gated_bwd", TORCH_BOX(&shardcomp::gated_bwd));
  library.impl("cross_entropy_statistics", TORCH_BOX(&shardcomp::cross_entropy_statistics));
  library.impl("cross_entropy_gradient", TORCH_BOX(&shardcomp::cross_entropy_gradient));
  library.impl("cross_entropy_gradient_", TORCH_BOX(&shardcomp::cross_entropy_gradient_));
  library.impl("adamw_", TORCH_BOX(&shardcomp::adamw_));
  library.impl("grad_norm", TORCH_BOX(&shardcomp::grad_norm));
}
