#include "train/optimizer.h"

#include <fmt/format.h>

#include <algorithm>

#include "base/error.h"
#include "base/rng.h"
#include "model/ops/accumulate.h"
#include "model/ops/dynamic_map.h"
#include "model/ops/ops.h"

namespace caldera {

namespace {

// Tables that are looked up (torch's Embedding); a tower's patch_embedding is a convolution, and no such
// table.
bool is_lookup_table(const std::string& name) {
  return name.ends_with("embed_tokens.weight") || name.ends_with("position_embedding.weight");
}

}  // namespace

std::unordered_set<const at::Tensor*> with_8bit_states(const std::vector<ParameterGroup>& groups) {
  std::unordered_set<const at::Tensor*> owners, others;
  for (const ParameterGroup& group : groups) {
    for (const NamedTensor& tensor : group.tensors) {
      const at::Tensor& weight = *tensor.owner;
      const bool fits = weight.dim() >= 2 && weight.numel() >= 4096 && !is_lookup_table(tensor.name) &&
                        tensor.row_begin * (weight.numel() / weight.size(0)) % kQuantizedBlock == 0;
      (fits ? owners : others).insert(tensor.owner);
    }
  }
  for (const at::Tensor* other : others) owners.erase(other);
  return owners;
}

AdamW::AdamW(std::vector<ParameterGroup> groups, const AdamWOptions& options, const OwnedParts& owned)
    : groups_(std::move(groups)), options_(options) {
  const auto in_8bit =
      options_.has_8bit_states ? with_8bit_states(groups_) : std::unordered_set<const at::Tensor*>();
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
      const at::Tensor weight = options_.is_offloaded ? slot.place.cpu() : slot.place;
      slot.master = options_.has_masters ? Master::of(weight) : Master{weight, {}};
      slot.exp_avg = zero_moment(weight, in_8bit.contains(tensor.owner));
      slot.exp_avg_sq = zero_moment(weight, in_8bit.contains(tensor.owner));
      slot.noise = hash_text(tensor.name);
      slot.group = group;
      slot.decays = slot.weight.dim() >= 2;
      slots_.push_back(std::move(slot));
    }
  }
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
      accumulate_(slot.grad_sum, grad);
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
      norms.push_back(vector_norm(gradient));
  }
  if (norms.empty()) return at::zeros({}, at::kFloat);
  return vector_norm(at::stack(norms));
}

void AdamW::update(const Slot& slot, const AdamWStep& step) const {
  at::Tensor gradient = slot.grad_sum.defined() ? slot.grad_sum : slot.weight.grad();
  // Offloaded: the update runs where the master is, and the weight is copied to its place.
  const at::Device device = slot.master.weight.device();
  if (slot.is_away() && gradient.defined()) gradient = gradient.to(device);
  const bool has_master = slot.master.remainder.defined() || slot.master.weight.scalar_type() == at::kFloat;
  if (has_master && !slot.exp_avg.scale.defined())
    adamw_update(slot.master, slot.exp_avg.values, slot.exp_avg_sq.values, gradient, step);
  else
    adamw_update_compact(slot.master, slot.exp_avg, slot.exp_avg_sq, gradient, step,
                         {.key = Rng(options_.seed, num_updates_, slot.noise).next(), .first = slot.begin});
  if (slot.is_away()) slot.place.copy_(slot.master.weight);
}

void AdamW::step(double lr_factor, double grad_scale) {
  const at::NoGradGuard no_grad;
  ++num_updates_;
  for (Slot& slot : slots_) {
    if (slot.place.numel() == 0) continue;  // nothing of it is owned
    // A part that this step did not touch (no picture in it) has no gradient: its moments decay as the
    // others' do.
    update(slot, {.learning_rate = groups_[slot.group].learning_rate * lr_factor,
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

StateList AdamW::views(const std::string& prefix, const std::function<Master(const Slot&)>& value_of,
                       int64_t elements_each) const {
  StateList list;
  for (const ParameterGroup& group : groups_) {
    for (const NamedTensor& tensor : group.tensors) {
      const Slot& slot = slots_[slot_of_.at(tensor.owner)];
      const Master value = value_of(slot);
      if (!value.weight.defined()) continue;
      if (!slot.is_part && elements_each == 1) {
        list.emplace_back(prefix + tensor.name, tensor.num_rows < 0 ? value : value.rows(tensor.row_begin, tensor.num_rows));
        continue;
      }
      // The named tensor is elements [first, last) of the flattened owner; of these, the owned ones.
      const int64_t row =
          slot.weight.dim() == 0 ? 1 : slot.weight.numel() / std::max<int64_t>(slot.weight.size(0), 1);
      const int64_t first = tensor.row_begin * row;
      const int64_t last = tensor.num_rows < 0 ? slot.weight.numel() : first + tensor.num_rows * row;
      const int64_t begin = std::max(first, slot.begin);
      const int64_t end = std::min(last, slot.begin + slot.place.numel());
      if (begin >= end) continue;
      const auto up = [&](int64_t elements) { return (elements + elements_each - 1) / elements_each; };
      const int64_t from = (begin - slot.begin) / elements_each;
      list.emplace_back(
          prefix + tensor.name + (slot.is_part ? fmt::format("@{}", (begin - first) / elements_each) : ""),
          value.rows(from, up(end - slot.begin) - from));
    }
  }
  return list;
}

StateList AdamW::masters() const {
  return views("", [](const Slot& slot) { return slot.master; });
}

StateList AdamW::moments() const {
  StateList list;
  const auto add = [&](const std::string& prefix, int64_t elements_each, const auto& values_of) {
    StateList more = views(
        prefix, [&](const Slot& slot) { return Master{values_of(slot), {}}; }, elements_each);
    list.insert(list.end(), std::make_move_iterator(more.begin()), std::make_move_iterator(more.end()));
  };
  add("exp_avg.", 1, [](const Slot& slot) { return slot.exp_avg.values; });
  add("exp_avg_sq.", 1, [](const Slot& slot) { return slot.exp_avg_sq.values; });
  add("exp_avg_scale.", kQuantizedBlock, [](const Slot& slot) { return slot.exp_avg.scale; });
  add("exp_avg_sq_scale.", kQuantizedBlock, [](const Slot& slot) { return slot.exp_avg_sq.scale; });
  return list;
}

void AdamW::restore(int64_t num_updates) {
  const at::NoGradGuard no_grad;
  num_updates_ = num_updates;
  for (const Slot& slot : slots_)
    if (slot.is_away()) slot.place.copy_(slot.master.weight);
}

}  // namespace caldera
