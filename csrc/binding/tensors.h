// From torch's tensors to what the kernels take: dtypes, rows and strides. For every device.
#pragma once

#include <torch/csrc/stable/library.h>
#include <torch/csrc/stable/ops.h>
#include <torch/csrc/stable/tensor.h>
#include <torch/headeronly/core/ScalarType.h>

#include <algorithm>
#include <array>
#include <optional>
#include <string>
#include <tuple>
#include <vector>

#include "../core/arguments.h"

namespace shardcomp {

using torch::headeronly::ScalarType;
using torch::stable::Tensor;
typedef std::optional<Tensor> Maybe;

inline DType dtype_of(const Tensor& x) {
  switch (x.scalar_type()) {
    case ScalarType::BFloat16: return DType::bf16;
    case ScalarType::Half: return DType::fp16;
    case ScalarType::Float: return DType::fp32;
    case ScalarType::Double: return DType::fp64;
    default: STD_TORCH_CHECK(false, "shardcomp's operators take bfloat16, float16, float32 and float64, not ",
                             torch::headeronly::toString(x.scalar_type()));
  }
}

// The dtype that operators compute in.
inline ScalarType wide_of(const Tensor& x) { return dtype_of(x) == DType::fp64 ? ScalarType::Double : ScalarType::Float; }

inline Tensor as(const Tensor& x, ScalarType dtype) { return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype); }

inline std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline const void* data(const Tensor& x) { return x.const_data_ptr(); }
inline const void* data(const Maybe& x) { return x ? x->const_data_ptr() : nullptr; }

inline Tensor with_shape(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// A tensor whose last dimension lies one element after the other, for kernels that go through rows.
inline Tensor with_rows(const Tensor& x) {
  return x.dim() == 0 || x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

// A vector of a norm, in the dtype that the norm of `x` is computed in.
inline Maybe widened(const Maybe& vector, const Tensor& x) {
  if (!vector) return vector;
  return torch::stable::contiguous(as(*vector, wide_of(x)));
}

// The rows of some tensors, each of the first one's sizes or broadcast to them but for the last dimension, in the order in which
// the last tensor lies in memory; with `whole`, dimensions that lie one after the other in all of them become one, the last
// included. Empty where the tensors have more dimensions left than a kernel takes.
inline std::optional<Rows> rows_of(const std::vector<Tensor>& tensors, bool ordered, bool whole) {
  const std::vector<int64_t> sizes = sizes_of(tensors[0]);
  const int dims = int(sizes.size()), count = int(tensors.size());
  struct Dim {
    int64_t size;
    std::array<int64_t, most_tensors> strides;
  };
  std::vector<Dim> all;
  for (int d = 0; d < dims; ++d) {
    Dim dim{sizes[d], {}};
    for (int t = 0; t < count; ++t) {
      const int at = d - dims + int(tensors[t].dim());
      dim.strides[t] = at < 0 || (tensors[t].size(at) == 1 && sizes[d] != 1) ? 0 : tensors[t].stride(at);
    }
    if (d == dims - 1 || dim.size != 1) all.push_back(dim);
  }
  Rows rows;
  if (all.empty()) all.push_back(Dim{1, {}});
  if (ordered) {
    std::stable_sort(all.begin(), all.end() - (whole ? 0 : 1), [&](const Dim& a, const Dim& b) {
      return a.strides[count - 1] > b.strides[count - 1];
    });
  }
  const Dim last = all.back();
  for (int t = 0; whole && t < count; ++t) {
    if (last.size > 1 && last.strides[t] != 1) return std::nullopt;
  }
  std::vector<Dim> merged;
  for (size_t d = 0; d < all.size(); ++d) {
    bool joins = !merged.empty() && (whole || d + 1 < all.size());
    for (int t = 0; joins && t < count; ++t) joins = merged.back().strides[t] == all[d].strides[t] * all[d].size;
    if (joins) {
      merged.back().size *= all[d].size;
      merged.back().strides = all[d].strides;
    } else {
      merged.push_back(all[d]);
    }
  }
  rows.width = merged.back().size;
  merged.pop_back();
  if (merged.size() > most_dims) return std::nullopt;
  for (const Dim& dim : merged) {
    rows.sizes[rows.dims] = dim.size;
    for (int t = 0; t < count; ++t) rows.strides[t][rows.dims] = dim.strides[t];
    rows.count *= dim.size;
    ++rows.dims;
  }
  return rows;
}

// The rows of tensors of one shape, which become contiguous where a kernel could not go through them.
inline Rows norm_rows(std::vector<Tensor*> tensors) {
  std::vector<Tensor> held;
  for (Tensor* each : tensors) {
    *each = with_rows(*each);
    held.push_back(*each);
  }
  if (const auto rows = rows_of(held, false, false)) return *rows;
  held.clear();
  for (Tensor* each : tensors) {
    *each = torch::stable::contiguous(*each);
    held.push_back(*each);
  }
  return *rows_of(held, false, false);
}

// `made`, with the strides of `like`, which it has the shape of.
inline void copy_into(Tensor& like, const Tensor& made) { torch::stable::copy_(like, made); }

// One of torch's own operators.
template <class... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace shardcomp
