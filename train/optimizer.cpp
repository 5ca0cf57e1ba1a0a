#include "train/optimizer.h"

#include <unordered_map>

#include "base/error.h"

namespace caldera {

AdamW::AdamW(std::vector<ParameterGroup> groups, const AdamWOptions& options)
    : groups_(std::move(groups)), options_(options) {
  std::unordered_map<at::Tensor*, size_t> seen;
  for (size_t group = 0; group < groups_.size(); ++group) {
    for (const NamedTensor& tensor : groups_[group].tensors) {
      const auto [place, is_new] = seen.try_emplace(tensor.owner, slots_.size());
      slot_index_.push_back(place->second);
      if (!is_new) continue;
      const at::Tensor weight = *tensor.owner;
      Slot slot;
      slot.weight = weight;
      slot.master = weight.scalar_type() == at::kFloat ? weight.detach() : weight.detach().to(at::kFloat);
      slot.exp_avg = at::zeros_like(slot.master);
      slot.exp_avg_sq = at::zeros_like(slot.master);
      slot.group = group;
      slot.decays = weight.dim() >= 2;
      slots_.push_back(std::move(slot));
    }
  }
}

at::Tensor AdamW::Slot::gradient() const {
  if (grad_sum.defined()) return grad_sum;
  return weight.grad().defined() ? weight.grad().to(at::kFloat) : at::Tensor();
}

void AdamW::take_gradients(bool more_to_come) {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    at::Tensor& grad = slot.weight.mutable_grad();
    // Float32 gradients are summed by autograd itself, in place.
    if (!grad.defined() || grad.scalar_type() == at::kFloat) continue;
    if (slot.grad_sum.defined()) slot.grad_sum.add_(grad);
    else if (more_to_come) slot.grad_sum = grad.to(at::kFloat);
    else continue;
    grad.reset();
  }
}

at::Tensor AdamW::grad_norm() const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> norms;
  for (const Slot& slot : slots_) {
    const at::Tensor gradient = slot.grad_sum.defined() ? slot.grad_sum : slot.weight.grad();
    if (gradient.defined()) norms.push_back(at::linalg_vector_norm(gradient, 2, std::nullopt, false, at::kFloat));
  }
  if (norms.empty()) return at::zeros({}, at::kFloat);
  return at::linalg_vector_norm(at::stack(norms), 2);
}

void AdamW::step(double lr_factor, double grad_scale) {
  const at::NoGradGuard no_grad;
  ++num_updates_;
  // The kernel divides gradients by this.
  const std::optional<at::Tensor> inverse_scale =
      grad_scale == 1 ? std::nullopt
                      : std::optional(at::full({}, 1 / grad_scale, slots_.front().master.options()));
  for (Slot& slot : slots_) {
    at::Tensor gradient = slot.gradient();
    // A part that this step did not touch (no picture in it) has a gradient of zero: its moments decay as the others' do.
    if (!gradient.defined()) gradient = at::zeros_like(slot.master);
    const at::Tensor count = at::full({}, static_cast<double>(num_updates_), slot.master.options());
    at::_fused_adamw_({slot.master}, {gradient}, {slot.exp_avg}, {slot.exp_avg_sq}, {}, {count},
                      groups_[slot.group].learning_rate * lr_factor, options_.beta1, options_.beta2,
                      slot.decays ? options_.weight_decay : 0.0, options_.epsilon, /*amsgrad=*/false,
                      /*maximize=*/false, inverse_scale, /*found_inf=*/std::nullopt);
    if (!slot.master.is_alias_of(slot.weight)) slot.weight.detach().copy_(slot.master);
    slot.weight.mutable_grad().reset();
    slot.grad_sum.reset();
  }
}

std::vector<std::pair<std::string, at::Tensor>> AdamW::views(const std::string& prefix,
                                                             at::Tensor Slot::* member) const {
  std::vector<std::pair<std::string, at::Tensor>> list;
  size_t next = 0;
  for (const ParameterGroup& group : groups_) {
    for (const NamedTensor& tensor : group.tensors) {
      const at::Tensor& whole = slots_[slot_index_[next++]].*member;
      list.emplace_back(prefix + tensor.name,
                        tensor.num_rows < 0 ? whole : whole.narrow(0, tensor.row_begin, tensor.num_rows));
    }
  }
  return list;
}

std::vector<std::pair<std::string, at::Tensor>> AdamW::masters() const { return views("", &Slot::master); }

std::vector<std::pair<std::string, at::Tensor>> AdamW::moments() const {
  auto list = views("exp_avg.", &Slot::exp_avg);
  for (auto& item : views("exp_avg_sq.", &Slot::exp_avg_sq)) list.push_back(std::move(item));
  return list;
}

void AdamW::restore(int64_t num_updates) {
  const at::NoGradGuard no_grad;
  num_updates_ = num_updates;
  for (Slot& slot : slots_)
    if (!slot.master.is_alias_of(slot.weight)) slot.weight.detach().copy_(slot.master);
}

}  // namespace caldera
