// CUDA's implementations of shardcomp's operators; under SHARDCOMP_EMULATED those of the emulated device, on tensors of the
// CPU.
//
// The library links its own static CUDA runtime and none of torch's CUDA libraries, so that it builds and loads without a GPU
// and beside any version of torch's runtime. Both runtimes share the context of the device.

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
  int value = 0;
  check_cuda(cudaDeviceGetAttribute(&value, which, device));
  return value;
}

// The current stream of torch. Only a torch with CUDA has the function; it is looked up at run time, so that the library also
// loads in a torch without. dlopen with RTLD_NOLOAD gives the copy that is loaded already, because torch loads its libraries
// privately.
void* current_stream(int device) {
  typedef int32_t (*Function)(int32_t, void**);
  static const Function function = [] {
    void* torch_cuda = dlopen("libtorch_cuda.so", RTLD_LAZY | RTLD_NOLOAD);
    return torch_cuda == nullptr ? nullptr : reinterpret_cast<Function>(dlsym(torch_cuda, "aoti_torch_get_current_cuda_stream"));
  }();
  void* stream = nullptr;
  STD_TORCH_CHECK(function != nullptr && function(device, &stream) == 0, "this torch has no CUDA streams");
  return stream;
}

class Place {
 public:
  explicit Place(const Tensor& x) : index_(x.get_device_index()), guard_(index_), device_(facts(index_)) {
    check_cuda(cudaSetDevice(index_));  // for this library's own runtime; the guard sets torch's, and restores the device of both
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

  // A vector in the dtype of `x`, or in that of computation, goes to the kernel as it is; the kernel widens it and adds the
  // offset.
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

// Makes tensors of one shape dense, all in one order of memory, so that a kernel can go over them without strides. Copies
// replace those that are not.
void make_dense(Tensors& tensors) {
  if (shard_rows(tensors).dims == 0) return;
  for (Tensor& tensor : tensors) tensor = torch::stable::contiguous(tensor);
}

cuda::Number number(const Maybe& x) {
  if (!x) return {};
  STD_TORCH_CHECK(x->numel() == 1 && Place::has(*x), "adamw_: lr, scale and found_inf have one element, where the weights are");
  return {data(x), dtype_of(*x)};
}

// Calls `start` as often as it takes for all shards, each time with as many as one launch holds. Empty shards are left out.
template <class Arguments, class Shard, class Start>
void in_launches(Arguments& a, const std::vector<Shard>& shards, const Start& start) {
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
  Tensors alive;                                  // tensors that shards point into
  std::vector<std::pair<Tensor, Tensor>> packed;  // a tensor and the dense copy of it that the kernel updates
  std::vector<cuda::AdamWShard> shards[2];        // of float and of double
  for (int64_t i = 0; i < count; ++i) {
    const bool wide = dtype_of(weights[i]) == DType::fp64, copied = !copies.empty() && !wide;
    Tensors all{as(gradients[i], wide ? ScalarType::Double : gradients[i].scalar_type()), weights[i], exp_avgs[i], exp_avg_sqs[i]};
    if (!wide && dtype_of(all[0]) == DType::fp64) all[0] = as(all[0], ScalarType::Float);
    if (copied) all.push_back(copies[i]);
    const Tensors before = all;
    make_dense(all);
    for (size_t t = 1; t < all.size(); ++t) {
      if (data(all[t]) != data(before[t])) packed.emplace_back(before[t], all[t]);
    }
    if (wide && !copies.empty()) packed.emplace_back(copies[i], all[1]);
    shards[wide].push_back({data(all[0]), all[1].mutable_data_ptr(), all[2].mutable_data_ptr(), all[3].mutable_data_ptr(),
                            copied ? all[4].mutable_data_ptr() : nullptr, weights[i].numel(), 0, int16_t(dtype_of(all[0])),
                            int16_t(copied ? dtype_of(all[4]) : DType::bf16), int32_t(i)});
    alive.insert(alive.end(), all.begin(), all.end());
  }
  for (bool wide : {false, true}) {
    cuda::AdamW a{wide ? DType::fp64 : DType::fp32, 0, 0, beta1, beta2, eps, static_cast<const double*>(data(numbers)), {}};
    in_launches(a, shards[wide], [&] {
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
  Tensors alive;
  std::vector<cuda::SquaresShard> shards;
  int64_t blocks = 0;
  ScalarType dtype = ScalarType::Float;
  for (const Tensor& gradient : gradients) {
    Tensors dense{gradient};
    make_dense(dense);
    if (dtype_of(gradient) == DType::fp64) dtype = ScalarType::Double;
    shards.push_back({data(dense[0]), gradient.numel(), 0, int32_t(dtype_of(gradient))});
    blocks += (gradient.numel() + cuda::list_block - 1) / cuda::list_block;
    alive.push_back(dense[0]);
  }
  Tensor partial = with_shape(gradients[0], {blocks}, ScalarType::Double), sum = with_shape(gradients[0], {}, dtype);
  cuda::Squares a{0, 0, static_cast<double*>(partial.mutable_data_ptr()), {}};
  in_launches(a, shards, [&] {
    device.run(a);
    a.partial += a.blocks;
    a.count = 0;
    a.blocks = 0;
  });
  device.run(cuda::SquaresSum{blocks, static_cast<const double*>(data(partial)), dtype_of(sum), sum.mutable_data_ptr()});
  return sum;
}

}  // namespace
}  // namespace shardcomp

// The kernels register in a namespace of their own. shardcomp/kernels/device_check.py compares each with its reference on the
// device at hand and only then has it registered as the operator itself.
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

// A library that registers the one operator `name`.
struct One {
  StableLibrary* library;
  const std::string name;

  void impl(const char* operator_name, void (*function)(StableIValue*, uint64_t, uint64_t)) {
    if (operator_name == name) library->impl(operator_name, function);
  }
};

}  // namespace
}  // namespace shardcomp

STABLE_TORCH_LIBRARY_IMPL(SHARDCOMP_CANDIDATES, SHARDCOMP_KEY, library) { shardcomp::implement_all(library); }

// Registers a kernel as the implementation of its operator, until the process ends.
extern "C" __attribute__((visibility("default"))) void shardcomp_put_in_place(const char* name) {
  using shardcomp::StableLibrary;
  static auto* const library =
      new StableLibrary(StableLibrary::Kind::IMPL, "shardcomp", SHARDCOMP_TEXT(SHARDCOMP_KEY), __FILE__, __LINE__);
  shardcomp::One one{library, name};
  shardcomp::implement_all(one);
}
