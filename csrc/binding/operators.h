// The operators, as they are on every device. Their schemas, shapes and gradients are in shardcomp/kernels/*.py, whose references
// they follow, cast by cast.
//
// A `Device` has: a constructor that makes the device of a tensor the current one; run(arguments), which runs a kernel or starts
// it; block_rows(dtype, rows, sums), the rows of each block of a norm's backward; factor(vector, x, offset, round_first), offset + vector
// as the kernels take it beside `x`; table(cos or sin, x), the same for rotary; own_layer_norm and own_gelu, whether the values of
// these two are its kernels', else torch's own operators make them.
#pragma once

#include <utility>

#include "tensors.h"

namespace shardcomp {

using torch::stable::empty_like;
typedef std::vector<Tensor> Tensors;

// A vector or table, and how a kernel takes it.
struct Vector {
  Maybe held;
  bool narrow = false;
  double offset = 0;
  bool rounded = false;

  operator Factor() const { return {data(held), narrow, offset, rounded}; }
};

// offset + vector as a norm of `x` takes it, added up in its own dtype where it meets values that were rounded, else in at least
// float32.
inline Maybe offset_by(const Maybe& vector, const Tensor& x, double offset, bool round_first) {
  if (!vector || offset == 0) return widened(vector, x);
  const Tensor held = round_first ? *vector : as(*vector, wide_of(*vector));
  return widened(torch::stable::subtract(held, torch::stable::full({}, -offset, ScalarType::Double)), x);
}

struct Partials {
  int64_t blocks, width;
  Tensor held;

  Partials(const Tensor& x, int64_t blocks, int64_t width)
      : blocks(blocks), width(width), held(with_shape(x, {blocks, width}, wide_of(x))) {}

  void* data() const { return held.mutable_data_ptr(); }

  template <class Device>
  Tensor sum(const Tensor& weight, const Device& device) const {
    const bool direct = held.scalar_type() != ScalarType::Double && dtype_of(weight) != DType::fp64;
    Tensor made = with_shape(held, {width}, direct ? weight.scalar_type() : held.scalar_type());
    device.run(Summed{dtype_of(held), dtype_of(made), blocks, width, shardcomp::data(held), made.mutable_data_ptr()});
    return as(made, weight.scalar_type());
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
  Tensor g = as(gradient, x.scalar_type()), a = added ? as(*added, x.scalar_type()) : g, held = x;
  const Rows rows = norm_rows({&g, &a, &held});
  const int64_t block = device.block_rows(dtype_of(x), rows, 1), blocks = (rows.count + block - 1) / block;
  Tensor of_x = with_shape(x, sizes_of(x), x.scalar_type());
  const Vector factor = Device::factor(weight, x, offset, false);
  const Tensor factor_of_rows = torch::stable::contiguous(as(rstd, wide_of(x)));
  const Partials partials(x, weight ? blocks : 0, rows.width);
  device.run(RmsNormBwd{dtype_of(x), rows, block, data(g), added ? data(a) : nullptr, data(held), factor, data(factor_of_rows),
                        of_x.mutable_data_ptr(), weight ? partials.data() : nullptr});
  return {of_x, weight ? partials.sum(*weight, device) : with_shape(x, {0}, x.scalar_type())};
}

// The values as torch itself computes them.
inline Tensor torch_layer_norm(const Tensor& x, const Maybe& weight, const Maybe& bias, double eps) {
  std::array<StableIValue, 5> stack{
      torch::stable::detail::from(x), torch::stable::detail::from(std::vector<int64_t>{x.size(x.dim() - 1)}),
      torch::stable::detail::from(weight), torch::stable::detail::from(bias), torch::stable::detail::from(eps)};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher("aten::native_layer_norm", "", stack.data(), TORCH_ABI_VERSION));
  const Tensor made = torch::stable::contiguous(torch::stable::detail::to<Tensor>(stack[0]));
  torch::stable::detail::to<Tensor>(stack[1]);
  torch::stable::detail::to<Tensor>(stack[2]);
  return made;
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_norm(
    const Tensor& x, const Maybe& weight, const Maybe& bias, double eps, bool stepwise) {
  const Device device(x);
  check_norm(x, weight);
  check_norm(x, bias);
  Tensor held = x;
  const Rows rows = norm_rows({&held});
  Tensor mean = with_shape(x, moment_shape(x), wide_of(x)), rstd = empty_like(mean);
  const bool made_here = stepwise || Device::own_layer_norm;
  Tensor y = made_here ? with_shape(x, sizes_of(x), x.scalar_type()) : torch_layer_norm(x, weight, bias, eps);
  const Vector w = Device::factor(weight, x, 0, false), b = Device::factor(bias, x, 0, false);
  device.run(LayerNorm{dtype_of(x), rows, data(held), w, b, eps, stepwise, made_here ? y.mutable_data_ptr() : nullptr,
                       mean.mutable_data_ptr(), rstd.mutable_data_ptr()});
  return {y, mean, rstd};
}

template <class Device>
std::tuple<Tensor, Tensor, Tensor> layer_norm_bwd(
    const Tensor& gradient, const Tensor& x, const Maybe& weight, const Maybe& bias, const Tensor& mean, const Tensor& rstd) {
  const Device device(x);
  check_norm(x, weight);
  check_norm(x, bias);
  Tensor g = as(gradient, x.scalar_type()), held = x;
  const Rows rows = norm_rows({&g, &held});
  const int64_t block = device.block_rows(dtype_of(x), rows, 2), blocks = (rows.count + block - 1) / block;
  Tensor of_x = with_shape(x, sizes_of(x), x.scalar_type());
  const Vector w = Device::factor(weight, x, 0, false);
  const Tensor means = torch::stable::contiguous(as(mean, wide_of(x)));
  const Tensor factors = torch::stable::contiguous(as(rstd, wide_of(x)));
  const Partials of_weight(x, weight ? blocks : 0, rows.width), of_bias(x, bias ? blocks : 0, rows.width);
  device.run(LayerNormBwd{dtype_of(x), rows, block, data(g), data(held), w, data(means), data(factors), of_x.mutable_data_ptr(),
                          weight ? of_weight.data() : nullptr, bias ? of_bias.data() : nullptr});
  const auto none = [&] { return with_shape(x, {0}, x.scalar_type()); };
  return {of_x, weight ? of_weight.sum(*weight, device) : none(), bias ? of_bias.sum(*bias, device) : none()};
}

template <class Device>
Tensor turned(const Tensor& x, const Tensor& cos, const Tensor& sin, bool interleaved, bool round_each, bool back) {
  const Device device(x);
  const int64_t size = cos.dim() == 0 ? -1 : cos.size(cos.dim() - 1);
  STD_TORCH_CHECK(x.dim() > 0 && size >= 0 && size <= x.size(x.dim() - 1) && sin.dim() > 0 && sin.size(sin.dim() - 1) == size,
                  "rotary: the tables turn the first features, and have as many in cos as in sin");
  STD_TORCH_CHECK(!interleaved || size % 2 == 0, "rotary: pairs of neighbours need an even number of features");
  Tensor made = empty_like(x);
  if (dtype_of(x) != DType::fp64 && (dtype_of(cos) == DType::fp64 || dtype_of(sin) == DType::fp64)) {
    copy_into(made, turned<Device>(as(x, ScalarType::Double), cos, sin, interleaved, round_each, back));
    return made;
  }
  const Tensor held = with_rows(x);
  const Vector c = Device::table(cos, x), s = Device::table(sin, x);
  const bool direct = with_rows(made).const_data_ptr() == made.const_data_ptr();
  Tensor y = direct ? made : with_shape(x, sizes_of(x), x.scalar_type());
  const auto rows = rows_of({held, *c.held, *s.held, y}, true, false);
  STD_TORCH_CHECK(rows, "rotary: too many dimensions that do not lie one after the other");
  device.run(Rotary{dtype_of(x), *rows, size, interleaved, back, round_each && cos.scalar_type() == x.scalar_type(),
                    round_each && sin.scalar_type() == x.scalar_type(), data(held), c, s, y.mutable_data_ptr()});
  if (!direct) copy_into(made, y);
  return made;
}

template <class Device>
std::tuple<Tensor, Tensor> rotary(
    const Tensor& q, const Tensor& k, const Tensor& cos, const Tensor& sin, bool interleaved, bool round_each) {
  return {turned<Device>(q, cos, sin, interleaved, round_each, false), turned<Device>(k, cos, sin, interleaved, round_each, false)};
}

template <class Device>
std::tuple<Tensor, Tensor> rotary_bwd(
    const Tensor& of_q, const Tensor& of_k, const Tensor& cos, const Tensor& sin, bool interleaved) {
  return {turned<Device>(of_q, cos, sin, interleaved, false, true), turned<Device>(of_k, cos, sin, interleaved, false, true)};
}

inline Activation activation_of(const std::string& name) {
  if (name == "silu") return Activation::silu;
  if (name == "gelu") return Activation::gelu;
  STD_TORCH_CHECK(name == "gelu_tanh", "gated knows silu, gelu and gelu_tanh, not ", name);
  return Activation::gelu_tanh;
}

inline std::string approximation(Activation activation) { return activation == Activation::gelu_tanh ? "tanh" : "none"; }

// The activation as torch itself computes it: what float64 is for is comparison with it.
inline Tensor activated(const Tensor& x, Activation activation) {
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

template <class Device>
Tensor gated(const Tensor& gate, const Tensor& up, const std::string& name, bool round_first) {
  const Device device(gate);
  const Activation activation = activation_of(name);
  if (dtype_of(gate) == DType::fp64 || (activation == Activation::gelu && !Device::own_gelu) || gate.scalar_type() != up.scalar_type()) {
    const Tensor inner = round_first ? gate : as(gate, wide_of(gate)), other = round_first ? up : as(up, wide_of(up));
    Tensor made = empty_like(gate);
    copy_into(made, call("aten::mul", "Tensor", activated(inner, activation), other));
    return made;
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
  const auto made = pointwise({g, gate, up}, {gate, up}, [&](const Rows& rows, const std::vector<Tensor>& all) {
    device.run(GatedBwd{dtype_of(gate), activation, rows, data(all[0]), data(all[1]), data(all[2]), all[3].mutable_data_ptr(),
                        all[4].mutable_data_ptr()});
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

template <class Device>
Tensor cross_entropy_statistics(const Tensor& logits, const Tensor& labels, const Tensor& counted, int64_t first) {
  const Device device(logits);
  const Labels given(logits, labels, counted);
  Tensor held = logits, made = with_shape(logits, {3, logits.size(0)}, wide_of(logits));
  const Rows rows = norm_rows({&held});
  device.run(CrossEntropyStatistics{dtype_of(logits), rows, data(held), given.label(), given.count(), first,
                                    made.mutable_data_ptr()});
  return made;
}

// Into a tensor whose rows lie one element after the other; it may be the logits.
template <class Device>
void cross_entropy_gradient_into(Tensor& made, const Tensor& logits, const Tensor& labels, const Tensor& counted,
                                 const Tensor& normaliser, const Tensor& scale, int64_t first) {
  const Device device(logits);
  const Labels given(logits, labels, counted);
  Labels::check(normaliser, 2, logits);
  Labels::check(scale, 1, logits);
  STD_TORCH_CHECK(normaliser.size(0) == 2, "cross entropy: the normaliser is [2, t]");
  const Tensor held = with_rows(logits);
  const Tensor n = torch::stable::contiguous(as(normaliser, wide_of(logits)));
  const Tensor s = torch::stable::contiguous(as(scale, wide_of(logits)));
  const Rows rows = *rows_of({held, made}, false, false);
  device.run(CrossEntropyGradient{dtype_of(logits), rows, data(held), given.label(), given.count(), data(n), data(s), first,
                                  made.mutable_data_ptr()});
}

template <class Device>
Tensor cross_entropy_gradient(const Tensor& logits, const Tensor& labels, const Tensor& counted, const Tensor& normaliser,
                              const Tensor& scale, int64_t first) {
  Tensor made = with_shape(logits, sizes_of(logits), logits.scalar_type());
  cross_entropy_gradient_into<Device>(made, logits, labels, counted, normaliser, scale, first);
  return made;
}

template <class Device>
void cross_entropy_gradient_(const Tensor& logits, const Tensor& labels, const Tensor& counted, const Tensor& normaliser,
                             const Tensor& scale, int64_t first) {
  Tensor made = with_rows(logits);
  cross_entropy_gradient_into<Device>(made, made, labels, counted, normaliser, scale, first);
  Tensor held = logits;
  if (made.const_data_ptr() != held.const_data_ptr()) copy_into(held, made);
}

// Rows of tensors of one shape, contiguous copies of which take their place where they do not lie alike.
inline Rows shard_rows(Tensors& tensors) {
  if (const auto rows = rows_of(tensors, true, true)) return *rows;
  for (Tensor& each : tensors) each = torch::stable::contiguous(each);
  return *rows_of(tensors, true, true);
}

// Every operator but those on lists of tensors, which are each device's own.
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
