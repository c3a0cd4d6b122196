// The operators, the same for every device: checks, layouts, results, and the launch of kernels. Schemas, shapes and gradients
// are in shardcomp/kernels/*.py, whose references these follow cast by cast.
//
// Inputs of any strides are accepted. Those that a kernel cannot read in place are copied first, and a result that must have
// strides of another kind is copied at the end, so that a layout never changes a value.
//
// A `Device` has: a constructor that makes the device of a tensor the current one; run(arguments), which runs or launches a
// kernel; block_rows(dtype, rows, sums), the rows of each block in a norm's backward; factor(vector, x, offset, round_first),
// offset + vector as its kernels take it beside `x`; table(cos or sin, x), the same for rotary; own_layer_norm and own_gelu,
// whether its kernels compute these two, else torch's own operators do.
#pragma once

#include <utility>

#include "tensors.h"

namespace shardcomp {

using torch::stable::empty_like;
typedef std::vector<Tensor> Tensors;

// A vector or table with the options of a Factor. It owns the tensor until the kernel is launched.
struct Vector {
  Maybe tensor;
  bool narrow = false;
  double offset = 0;
  bool rounded = false;

  operator Factor() const { return {data(tensor), narrow, offset, rounded}; }
};

// offset + vector as a norm of `x` takes it. With `round_first` the sum is in the vector's own dtype, as in a model whose
// values were rounded before; else in float32 or wider.
inline Maybe offset_by(const Maybe& vector, const Tensor& x, double offset, bool round_first) {
  if (!vector || offset == 0) return widened(vector, x);
  const Tensor values = round_first ? *vector : as(*vector, wide_of(*vector));
  return widened(torch::stable::subtract(values, torch::stable::full({}, -offset, ScalarType::Double)), x);
}

// Partial sums of a norm's backward, [blocks, width] in the wide dtype, and their sum in the dtype of the weight, rounded once.
struct Partials {
  int64_t blocks, width;
  Tensor sums;

  Partials(const Tensor& x, int64_t blocks, int64_t width)
      : blocks(blocks), width(width), sums(with_shape(x, {blocks, width}, wide_of(x))) {}

  void* data() const { return sums.mutable_data_ptr(); }

  template <class Device>
  Tensor sum(const Tensor& weight, const Device& device) const {
    const bool direct = sums.scalar_type() != ScalarType::Double && dtype_of(weight) != DType::fp64;
    Tensor total = with_shape(sums, {width}, direct ? weight.scalar_type() : sums.scalar_type());
    device.run(Summed{dtype_of(sums), dtype_of(total), blocks, width, shardcomp::data(sums), total.mutable_data_ptr()});
    return as(total, weight.scalar_type());
  }
};

inline std::vector<int64_t> moment_shape(const Tensor& x) {
  std::vector<int64_t> shape = sizes_of(x);
  shape.back() = 1;
  return shape;
}

inline void check_norm(const Tensor& x, const Maybe& vector) {
  STD_TORCH_CHECK(x.dim() > 0, "a norm is over the last dimension, and this tensor has none");
  STD_TORCH_CHECK(!vector || (vector->dim() == 1 && vector->size(0) == x.size(x.dim() - 1)),
                  "a norm's weight and bias have the size of the last dimension");
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> normed(
    const Tensor& x, const Maybe& residual, const Maybe& weight, double eps, double offset, bool round_first) {
  const Device device(x);
  check_norm(x, weight);
  Tensor a = x, b = residual ? *residual : x;
  const Rows rows = residual ? norm_rows({&a, &b}) : norm_rows({&a});
  Tensor y = with_shape(x, sizes_of(x), x.scalar_type());
  Tensor total = residual ? with_shape(x, sizes_of(x), x.scalar_type()) : y;
  Tensor rstd = with_shape(x, moment_shape(x), wide_of(x));
  const Vector factor = Device::factor(weight, x, offset, round_first);
  device.run(RmsNorm{dtype_of(x), rows, data(a), residual ? data(b) : nullptr, factor, eps, round_first, y.mutable_data_ptr(),
                     residual ? total.mutable_data_ptr() : nullptr, rstd.mutable_data_ptr()});
  return {y, total, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor> rms_norm(const Tensor& x, const Maybe& weight, double eps, double offset, bool round_first) {
  auto [y, _, rstd] = normed<Device>(x, std::nullopt, weight, eps, offset, round_first);
  return {y, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> add_rms_norm(
    const Tensor& x, const Tensor& residual, const Maybe& weight, double eps, double offset, bool round_first) {
  STD_TORCH_CHECK(sizes_of(x) == sizes_of(residual) && x.scalar_type() == residual.scalar_type(),
                  "add_rms_norm: x and residual are of one shape and dtype");
  return normed<Device>(x, residual, weight, eps, offset, round_first);
}

template <class Device>
std::tuple<Tensor, Tensor> rms_norm_bwd(
    const Tensor& gradient, const Maybe& added, const Tensor& x, const Maybe& weight, const Tensor& rstd, double offset) {
  const Device device(x);
  check_norm(x, weight);
  Tensor g = as(gradient, x.scalar_type()), a = added ? as(*added, x.scalar_type()) : g, rowed = x;
  const Rows rows = norm_rows({&g, &a, &rowed});
  const int64_t block = device.block_rows(dtype_of(x), rows, 1), blocks = (rows.count + block - 1) / block;
  Tensor of_x = with_shape(x, sizes_of(x), x.scalar_type());
  const Vector factor = Device::factor(weight, x, offset, false);
  const Tensor factor_of_rows = torch::stable::contiguous(as(rstd, wide_of(x)));
  const Partials partials(x, weight ? blocks : 0, rows.width);
  device.run(RmsNormBwd{dtype_of(x), rows, block, data(g), added ? data(a) : nullptr, data(rowed), factor, data(factor_of_rows),
                        of_x.mutable_data_ptr(), weight ? partials.data() : nullptr});
  return {of_x, weight ? partials.sum(*weight, device) : with_shape(x, {0}, x.scalar_type())};
}

// The values of torch's own operator, whose bits depend on the vector library that it was built with.
inline Tensor torch_layer_norm(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps) {
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(std::vector<int64_t>{x.size(x.dim() - 1)}),
      torch::stable::detail::from(weight), torch::stable::detail::from(bias), torch::stable::detail::from(eps)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::native_layer_norm", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor y = torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
  torch::stable::detail::to<Tensor>(stack[1]);
  torch::stable::detail::to<Tensor>(stack[2]);
  return y;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, bool stepwise) {
  const Device device(x);
  check_norm(x, weight);
  check_norm(x, bias);
  Tensor rowed = x;
  const Rows rows = norm_rows({&rowed});
  Tensor mean = with_shape(x, moment_shape(x), wide_of(x)), rstd = empty_like(mean);
  const bool has_kernel = stepwise || Device::own_layer_norm;
  Tensor y = has_kernel ? with_shape(x, sizes_of(x), x.scalar_type()) : torch_layer_norm(x, weight, bias, eps);
  const Vector w = Device::factor(weight, x, 0, false), b = Device::factor(bias, x, 0, false);
  device.run(LayerNorm{dtype_of(x), rows, data(rowed), w, b, eps, stepwise, has_kernel ? y.mutable_data_ptr() : nullptr,
                       mean.mutable_data_ptr(), rstd.mutable_data_ptr()});
  return {y, mean, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(
    const Tensor& gradient, const Tensor& x, const Maybe& weight, const Maybe& bias, const Tensor& mean, const Tensor& rstd) {
  const Device device(x);
  check_norm(x, weight);
  check_norm(x, bias);
  Tensor g = as(gradient, x.scalar_type()), rowed = x;
  const Rows rows = norm_rows({&g, &rowed});
  const int64_t block = device.block_rows(dtype_of(x), rows, 2), blocks = (rows.count + block - 1) / block;
  Tensor of_x = with_shape(x, sizes_of(x), x.scalar_type());
  const Vector w = Device::factor(weight, x, 0, false);
  const Tensor means = torch::stable::contiguous(as(mean, wide_of(x)));
  const Tensor factors = torch::stable::contiguous(as(rstd, wide_of(x)));
  const Partials of_weight(x, weight ? blocks : 0, rows.width), of_bias(x, bias ? blocks : 0, rows.width);
  device.run(LayerNormBwd{dtype_of(x), rows, block, data(g), data(rowed), w, data(means), data(factors), of_x.mutable_data_ptr(),
                          weight ? of_weight.data() : nullptr, bias ? of_bias.data() : nullptr});
  const auto none = [&] { return with_shape(x, {0}, x.scalar_type()); };
  return {of_x, weight ? of_weight.sum(*weight, device) : none(), bias ? of_bias.sum(*bias, device) : none()};
}

template <class Device>
Tensor rotate(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool round_each, bool backward) {
  const Device device(x);
  const int64_t size = cos.dim() == 0 ? -1 : cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(x.dim() > 0 && size >= 0 && size <= x.size(x.dim() - 1) && sin.dim() > 0 && sin.size(sin.dim() - 1) == size,
                  "rotary: the tables turn the first features, and have as many in cos as in sin");
  STD_TORCH_CHECK(!interleaved || size % 2 == 0, "rotary: pairs of neighbours need an even number of features");
  Tensor result = empty_like(x);
  if (dtype_of(x) != DType::fp64 && (dtype_of(cos) == DType::fp64 || dtype_of(sin) == DType::fp64)) {
    copy_into(result, rotate<Device>(as(x, ScalarType::Double), cos, sin, interleaved, round_each, backward));
    return result;
  }
  const Tensor rowed = with_rows(x);
  const Vector c = Device::table(cos, x), s = Device::table(sin, x);
  const bool direct = with_rows(result).const_data_ptr() == result.const_data_ptr();
  Tensor y = direct ? result : with_shape(x, sizes_of(x), x.scalar_type());
  const auto rows = rows_of({rowed, *c.tensor, *s.tensor, y}, true, false);
  STD_TORCH_CHECK(rows, "rotary: too many dimensions that do not lie one after the other");
  device.run(Rotary{dtype_of(x), *rows, size, interleaved, backward, round_each && cos.scalar_type() == x.scalar_type(),
                    round_each && sin.scalar_type() == x.scalar_type(), data(rowed), c, s, y.mutable_data_ptr()});
  if (!direct) copy_into(result, y);
  return result;
}

template <class Device>
std::tuple<Tensor, Tensor> rotary(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved, bool round_each) {
  return {rotate<Device>(q, cos, sin, interleaved, round_each, false),
          rotate<Device>(k, cos, sin, interleaved, round_each, false)};
}

template <class Device>
std::tuple<Tensor, Tensor> rotary_bwd(
    const Tensor& of_q, const Tensor& of_k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return {rotate<Device>(of_q, cos, sin, interleaved, false, true), rotate<Device>(of_k, cos, sin, interleaved, false, true)};
}

inline Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "gated knows silu, gelu and gelu_tanh, not ", name);
  return Activation::gelu_tanh;
}

inline std::string approximation(Activation activation) { return activation == Activation::gelu_tanh ? "tanh" : "none"; }

// The activation by torch's own operator. float64 is there for comparison, not for speed, so it has no kernel.
inline Tensor activated(const Tensor& x, Activation activation) {
  if (activation == Activation::silu) return call("aten::silu", "", x);
  return call("aten::gelu", "", x, approximation(activation));
}

// Runs an elementwise kernel over `inputs` of one shape and allocates its results, each with the strides of one of `likes`.
// run(rows, tensors): inputs, then results. Dimensions that cannot be one walk over memory take the detour of contiguous
// copies.
template <class Run>
std::vector<Tensor> pointwise(const std::vector<Tensor>& inputs, const std::vector<Tensor>& likes, const Run& run) {
  std::vector<Tensor> results, all = inputs;
  for (const Tensor& like : likes) {
    STD_TORCH_CHECK(sizes_of(like) == sizes_of(inputs[0]), "gated: gate, up and gradient are of one shape");
    results.push_back(empty_like(like));
  }
  all.insert(all.end(), results.begin(), results.end());
  if (const auto rows = rows_of(all, true, true)) {
    run(*rows, all);
    return results;
  }
  std::vector<Tensor> packed;
  for (const Tensor& input : inputs) packed.push_back(torch::stable::contiguous(input));
  for (const Tensor& like : likes) packed.push_back(with_shape(like, sizes_of(like), like.scalar_type()));
  run(*rows_of(packed, true, true), packed);
  for (size_t i = 0; i < results.size(); ++i) copy_into(results[i], packed[inputs.size() + i]);
  return results;
}

template <class Device>
Tensor gated(const Tensor& gate, const Tensor& up, const std::string& name, bool round_first) {
  const Device device(gate);
  const Activation activation = activation_of(name);
  const bool has_kernel = dtype_of(gate) != DType::fp64 && (activation != Activation::gelu || Device::own_gelu);
  if (!has_kernel || gate.scalar_type() != up.scalar_type()) {
    const Tensor inner = round_first ? gate : as(gate, wide_of(gate)), other = round_first ? up : as(up, wide_of(up));
    Tensor y = empty_like(gate);
    copy_into(y, call("aten::mul", "Tensor", activated(inner, activation), other));
    return y;
  }
  return pointwise({gate, up}, {gate}, [&](const Rows& rows, const std::vector<Tensor>& all) {
    device.run(Gated{dtype_of(gate), activation, rows, round_first, data(all[0]), data(all[1]), all[2].mutable_data_ptr()});
  })[0];
}

template <class Device>
std::tuple<Tensor, Tensor> gated_bwd(const Tensor& gradient, const Tensor& gate, const Tensor& up, const std::string& name) {
  const Device device(gate);
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
  const auto gradients = pointwise({g, gate, up}, {gate, up}, [&](const Rows& rows, const std::vector<Tensor>& all) {
    device.run(GatedBwd{dtype_of(gate), activation, rows, data(all[0]), data(all[1]), data(all[2]), all[3].mutable_data_ptr(),
                        all[4].mutable_data_ptr()});
  });
  return {gradients[0], gradients[1]};
}

// The labels of a cross entropy and which of them count, checked and contiguous.
struct Labels {
  Tensor labels, counted;

  Labels(const Tensor& logits, const Tensor& labels, const Tensor& counted)
      : labels(torch::stable::contiguous(labels)), counted(torch::stable::contiguous(counted)) {
    STD_TORCH_CHECK(logits.dim() == 2 && labels.scalar_type() == ScalarType::Long && counted.scalar_type() == ScalarType::Bool,
                    "cross entropy: the logits are [t, v], the labels int64, and what counts is bool");
    for (const Tensor& tensor : {labels, counted}) check(tensor, 1, logits);
  }
  static void check(const Tensor& x, int64_t dims, const Tensor& logits) {
    STD_TORCH_CHECK(x.dim() == dims && x.size(dims - 1) == logits.size(0), "cross entropy: every token has its own numbers");
  }
  const int64_t* label() const { return static_cast<const int64_t*>(data(labels)); }
  const bool* count() const { return static_cast<const bool*>(data(counted)); }
};

template <class Device>
Tensor cross_entropy_statistics(const Tensor& logits, const Tensor& labels, const Tensor& counted, int64_t first) {
  const Device device(logits);
  const Labels tokens(logits, labels, counted);
  Tensor rowed = logits, statistics = with_shape(logits, {3, logits.size(0)}, wide_of(logits));
  const Rows rows = norm_rows({&rowed});
  device.run(CrossEntropyStatistics{dtype_of(logits), rows, data(rowed), tokens.label(), tokens.count(), first,
                                    statistics.mutable_data_ptr()});
  return statistics;
}

// Writes the gradient into a tensor whose rows are adjacent elements. It may be the logits: that saves the largest tensor of a
// step.
template <class Device>
void cross_entropy_gradient_into(Tensor& gradient, const Tensor& logits, const Tensor& labels, const Tensor& counted,
                                 const Tensor& normaliser, const Tensor& scale, int64_t first) {
  const Device device(logits);
  const Labels tokens(logits, labels, counted);
  Labels::check(normaliser, 2, logits);
  Labels::check(scale, 1, logits);
  STD_TORCH_CHECK(normaliser.size(0) == 2, "cross entropy: the normaliser is [2, t]");
  const Tensor rowed = with_rows(logits);
  const Tensor n = torch::stable::contiguous(as(normaliser, wide_of(logits)));
  const Tensor s = torch::stable::contiguous(as(scale, wide_of(logits)));
  const Rows rows = *rows_of({rowed, gradient}, false, false);
  device.run(CrossEntropyGradient{dtype_of(logits), rows, data(rowed), tokens.label(), tokens.count(), data(n), data(s), first,
                                  gradient.mutable_data_ptr()});
}

template <class Device>
Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& labels, const Tensor& counted, const Tensor& normaliser,
                              const Tensor& scale, int64_t first) {
  Tensor gradient = with_shape(logits, sizes_of(logits), logits.scalar_type());
  cross_entropy_gradient_into<Device>(gradient, logits, labels, counted, normaliser, scale, first);
  return gradient;
}

template <class Device>
void cross_entropy_gradient_(const Tensor& logits, const Tensor& labels, const Tensor& counted, const Tensor& normaliser,
                             const Tensor& scale, int64_t first) {
  Tensor gradient = with_rows(logits);
  cross_entropy_gradient_into<Device>(gradient, gradient, labels, counted, normaliser, scale, first);
  Tensor target = logits;
  if (gradient.const_data_ptr() != target.const_data_ptr()) copy_into(target, gradient);
}

// The rows of tensors of one shape. If their memory is not in one order, contiguous copies take their place.
inline Rows shard_rows(Tensors& tensors) {
  if (const auto rows = rows_of(tensors, true, true)) return *rows;
  for (Tensor& tensor : tensors) tensor = torch::stable::contiguous(tensor);
  return *rows_of(tensors, true, true);
}

// Registers every operator except those on lists of tensors, which differ by device.
template <class Device, class Library>
void implement(Library& library) {
  library.impl("rms_norm", TORCH_BOX(&rms_norm<Device>));
  library.impl("rms_norm_bwd", TORCH_BOX(&rms_norm_bwd<Device>));
  library.impl("add_rms_norm", TORCH_BOX(&add_rms_norm<Device>));
  library.impl("layer_norm", TORCH_BOX(&layer_norm<Device>));
  library.impl("layer_norm_bwd", TORCH_BOX(&layer_norm_bwd<Device>));
  library.impl("rotary", TORCH_BOX(&rotary<Device>));
  library.impl("rotary_bwd", TORCH_BOX(&rotary_bwd<Device>));
  library.impl("gated", TORCH_BOX(&gated<Device>));
  library.impl("gated_bwd", TORCH_BOX(&gated_bwd<Device>));
  library.impl("cross_entropy_statistics", TORCH_BOX(&cross_entropy_statistics<Device>));
  library.impl("cross_entropy_gradient", TORCH_BOX(&cross_entropy_gradient<Device>));
  library.impl("cross_entropy_gradient_", TORCH_BOX(&cross_entropy_gradient_<Device>));
}

}  // namespace shardcomp
