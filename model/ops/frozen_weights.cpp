#include "model/ops/frozen_weights.h"

#include <ATen/core/dispatch/Dispatcher.h>

#include <memory>
#include <mutex>
#include <unordered_map>

#include "base/error.h"
#include "model/ops/autograd.h"
#include "model/ops/matmul.h"
#include "model/ops/widened_product.h"

namespace caldera {
namespace {

// One order of a weight, opaque to ATen; or the weight in float32.
struct Packed {
  at::Tensor values;
  uint32_t version = 0;  // of the weight that it was made of
};
struct Frozen {
  at::Tensor weight_OI;  // keeps the address from being used again
  Packed straight, transposed;
};

std::mutex mutex;
std::unordered_map<const void*, Frozen> registry;  // by address

at::Tensor packed(const at::Tensor& weight_OI) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mkldnn::_reorder_linear_weight", "")
                             .typed<at::Tensor(const at::Tensor&, std::optional<int64_t>)>();
  return op.call(weight_OI, std::nullopt);
}

at::Tensor packed_linear(const at::Tensor& x, const at::Tensor& packed_weight, const std::optional<at::Tensor>& bias) {
  static const auto op = c10::Dispatcher::singleton()
                             .findSchemaOrThrow("mkldnn::_linear_pointwise", "")
                             .typed<at::Tensor(const at::Tensor&, const at::Tensor&, const std::optional<at::Tensor>&,
                                               std::string_view, c10::List<std::optional<at::Scalar>>,
                                               std::optional<std::string_view>)>();
  return op.call(x, packed_weight, bias, "none", c10::List<std::optional<at::Scalar>>(), "");
}

// The copy for products by `b`; undefined where b is no frozen weight.
at::Tensor find(const at::Tensor& b) {
  const std::lock_guard lock(mutex);
  if (registry.empty()) return {};
  const auto found = registry.find(b.const_data_ptr());
  if (found == registry.end()) return {};
  const at::Tensor& weight = found->second.weight_OI;
  // linear(x, w) multiplies by w's transpose.
  const bool is_transposed = b.sizes() == weight.t().sizes() && b.strides() == weight.t().strides();
  if (!is_transposed && !(b.sizes() == weight.sizes() && b.is_contiguous())) return {};
  const bool is_widened = product_way(weight.scalar_type()) == ProductWay::kWidened;
  Packed& copy = is_transposed || is_widened ? found->second.straight : found->second.transposed;
  if (!copy.values.defined() || copy.version != b._version())
    copy = {is_widened     ? weight.to(at::kFloat)
            : is_transposed ? packed(weight)
                            : packed(weight.t().contiguous()),
            static_cast<uint32_t>(b._version())};
  return is_widened && is_transposed ? copy.values.t() : copy.values;
}

}  // namespace

FrozenWeights::FrozenWeights(const std::vector<at::Tensor>& weights) {
  const std::lock_guard lock(mutex);
  for (const at::Tensor& weight : weights) {
    if (!weight.is_contiguous() || !has_cpu_kernel(weight) || weight.numel() == 0) continue;
    CALDERA_ASSERT(weight.dim() == 2);
    if (registry.try_emplace(weight.const_data_ptr(), Frozen{weight.detach(), {}, {}}).second)
      addresses_.push_back(weight.const_data_ptr());
  }
}

FrozenWeights::~FrozenWeights() {
  const std::lock_guard lock(mutex);
  for (const void* address : addresses_) registry.erase(address);
}

int64_t FrozenWeights::num_bytes() const {
  const std::lock_guard lock(mutex);
  int64_t bytes = 0;
  for (const void* address : addresses_) {
    const Frozen& frozen = registry.at(address);
    for (const Packed* copy : {&frozen.straight, &frozen.transposed})
      if (copy->values.defined())
        bytes += frozen.weight_OI.numel() * frozen_bytes_each(frozen.weight_OI.scalar_type(), /*forward_only=*/true);
  }
  return bytes;
}

int64_t frozen_bytes_each(at::ScalarType dtype, bool forward_only) {
  switch (product_way(dtype)) {
    case ProductWay::kAten:
    case ProductWay::kOwn:
      return 0;
    case ProductWay::kOneDnn:
      return static_cast<int64_t>(c10::elementSize(dtype)) * (forward_only ? 1 : 2);
    case ProductWay::kWidened:
      return sizeof(float);
  }
  throw Error("a way of multiplying that is not known");
}

at::Tensor widened_if_frozen(const at::Tensor& b) {
  if (b.dim() != 2 || product_way(b.scalar_type()) != ProductWay::kWidened) return b;
  const at::Tensor copy = find(b);
  return copy.defined() ? copy : b;
}

at::Tensor product_with_packed(const at::Tensor& a, const at::Tensor& b, const at::Tensor& bias) {
  if (b.dim() != 2 || product_way(b.scalar_type()) != ProductWay::kOneDnn) return {};
  const at::Tensor weight = find(b);
  if (!weight.defined()) return {};
  CALDERA_PROFILED("matrix_product");
  const at::NoGradGuard no_grad;
  return packed_linear(a.contiguous(), weight, given(bias));
}

}  // namespace caldera
