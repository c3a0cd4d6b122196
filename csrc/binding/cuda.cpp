// The CUDA implementations of shardcomp's operators. Also those of the emulation, on tensors of the CPU.

#include <algorithm>
#include <mutex>

#include "../cuda/kernels.h"
#include "operators.h"

#if defined(SHARDCOMP_EMULATED)
#include "../emulation/device.h"
#else
#include <cuda_runtime_api.h>
#include <dlfcn.h>
#include <torch/csrc/stable/accelerator.h>
#endif

namespace shardcomp {
namespace {

#if defined(SHARDCOMP_EMULATED)
class Place {
 public:
  explicit Place(const Tensor&) {}
  static bool has(const Tensor&) { return true; }

 protected:
  const cuda::Device device_{nullptr, emulation::facts().multiprocessors, emulation::facts().shared};
};
#else
void check_cuda(cudaError_t error) { STD_TORCH_CHECK(error == cudaSuccess, "CUDA: ", cudaGetErrorString(error)); }

int64_t attribute(cudaDeviceAttr which, int device) {
  int found = 0;
  check_cuda(cudaDeviceGetAttribute(&found, which, device));
  return found;
}

// The stream that torch uses now. Only a torch with CUDA has the function, which is looked up so that the library can be loaded
// by any.
void* current_stream(int device) {
  typedef int32_t (*Function)(int32_t, void**);
  static const Function function = [] {
    void* held = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return held == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(held, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function != nullptr && function(device, &stream) == 0, "this torch has no CUDA streams");
  return stream;
}

class Place {
 public:
  explicit Place(const Tensor& x) : index_(x.get_device_index()), guard_(index_), device_(facts(index_)) {
    check_cuda(cudaSetDevice(index_));  // for this library's own runtime; the guard is for torch's, and restores both
  }
  static bool has(const Tensor& x) { return x.is_cuda(); }

 private:
  static cuda::Device facts(int index) {
    constexpr int most = 64;
    STD_TORCH_CHECK(index >= 0 && index < most, "CUDA device ", index, ": there is no such device");
    struct Known {
      int multiprocessors;
      int64_t shared;
    };
    static Known known[most];
    static std::once_flag once[most];
    std::call_once(once[index], [&] {
      known[index] = {int(attribute(cudaDevAttrMultiProcessorCount, index)),
                      attribute(cudaDevAttrMaxSharedMemoryPerBlockOptin, index)};
    });
    return {current_stream(index), known[index].multiprocessors, known[index].shared};
  }

  int index_;
  torch::stable::accelerator::DeviceGuard guard_;

 protected:
  const cuda::Device device_;
};
#endif

struct Cuda : Place {
  static constexpr bool own_layer_norm = true, own_gelu = true;

  using Place::Place;

  int64_t block_rows(DType dtype, const Rows& rows, int sums) const { return cuda::block_rows(dtype, rows, sums, device_); }

  // Kernels add the offset themselves to what has the dtype of `x` or the one that this is computed in.
  static Vector factor(const Maybe& vector, const Tensor& x, double offset, bool round_first) {
    if (!vector) return {};
    const bool narrow = vector->scalar_type() == x.scalar_type();
    if (!narrow && vector->scalar_type() != wide_of(x)) return {offset_by(vector, x, offset, round_first)};
    return {torch::stable::contiguous(*vector), narrow, offset, round_first};
  }
  static Vector table(const Tensor& table, const Tensor& x) {
    const bool narrow = table.scalar_type() == x.scalar_type();
    return {with_rows(narrow ? table : as(table, wide_of(x))), narrow};
  }

  template <class Arguments>
  void run(const Arguments& arguments) const {
    cuda::run(arguments, device_);
  }
};

// What lies in one piece, in the order of memory that the first of some tensors of one shape has; copies take the place of those
// that lie otherwise.
void one_piece(Tensors& tensors) {
  if (shard_rows(tensors).dims == 0) return;
  for (Tensor& each : tensors) each = torch::stable::contiguous(each);
}

cuda::Number number(const Maybe& x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->numel() == 1 && Place::has(*x), "adamw_: lr, scale and found_inf have one element, where the weights are");
  return {data(x), dtype_of(*x)};
}

// Calls `start` with as many shards as fit in one call, for all of them. Those without elements are left out.
template <class Arguments, class Shard, class Start>
void in_calls(Arguments& a, const std::vector<Shard>& shards, const Start& start) {
  a.count = 0;
  a.blocks = 0;
  for (size_t at = 0; at < shards.size(); ++at) {
    const int64_t blocks = (shards[at].size + cuda::list_block - 1) / cuda::list_block;
    if (a.count == Arguments::most || a.blocks + blocks > (int64_t(1) << 31) - 1) start();
    if (blocks == 0) continue;
    a.shards[a.count] = shards[at];
    a.shards[a.count++].first_block = int32_t(a.blocks);
    a.blocks += blocks;
  }
  if (a.count > 0) start();
}

void adamw_(const Tensors& weights, const Tensors& copies, const Tensors& gradients, const Tensors& exp_avgs,
            const Tensors& exp_avg_sqs, const Tensors& steps, const Tensor& lr, double beta1, double beta2, double eps,
            double weight_decay, bool maximize, const Maybe& scale, const Maybe& found_inf) {
  if (weights.empty()) return;
  const Cuda device(weights[0]);
  const int64_t count = int64_t(weights.size());
  Tensor numbers = with_shape(weights[0], {3 + 2 * count}, ScalarType::Double);
  cuda::AdamWNumbers of_tensors{0,      0,      beta1, beta2, weight_decay, maximize, number(lr), number(scale), number(found_inf),
                                static_cast<double*>(numbers.mutable_data_ptr()), {}};
  for (int64_t at = 0; at < count; ++at) {
    of_tensors.steps[of_tensors.count++] = static_cast<float*>(Tensor(steps[at]).mutable_data_ptr());
    if (of_tensors.count == cuda::AdamWNumbers::most || at + 1 == count) {
      device.run(of_tensors);
      of_tensors.first = at + 1;
      of_tensors.count = 0;
    }
  }
  Tensors kept;                                   // what the shards point to
  std::vector<std::pair<Tensor, Tensor>> packed;  // what is to be written to, and what that is then
  std::vector<cuda::AdamWShard> shards[2];        // of float and of double
  for (int64_t i = 0; i < count; ++i) {
    const bool wide = dtype_of(weights[i]) == DType::fp64, copied = !copies.empty() && !wide;
    Tensors all{as(gradients[i], wide ? ScalarType::Double : gradients[i].scalar_type()), weights[i], exp_avgs[i], exp_avg_sqs[i]};
    if (!wide && dtype_of(all[0]) == DType::fp64) all[0] = as(all[0], ScalarType::Float);
    if (copied) all.push_back(copies[i]);
    const Tensors before = all;
    one_piece(all);
    for (size_t t = 1; t < all.size(); ++t) {
      if (data(all[t]) != data(before[t])) packed.emplace_back(before[t], all[t]);
    }
    if (wide && !copies.empty()) packed.emplace_back(copies[i], all[1]);
    shards[wide].push_back({data(all[0]), all[1].mutable_data_ptr(), all[2].mutable_data_ptr(), all[3].mutable_data_ptr(),
                            copied ? all[4].mutable_data_ptr() : nullptr, weights[i].numel(), 0, int16_t(dtype_of(all[0])),
                            int16_t(copied ? dtype_of(all[4]) : DType::bf16), int32_t(i)});
    kept.insert(kept.end(), all.begin(), all.end());
  }
  for (bool wide : {false, true}) {
    cuda::AdamW a{wide ? DType::fp64 : DType::fp32, 0, 0, beta1, beta2, eps, static_cast<const double*>(data(numbers)), {}};
    in_calls(a, shards[wide], [&] {
      device.run(a);
      a.count = 0;
      a.blocks = 0;
    });
  }
  for (auto& [to, from] : packed) copy_into(to, from);
}

Tensor grad_norm(const Tensors& gradients) {
  STD_TORCH_CHECK(!gradients.empty(), "grad_norm: no gradients");
  const Cuda device(gradients[0]);
  Tensors kept;
  std::vector<cuda::SquaresShard> shards;
  int64_t blocks = 0;
  ScalarType dtype = ScalarType::Float;
  for (const Tensor& each : gradients) {
    Tensors held{each};
    one_piece(held);
    if (dtype_of(each) == DType::fp64) dtype = ScalarType::Double;
    shards.push_back({data(held[0]), each.numel(), 0, int32_t(dtype_of(each))});
    blocks += (each.numel() + cuda::list_block - 1) / cuda::list_block;
    kept.push_back(held[0]);
  }
  Tensor partial = with_shape(gradients[0], {blocks}, ScalarType::Double), made = with_shape(gradients[0], {}, dtype);
  cuda::Squares a{0, 0, static_cast<double*>(partial.mutable_data_ptr()), {}};
  in_calls(a, shards, [&] {
    device.run(a);
    a.partial += a.blocks;
    a.count = 0;
    a.blocks = 0;
  });
  device.run(cuda::SquaresSum{blocks, static_cast<const double*>(data(partial)), dtype_of(made), made.mutable_data_ptr()});
  return made;
}

}  // namespace
}  // namespace shardcomp

// Where they can be called, and where they take the place of references once they have been found to be right there.
#if defined(SHARDCOMP_EMULATED)
#define SHARDCOMP_CANDIDATES shardcomp_emulated
#define SHARDCOMP_KEY CPU
#else
#define SHARDCOMP_CANDIDATES shardcomp_cuda
#define SHARDCOMP_KEY CUDA
#endif
#define SHARDCOMP_TEXT_OF(word) #word
#define SHARDCOMP_TEXT(word) SHARDCOMP_TEXT_OF(word)

namespace shardcomp {
namespace {

template <class Library>
void implement_all(Library& library) {
  implement<Cuda>(library);
  library.impl("adamw_", TORCH_BOX(&adamw_));
  library.impl("grad_norm", TORCH_BOX(&grad_norm));
}

using torch::stable::detail::StableLibrary;

struct One {
  StableLibrary* library;
  const std::string name;

  void impl(const char* each, void (*function)(StableIValue*, uint64_t, uint64_t)) {
    if (each == name) library->impl(each, function);
  }
};

}  // namespace
}  // namespace shardcomp

STABLE_TORCH_LIBRARY_IMPL(SHARDCOMP_CANDIDATES, SHARDCOMP_KEY, library) { shardcomp::implement_all(library); }

// Puts a kernel in its place among the operators, until the process ends.
extern "C" __attribute__((visibility("default"))) void shardcomp_put_in_place(const char* name) {
  using shardcomp::StableLibrary;
  static auto* const library =
      new StableLibrary(StableLibrary::Kind::IMPL, "shardcomp", SHARDCOMP_TEXT(SHARDCOMP_KEY), __FILE__, __LINE__);
  shardcomp::One one{library, name};
  shardcomp::implement_all(one);
}
