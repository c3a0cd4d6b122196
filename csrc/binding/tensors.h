// From torch's tensors to the kernels' arguments: dtypes, rows and strides. For every device.
//
// The binding uses torch's stable ABI alone (torch/csrc/stable), a C interface that later versions keep. One library, built
// with the headers of any torch from 2.11 on, CPU-only or not, then loads in all of them; with ATen's C++ interface a build
// fits one version of torch and takes a minute to compile instead of seconds.
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

// The dtype of computation.
inline ScalarType wide_of(const Tensor& x) { return dtype_of(x) == DType::fp64 ? ScalarType::Double : ScalarType::Float; }

inline Tensor as(const Tensor& x, ScalarType dtype) { return x.scalar_type() == dtype ? x : torch::stable::to(x, dtype); }

inline std::vector<int64_t> sizes_of(const Tensor& x) { return {x.sizes().begin(), x.sizes().end()}; }

inline const void* data(const Tensor& x) { return x.const_data_ptr(); }
inline const void* data(const Maybe& x) { return x ? x->const_data_ptr() : nullptr; }

inline Tensor with_shape(const Tensor& like, const std::vector<int64_t>& shape, ScalarType dtype) {
  return torch::stable::new_empty(like, shape, dtype);
}

// `x`, or a contiguous copy if its last dimension is not adjacent in memory, which the kernels need for vector loads.
inline Tensor with_rows(const Tensor& x) {
  return x.dim() == 0 || x.size(x.dim() - 1) <= 1 || x.stride(x.dim() - 1) == 1 ? x : torch::stable::contiguous(x);
}

// A norm's weight or bias in the dtype in which the norm of `x` is computed.
inline Maybe widened(const Maybe& vector, const Tensor& x) {
  if (!vector) return vector;
  return torch::stable::contiguous(as(*vector, wide_of(x)));
}

// The rows of some tensors, each with the sizes of the first or broadcast to them except in the last dimension. Adjacent
// dimensions merge where all tensors have one stride for both, so that most calls have one leading dimension and need no
// division for an offset. ordered: dimensions are sorted by the strides of the last tensor, so that its memory is written in
// order. merge_last: the last dimension may merge too, for elementwise kernels. Empty if more dimensions remain than a kernel
// takes.
inline std::optional<Rows> rows_of(const std::vector<Tensor>& tensors, bool ordered, bool merge_last) {
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
    std::stable_sort(all.begin(), all.end() - (merge_last ? 0 : 1), [&](const Dim& a, const Dim& b) {
      return a.strides[count - 1] > b.strides[count - 1];
    });
  }
  const Dim last = all.back();
  for (int t = 0; merge_last && t < count; ++t) {
    if (last.size > 1 && last.strides[t] != 1) return std::nullopt;
  }
  std::vector<Dim> merged;
  for (size_t d = 0; d < all.size(); ++d) {
    bool joins = !merged.empty() && (merge_last || d + 1 < all.size());
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

// The rows of tensors of one shape. Tensors that a kernel cannot read in place are replaced by contiguous copies.
inline Rows norm_rows(std::vector<Tensor*> tensors) {
  std::vector<Tensor> rowed;
  for (Tensor* tensor : tensors) {
    *tensor = with_rows(*tensor);
    rowed.push_back(*tensor);
  }
  if (const auto rows = rows_of(rowed, false, false)) return *rows;
  rowed.clear();
  for (Tensor* tensor : tensors) {
    *tensor = torch::stable::contiguous(*tensor);
    rowed.push_back(*tensor);
  }
  return *rows_of(rowed, false, false);
}

// Copies `source` into `target`, a tensor of its shape with strides of its own.
inline void copy_into(Tensor& target, const Tensor& source) { torch::stable::copy_(target, source); }

// Calls one of torch's own operators through the dispatcher: the stable ABI has functions for a few of them only.
template <class... Arguments>
Tensor call(const char* name, const char* overload, const Arguments&... arguments) {
  std::array<StableIValue, sizeof...(arguments)> stack{torch::stable::detail::from(arguments)...};
  TORCH_ERROR_CODE_CHECK(torch_call_dispatcher(name, overload, stack.data(), TORCH_ABI_VERSION));
  return torch::stable::detail::to<Tensor>(stack[0]);
}

}  // namespace shardcomp
