#include "train/distributed/sharding.h"

#include <torch/csrc/autograd/function_hook.h>
#include <torch/csrc/autograd/variable.h>

#include <algorithm>
#include <array>
#include <limits>
#include <unordered_map>
#include <utility>

#include "base/error.h"
#include "model/ops/ops.h"

namespace caldera {
namespace {

constexpr int64_t kAllLayers = std::numeric_limits<int64_t>::max();

// Gives a dense tensor's storage memory, uninitialised, or takes it away. Views of it share the storage.
void set_storage(const at::Tensor& tensor, bool is_there) {
  c10::StorageImpl* storage = tensor.storage().unsafeGetStorageImpl();
  const size_t bytes = is_there ? static_cast<size_t>(tensor.numel()) * tensor.element_size() : 0;
  storage->set_data_ptr_noswap(is_there ? c10::GetAllocator(tensor.device().type())->allocate(bytes)
                                        : at::DataPtr(nullptr, tensor.device()));
  storage->set_nbytes(bytes);
}

}  // namespace

// A block's tensors in one flat buffer of `length` elements, of which each rank that shares it owns `part`.
struct Sharding::Unit : FlatUnit {
  explicit Unit(FlatUnit unit) : FlatUnit(std::move(unit)) {}
  bool is_freed = false;
  int num_holders = 0;
  int64_t part = 0;
  std::vector<at::Tensor> hooked;     // what our hooks hang on; the owners may go before us (merged adapters)
  at::Tensor weights, own_weights;    // zero: in the weights' dtype
  at::Tensor gradient, own_gradient;  // float32
  at::Tensor sent, received;          // of the reduction under way; `received` while it is a reduce-scatter
  Wait wait;                          // for the reduction
  Wait gathered;                      // for weights that were asked for ahead
  size_t num_ready = 0;

  at::Tensor of(const at::Tensor& flat, const Leaf& leaf) const {
    return flat.narrow(0, leaf.offset, leaf.numel).view(leaf.owner->sizes());
  }
  // The elements of a leaf in a rank's part: {first in the leaf, count}; the count may be 0.
  std::pair<int64_t, int64_t> owned_range(const Leaf& leaf, int shard) const {
    const int64_t begin = std::clamp<int64_t>(shard * part - leaf.offset, 0, leaf.numel);
    const int64_t end = std::clamp<int64_t>((shard + 1) * part - leaf.offset, 0, leaf.numel);
    return {begin, end - begin};
  }
};

struct Sharding::Hook : torch::autograd::PostAccumulateGradHook {
  Hook(Sharding& sharding, Unit& unit, const FlatUnit::Leaf& leaf)
      : sharding_(sharding), unit_(unit), leaf_(leaf) {}
  void operator()(const at::Tensor&) override { sharding_.on_gradient(unit_, leaf_); }

 private:
  Sharding& sharding_;
  Unit& unit_;
  const FlatUnit::Leaf& leaf_;
};

Sharding::Sharding(World& world, const DistributedConfig& config, const std::vector<ParameterGroup>& groups,
                   const NamedTensors& decoder)
    : world_(world),
      strategy_(config.strategy == "ddp"     ? Strategy::kDdp
                : config.strategy == "zero1" ? Strategy::kZero1
                : config.strategy == "zero2" ? Strategy::kZero2
                                             : Strategy::kZero3),
      reduce_dtype_(config.reduce_dtype == "bfloat16" ? at::kBFloat16 : at::kFloat) {
  const at::NoGradGuard no_grad;
  // By the recipe, which is every rank's: on uneven machines they would not agree on the numbers that follow.
  if (config.shard_within == "node" && strategy_ != Strategy::kDdp) world.split_by_machine();
  const RankSplit split = split_ranks(config, world.size(), world.spec().local_size);
  num_shards_ = static_cast<int>(split.num_shards);
  num_replicas_ = static_cast<int>(split.num_replicas);
  shard_ = world.rank() % num_shards_;
  replica_ = world.rank() / num_shards_;
  // Nobody to share with. (A group of one keeps its strategy, so that its collectives run.)
  if (num_shards_ == 1 && world.size() > 1) strategy_ = Strategy::kDdp;
  if (num_shards_ > 1 && num_shards_ < world.size()) {
    sharers_ = Among::kMachine;
    replicas_ = Among::kPeers;
  }
  for (FlatUnit& flat : lay_out_units(groups, decoder, frees_blocks())) {
    auto unit = std::make_unique<Unit>(std::move(flat));
    if (frees_blocks() && unit->layer >= 0) {
      unit->is_freed = true;
      const auto layer = static_cast<size_t>(unit->layer);
      if (blocks_.size() <= layer) blocks_.resize(layer + 1);
      blocks_[layer].push_back(unit.get());
    }
    lay_out(*unit);
    (unit->trains ? units_ : frozen_).push_back(std::move(unit));
  }
}

// Puts a unit's tensors into its flat buffer, finds this rank's part of each, and listens for their
// gradients.
void Sharding::lay_out(Unit& unit) {
  unit.length = padded_length(unit, world_.size());
  unit.part = unit.length / num_shards_;
  const int64_t own_begin = shard_ * unit.part;
  if (strategy_ != Strategy::kDdp) {
    unit.weights = at::zeros({unit.length}, unit.leaves.front().owner->options().requires_grad(false));
    for (const FlatUnit::Leaf& leaf : unit.leaves) unit.of(unit.weights, leaf).copy_(*leaf.owner);
    unit.own_weights = unit.weights.narrow(0, own_begin, unit.part);
    if (unit.is_freed) unit.own_weights = unit.own_weights.clone();
    for (const FlatUnit::Leaf& leaf : unit.leaves) {
      if (unit.trains) {
        const auto [begin, count] = unit.owned_range(leaf, shard_);
        const int64_t place = count > 0 ? leaf.offset + begin - own_begin : 0;
        owned_[leaf.owner] = {begin, unit.own_weights.narrow(0, place, count)};
      }
      *leaf.owner = unit.of(unit.weights, leaf);
      leaf.owner->set_requires_grad(unit.trains);
    }
    if (unit.is_freed) {
      // The same memory under another version count: autograd may have seen the weights before they are
      // brought again, with the same values.
      unit.weights = unit.weights.variable_data();
      set_storage(unit.weights, false);
    }
  }
  for (const FlatUnit::Leaf& leaf : unit.leaves) {
    if (!unit.trains) continue;
    unit.hooked.push_back(*leaf.owner);
    torch::autograd::impl::set_post_acc_grad_hooks(*leaf.owner, std::make_unique<Hook>(*this, unit, leaf));
  }
}

Sharding::~Sharding() {
  for (const auto& unit : units_)
    for (const at::Tensor& hooked : unit->hooked)
      torch::autograd::impl::set_post_acc_grad_hooks(hooked, nullptr);
}

std::string Sharding::describe() const {
  constexpr std::array kNames = {"ddp", "zero1", "zero2", "zero3"};
  return std::string(kNames[static_cast<size_t>(strategy_)]) +
         (sharers_ == Among::kMachine ? " within each machine" : "");
}

void Sharding::begin_round(bool is_last) {
  const at::NoGradGuard no_grad;
  finish_gathers(-1);
  is_last_ = is_last;
  is_reducing_ = is_last || strategy_ == Strategy::kZero2 || strategy_ == Strategy::kZero3;
  next_ = 0;
  num_forward_ = 0;
  for (const auto& unit : units_) {
    unit->num_ready = 0;
    if (!begins_step_) continue;
    unit->own_gradient.reset();
    if (unit->gradient.defined()) unit->gradient.zero_();
  }
  begins_step_ = false;
}

void Sharding::on_gradient(Unit& unit, const FlatUnit::Leaf& leaf) {
  const at::NoGradGuard no_grad;
  if (!unit.gradient.defined())
    unit.gradient = at::zeros({unit.length}, leaf.owner->options().dtype(at::kFloat).requires_grad(false));
  at::Tensor& grad = leaf.owner->mutable_grad();
  unit.of(unit.gradient, leaf).add_(grad);
  grad.reset();
  ++unit.num_ready;
  if (is_reducing_) start_ready(false);
}

// Begins the reduction of the unit that is next.
void Sharding::start_next() {
  Unit& unit = *units_[next_++];
  if (!unit.gradient.defined())
    unit.gradient =
        at::zeros({unit.length}, unit.leaves.front().owner->options().dtype(at::kFloat).requires_grad(false));
  if (is_replicated()) {
    unit.own_gradient = unit.gradient;
    return start_replicas(unit);
  }
  unit.sent = unit.gradient.to(reduce_dtype_);  // the gradient itself where that is float32
  unit.received = at::empty({unit.part}, unit.sent.options());
  unit.wait = world_.reduce_scatter(unit.received, unit.sent, sharers_);
  // The sum over the machines goes on behind: by now the unit before has come through, or nearly.
  if (is_last_ && num_replicas_ > 1 && next_ > 1) take_part(*units_[next_ - 2]);
}

// The reduce-scatter of a unit is through: what it brought joins what this rank owns.
void Sharding::take_part(Unit& unit) {
  unit.wait();
  if (unit.own_gradient.defined())
    unit.own_gradient.add_(unit.received);
  else
    unit.own_gradient = unit.received.to(at::kFloat);
  if (strategy_ == Strategy::kZero2 || strategy_ == Strategy::kZero3) unit.gradient.reset();
  unit.sent.reset();
  unit.received.reset();
  unit.wait = nullptr;
  if (is_last_ && num_replicas_ > 1) start_replicas(unit);
}

void Sharding::start_replicas(Unit& unit) {
  unit.sent = unit.own_gradient.to(reduce_dtype_);
  unit.wait = world_.sum(unit.sent, replicas_);
}

void Sharding::start_ready(bool all) {
  while (next_ < units_.size() && (all || units_[next_]->num_ready == units_[next_]->leaves.size()))
    start_next();
}

// The blocks behind `layer` have had their backward pass, whether it touched all their tensors or not.
void Sharding::start_layers_behind(int64_t layer) {
  const at::NoGradGuard no_grad;
  while (next_ < units_.size() && units_[next_]->layer > layer) start_next();
}

// Asks for a block's weights where they are neither there nor on their way.
void Sharding::begin_gather(size_t layer) {
  for (Unit* unit : blocks_[layer]) {
    if (unit->num_holders > 0 || unit->gathered) continue;
    set_storage(unit->weights, true);
    unit->gathered = world_.all_gather(unit->weights, unit->own_weights, sharers_);
  }
}

std::shared_ptr<void> Sharding::hold(size_t layer) {
  if (!frees_blocks()) {
    finish_gathers(static_cast<int64_t>(layer));
    return nullptr;
  }
  // Collectives come in the same order on every rank: those of the blocks behind first.
  const bool is_backward = num_forward_ == blocks_.size();
  if (!is_backward)
    ++num_forward_;
  else if (is_reducing_)
    start_layers_behind(static_cast<int64_t>(layer));
  const at::NoGradGuard no_grad;
  begin_gather(layer);
  if (is_backward && layer > 0) begin_gather(layer - 1);
  if (!is_backward && layer + 1 < blocks_.size()) begin_gather(layer + 1);
  for (Unit* unit : blocks_[layer]) {
    ++unit->num_holders;
    if (const Wait wait = std::exchange(unit->gathered, nullptr)) wait();
  }
  return {nullptr, [this, layer](void*) {
            for (Unit* unit : blocks_[layer])
              if (--unit->num_holders == 0) set_storage(unit->weights, false);
          }};
}

void Sharding::hold_all() {
  finish_gathers(kAllLayers);
  for (size_t layer = 0; layer < blocks_.size(); ++layer) {
    begin_gather(layer);
    for (Unit* unit : blocks_[layer]) {
      ++unit->num_holders;
      if (const Wait wait = std::exchange(unit->gathered, nullptr)) wait();
    }
  }
  world_.wait_for_device();
}

void Sharding::begin_evaluation() {
  finish_gathers(-1);
  num_forward_ = 0;
}

void Sharding::idle_forward() {
  for (size_t layer = 0; layer < blocks_.size(); ++layer) hold(layer);
}

void Sharding::idle_backward() {
  for (size_t layer = blocks_.size(); layer-- > 0;) hold(layer);
}

void Sharding::end_round() {
  if (!is_reducing_) return;
  const at::NoGradGuard no_grad;
  start_ready(true);
  for (const auto& unit : units_)
    if (unit->received.defined()) take_part(*unit);
  for (const auto& unit : units_) {
    if (!unit->wait) continue;
    unit->wait();
    if (!unit->sent.is_same(unit->own_gradient)) unit->own_gradient.copy_(unit->sent);
    unit->sent.reset();
    unit->wait = nullptr;
  }
  world_.wait_for_device();  // what comes next, a round's pictures or the loss, would do so unseen
}

double Sharding::hand_gradients_to(AdamW& optimizer) {
  const at::NoGradGuard no_grad;
  finish_gathers(kAllLayers);  // the update writes what others may still read
  std::vector<at::Tensor> norms;
  for (const auto& unit : units_) {
    // Those that hold the same part share the work.
    const int64_t share = unit->part / num_replicas_;
    norms.push_back(vector_norm(unit->own_gradient.narrow(0, replica_ * share, share)));
    for (const FlatUnit::Leaf& leaf : unit->leaves) {
      if (is_replicated()) {
        optimizer.set_gradient(leaf.owner, unit->of(unit->gradient, leaf));
        continue;
      }
      const auto [begin, count] = unit->owned_range(leaf, shard_);
      if (count > 0)
        optimizer.set_gradient(
            leaf.owner, unit->own_gradient.narrow(0, leaf.offset + begin - shard_ * unit->part, count));
    }
  }
  begins_step_ = true;
  return at::stack(norms).to(at::kDouble).square().sum().item<double>();
}

// In the order of the forward pass, the other way round than gradients are reduced.
void Sharding::begin_gather_weights() {
  if (is_replicated()) return;
  const at::NoGradGuard no_grad;
  finish_gathers(kAllLayers);
  for (auto unit = units_.rbegin(); unit != units_.rend(); ++unit)
    if (!(*unit)->is_freed)
      (*unit)->gathered = world_.all_gather((*unit)->weights, (*unit)->own_weights, sharers_);
}

// Waits for the weights of blocks up to `layer`, and of what lies outside of blocks.
void Sharding::finish_gathers(int64_t layer) {
  for (auto unit = units_.rbegin(); unit != units_.rend(); ++unit) {
    if ((*unit)->is_freed || (*unit)->layer > layer) continue;
    if (const Wait wait = std::exchange((*unit)->gathered, nullptr)) wait();
  }
}

StateList Sharding::gather_masters(const AdamW& optimizer) {
  const at::NoGradGuard no_grad;
  finish_gathers(kAllLayers);
  std::unordered_map<const at::Tensor*, at::Tensor> whole;
  for (const auto& unit : units_) {
    const at::Tensor own =
        at::zeros({unit->part}, unit->leaves.front().owner->options().dtype(at::kFloat).requires_grad(false));
    for (const FlatUnit::Leaf& leaf : unit->leaves) {
      const auto [begin, count] = unit->owned_range(leaf, shard_);
      if (count > 0)
        own.narrow(0, leaf.offset + begin - shard_ * unit->part, count).copy_(optimizer.master(leaf.owner));
    }
    const at::Tensor all = at::empty({unit->length}, own.options());
    world_.all_gather(all, own, sharers_)();
    world_.wait_for_device();
    if (!world_.is_first()) continue;
    const at::Tensor host = all.cpu();
    for (const FlatUnit::Leaf& leaf : unit->leaves) whole[leaf.owner] = unit->of(host, leaf);
  }
  StateList list;
  for (const ParameterGroup& group : optimizer.groups()) {
    for (const NamedTensor& tensor : group.tensors) {
      if (!world_.is_first()) break;
      const Master values{whole.at(tensor.owner), {}};
      list.emplace_back(tensor.name,
                        tensor.num_rows < 0 ? values : values.rows(tensor.row_begin, tensor.num_rows));
    }
  }
  return list;
}

}  // namespace caldera
