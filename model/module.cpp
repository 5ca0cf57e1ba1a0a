#include "model/module.h"

#include <ATen/CPUGeneratorImpl.h>

#include <unordered_set>

#include "base/error.h"
#include "base/rng.h"

namespace caldera {
namespace {

std::vector<at::Tensor*> distinct_owners(const NamedTensors& tensors) {
  std::vector<at::Tensor*> owners;
  std::unordered_set<at::Tensor*> seen;
  for (const NamedTensor& tensor : tensors) {
    CALDERA_ASSERT(tensor.owner != nullptr);
    if (seen.insert(tensor.owner).second) owners.push_back(tensor.owner);
  }
  return owners;
}

// Draws in float32 on the CPU whatever the tensor is, so that the numbers are the same on every device and
// dtype.
template <class Draw>
void fill_from_own_generator(at::Tensor& tensor, uint64_t seed, const std::string& name, Draw draw) {
  const at::NoGradGuard no_grad;
  at::Generator generator = at::detail::createCPUGenerator(mix64(seed ^ hash_text(name)));
  at::Tensor values = at::empty(tensor.sizes(), at::kFloat);
  draw(values, generator);
  tensor.copy_(values);
}

}  // namespace

NamedTensors with_prefix(const std::string& prefix, NamedTensors tensors) {
  for (NamedTensor& tensor : tensors) tensor.name = prefix + "." + tensor.name;
  return tensors;
}

void append(NamedTensors& list, NamedTensors more) {
  list.insert(list.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
}

void set_trainable(const NamedTensors& tensors, bool trainable) {
  for (at::Tensor* owner : distinct_owners(tensors)) {
    if (owner->is_floating_point()) owner->set_requires_grad(trainable);
  }
}

int64_t count_parameters(const NamedTensors& tensors) {
  int64_t count = 0;
  for (const at::Tensor* owner : distinct_owners(tensors)) count += owner->numel();
  return count;
}

void convert(const NamedTensors& tensors, at::Device device, at::ScalarType dtype) {
  for (at::Tensor* owner : distinct_owners(tensors)) {
    const bool trainable = owner->requires_grad();
    *owner = owner->detach().to(device, owner->is_floating_point() ? dtype : owner->scalar_type());
    owner->set_requires_grad(trainable);
  }
}

void init_normal_(at::Tensor& tensor, double std, uint64_t seed, const std::string& name) {
  fill_from_own_generator(tensor, seed, name, [&](at::Tensor& values, at::Generator& generator) {
    values.normal_(0, std, generator);
  });
}

void init_uniform_(at::Tensor& tensor, double bound, uint64_t seed, const std::string& name) {
  fill_from_own_generator(tensor, seed, name, [&](at::Tensor& values, at::Generator& generator) {
    values.uniform_(-bound, bound, generator);
  });
}

}  // namespace caldera
