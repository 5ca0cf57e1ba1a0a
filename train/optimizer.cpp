#include "train/optimizer.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "model/ops/adamw.h"

namespace caldera {

AdamW::AdamW(std::vector<ParameterGroup> groups, const AdamWOptions& options, const OwnedParts& owned)
    : groups_(std::move(groups)), options_(options) {
  for (size_t group = 0; group < groups_.size(); ++group) {
    for (const NamedTensor& tensor : groups_[group].tensors) {
      if (!slot_of_.try_emplace(tensor.owner, slots_.size()).second) continue;
      Slot slot;
      slot.weight = *tensor.owner;
      slot.place = slot.weight.detach();
      if (!owned.empty()) {
        slot.is_part = true;
        slot.begin = owned.at(tensor.owner).begin;
        slot.place = owned.at(tensor.owner).weight;
      }
      slot.master = slot.place.scalar_type() == at::kFloat ? slot.place : slot.place.to(at::kFloat);
      slot.exp_avg = at::zeros_like(slot.master);
      slot.exp_avg_sq = at::zeros_like(slot.master);
      slot.group = group;
      slot.decays = slot.weight.dim() >= 2;
      slots_.push_back(std::move(slot));
    }
  }
}

void AdamW::Slot::round_master() const {
  if (!master.is_alias_of(place)) place.copy_(master);
}

void AdamW::set_gradient(const at::Tensor* owner, const at::Tensor& gradient) {
  slots_[slot_of_.at(owner)].grad_sum = gradient;
}

void AdamW::take_gradients(bool more_to_come) {
  const at::NoGradGuard no_grad;
  for (Slot& slot : slots_) {
    at::Tensor& grad = slot.weight.mutable_grad();
    // Float32 gradients are summed by autograd itself, in place.
    if (!grad.defined() || grad.scalar_type() == at::kFloat) continue;
    if (slot.grad_sum.defined())
      slot.grad_sum.add_(grad);
    else if (more_to_come)
      slot.grad_sum = grad.to(at::kFloat);
    else
      continue;
    grad.reset();
  }
}

at::Tensor AdamW::grad_norm() const {
  const at::NoGradGuard no_grad;
  std::vector<at::Tensor> norms;
  for (const Slot& slot : slots_) {
    const at::Tensor gradient = slot.grad_sum.defined() ? slot.grad_sum : slot.weight.grad();
    if (gradient.defined())
      norms.push_back(at::linalg_vector_norm(gradient, 2, std::nullopt, false, at::kFloat));
  }
  if (norms.empty()) return at::zeros({}, at::kFloat);
  return at::linalg_vector_norm(at::stack(norms), 2);
}

void AdamW::step(double lr_factor, double grad_scale) {
  const at::NoGradGuard no_grad;
  ++num_updates_;
  for (Slot& slot : slots_) {
    if (slot.master.numel() == 0) continue;  // nothing of it is owned
    // A part that this step did not touch (no picture in it) has no gradient: its moments decay as the
    // others' do.
    adamw_update(slot.master, slot.exp_avg, slot.exp_avg_sq,
                 slot.grad_sum.defined() ? slot.grad_sum : slot.weight.grad(), slot.place,
                 {.learning_rate = groups_[slot.group].learning_rate * lr_factor,
                  .beta1 = options_.beta1,
                  .beta2 = options_.beta2,
                  .epsilon = options_.epsilon,
                  .weight_decay = slot.decays ? options_.weight_decay : 0.0,
                  .grad_scale = grad_scale,
                  .count = num_updates_});
    slot.weight.mutable_grad().reset();
    slot.grad_sum.reset();
  }
}

std::vector<std::pair<std::string, at::Tensor>> AdamW::views(const std::string& prefix,
                                                             at::Tensor Slot::*member) const {
  std::vector<std::pair<std::string, at::Tensor>> list;
  for (const ParameterGroup& group : groups_) {
    for (const NamedTensor& tensor : group.tensors) {
      const Slot& slot = slots_[slot_of_.at(tensor.owner)];
      const at::Tensor& values = slot.*member;
      if (!slot.is_part) {
        list.emplace_back(prefix + tensor.name,
                          tensor.num_rows < 0 ? values : values.narrow(0, tensor.row_begin, tensor.num_rows));
        continue;
      }
      // The named tensor is elements [first, last) of the flattened owner; of these, the owned ones.
      const int64_t row =
          slot.weight.dim() == 0 ? 1 : slot.weight.numel() / std::max<int64_t>(slot.weight.size(0), 1);
      const int64_t first = tensor.row_begin * row;
      const int64_t last = tensor.num_rows < 0 ? slot.weight.numel() : first + tensor.num_rows * row;
      const int64_t begin = std::max(first, slot.begin), end = std::min(last, slot.begin + values.numel());
      if (begin < end)
        list.emplace_back(fmt::format("{}{}@{}", prefix, tensor.name, begin - first),
                          values.narrow(0, begin - slot.begin, end - begin));
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
  for (const Slot& slot : slots_) slot.round_master();
}

}  // namespace caldera
