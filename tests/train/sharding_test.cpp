// Ranks as threads of one process: what each strategy computes, and what it sends.
#include "train/distributed/sharding.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>
#include <unistd.h>

#include <algorithm>
#include <array>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <future>
#include <thread>

#include "base/error.h"
#include "base/headway.h"
#include "base/rng.h"
#include "model/ops/ops.h"
#include "train/distributed/text_store.h"

namespace caldera {
namespace {

using testing::HasSubstr;

constexpr int64_t kWidth = 12, kLayers = 3, kRounds = 2;

// A projector and three blocks of which the middle one is frozen, as a model that Sharding can share out.
struct TinyModel {
  at::Tensor projector;
  std::vector<at::Tensor> matrices, biases;
  bool recomputes = false;
  std::function<std::shared_ptr<void>(size_t)> hold;

  TinyModel() {
    init(projector, "projector", {kWidth, kWidth});
    matrices.resize(kLayers);
    biases.resize(kLayers);
    for (size_t i = 0; i < kLayers; ++i) {
      init(matrices[i], fmt::format("matrix {}", i), {kWidth, kWidth});
      init(biases[i], fmt::format("bias {}", i), {kWidth});
      matrices[i].set_requires_grad(i != 1);
      biases[i].set_requires_grad(i != 1);
    }
    projector.set_requires_grad(true);
  }
  static void init(at::Tensor& tensor, const std::string& name, at::IntArrayRef shape) {
    tensor = at::empty(shape, at::kFloat);
    init_normal_(tensor, 0.3, 5, name);
  }
  NamedTensors decoder() {
    NamedTensors list;
    for (size_t i = 0; i < kLayers; ++i) {
      list.push_back({fmt::format("model.layers.{}.matrix", i), &matrices[i]});
      list.push_back({fmt::format("model.layers.{}.bias", i), &biases[i]});
    }
    return list;
  }
  std::vector<ParameterGroup> groups() {
    NamedTensors trained;
    for (const NamedTensor& tensor : decoder())
      if (tensor.owner->requires_grad()) trained.push_back(tensor);
    return {{"projector", 0.01, {{"multi_modal_projector.weight", &projector}}},
            {"language_model", 0.01, trained}};
  }
  at::Tensor loss(const at::Tensor& x_TD) const {
    at::Tensor x = at::linear(x_TD, projector);
    for (size_t i = 0; i < kLayers; ++i) {
      const auto run = [this, i](const at::Tensor& in, bool) {
        return in + at::linear(in, matrices[i], biases[i]).tanh();
      };
      const auto held = [this, i] { return hold ? hold(i) : nullptr; };
      if (recomputes) {
        x = recompute(run, x, {matrices[i], biases[i]}, held);
      } else {
        const std::shared_ptr<void> weights = held();
        x = run(x, true);
      }
    }
    return x.square().sum();
  }
};

at::Tensor rows_of(int64_t step, int64_t round, int rank) {
  at::Tensor rows = at::empty({4, kWidth}, at::kFloat);
  init_normal_(rows, 1, 9, fmt::format("{} {} {}", step, round, rank));
  return rows;
}
// The last rank has nothing in a step's second round, and the one before it no gradients.
bool has_rows(int64_t round, int rank, int size) { return round == 0 || rank + 1 < size; }

struct Result {
  StateList masters;
  std::vector<at::Tensor> weights;  // as the model has them at the end, in the masters' order
  std::vector<double> norms;
  int64_t num_collectives = 0, num_bytes = 0;  // of the last step
  int part = 0, num_parts = 0;
};

constexpr int64_t kSteps = 3;

Result train_alone(int size) {
  TinyModel model;
  AdamW optimizer(model.groups(), {});
  Result result;
  for (int64_t step = 0; step < kSteps; ++step) {
    for (int64_t round = 0; round < kRounds; ++round)
      for (int rank = 0; rank < size; ++rank)
        if (has_rows(round, rank, size)) model.loss(rows_of(step, round, rank)).backward();
    optimizer.take_gradients(false);
    result.norms.push_back(optimizer.grad_norm().item<double>());
    optimizer.step(1, 1);
  }
  result.masters = optimizer.masters();
  return result;
}

Result train_rank(World& world, const DistributedConfig& config, bool recomputes) {
  TinyModel model;
  Sharding sharding(world, config, model.groups(), model.decoder());
  model.recomputes = recomputes || sharding.frees_blocks();
  if (!sharding.is_replicated()) model.hold = [&](size_t layer) { return sharding.hold(layer); };
  AdamW optimizer(model.groups(), {}, sharding.owned());
  Result result{.part = sharding.part(), .num_parts = sharding.num_parts()};
  for (int64_t step = 0; step < kSteps; ++step) {
    const int64_t collectives = world.num_collectives(), bytes = world.num_bytes();
    for (int64_t round = 0; round < kRounds; ++round) {
      sharding.begin_round(round + 1 == kRounds);
      if (has_rows(round, world.rank(), world.size())) {
        model.loss(rows_of(step, round, world.rank())).backward();
      } else {
        sharding.idle_forward();
        sharding.idle_backward();
      }
      sharding.end_round();
    }
    const at::Tensor square = at::tensor({sharding.hand_gradients_to(optimizer)}, at::kDouble);
    optimizer.step(1, 1);
    sharding.begin_gather_weights();
    result.num_collectives = world.num_collectives() - collectives;
    result.num_bytes = world.num_bytes() - bytes;
    world.sum(square)();
    result.norms.push_back(std::sqrt(square.item<double>()));
  }
  sharding.hold_all();  // the last step's weights were on their way
  for (const ParameterGroup& group : model.groups())
    for (const NamedTensor& tensor : group.tensors) result.weights.push_back(tensor.value().clone());
  result.masters = sharding.is_replicated() ? optimizer.masters() : sharding.gather_masters(optimizer);
  return result;
}

// Of a run's ranks those that come to it; the last machine has what is left.
struct Ranks {
  int size, local_size;
  std::vector<int> who;
  double timeout_s = 20;
  std::string interface = "lo";
};

// Runs `work(world)` as each of them; what each threw.
template <class Work>
std::vector<std::exception_ptr> errors_of(const Ranks& ranks, const Work& work,
                                          const std::function<void(const StoreAddress&)>& before = {}) {
  ::setenv("GLOO_SOCKET_IFNAME", ranks.interface.c_str(), 1);
  ::setenv("RES_OPTIONS", "timeout:1 attempts:1", 1);  // c10d asks for each connection's name, for its log
  // c10d's record of collectives is one a process, and not made for groups of several threads.
  ::setenv("TORCH_FR_BUFFER_SIZE", "0", 1);
  StoreAddress address{.secret = run_secret()};
  const auto store = host_store(address, /*is_local=*/true, 20);
  if (before) before(address);
  std::vector<std::exception_ptr> errors(ranks.who.size());
  std::vector<std::thread> threads;
  for (size_t i = 0; i < ranks.who.size(); ++i) {
    threads.emplace_back([&, i, rank = ranks.who[i]] {
      const int local_size = ranks.local_size;
      try {
        World world({.rank = rank,
                     .size = ranks.size,
                     .local_rank = rank % local_size,
                     .local_size = std::min(local_size, ranks.size - rank / local_size * local_size),
                     .port = address.port,
                     .store_is_hosted = true,
                     .started_by = "a test"},
                    at::kCPU, ranks.timeout_s, [](const std::string&) {});
        work(world);
      } catch (const std::exception&) {
        errors[i] = std::current_exception();
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return errors;
}

std::string message_of(const std::exception_ptr& error) {
  try {
    if (error) std::rethrow_exception(error);
  } catch (const std::exception& thrown) {
    return thrown.what();
  }
  return "";
}

// Runs `work` as each of `size` ranks, of which `local_size` share a machine. Throws what the first rank
// threw.
template <class Work>
std::vector<std::invoke_result_t<Work, World&>> as_ranks(int size, int local_size, const Work& work,
                                                         double timeout_s = 20) {
  std::vector<std::invoke_result_t<Work, World&>> results(static_cast<size_t>(size));
  Ranks ranks{.size = size, .local_size = local_size, .who = {}, .timeout_s = timeout_s};
  for (int rank = 0; rank < size; ++rank) ranks.who.push_back(rank);
  const auto run = [&](World& world) { results[static_cast<size_t>(world.rank())] = work(world); };
  for (const std::exception_ptr& error : errors_of(ranks, run))
    if (error) std::rethrow_exception(error);
  return results;
}

struct ShardingCase {
  std::string strategy, within;
  int size, local_size;
  bool recomputes = false;
};

class ShardingTest : public testing::TestWithParam<ShardingCase> {};

TEST_P(ShardingTest, ComputesWhatOneRankDoesAndSendsWhatItSays) {
  const ShardingCase& c = GetParam();
  const Result expected = train_alone(c.size);
  const std::vector<Result> results = as_ranks(c.size, c.local_size, [&](World& world) {
    return train_rank(world, {.strategy = c.strategy, .shard_within = c.within}, c.recomputes);
  });
  ASSERT_EQ(results[0].masters.size(), expected.masters.size());
  for (size_t i = 0; i < expected.masters.size(); ++i) {
    EXPECT_EQ(results[0].masters[i].first, expected.masters[i].first);
    EXPECT_TRUE(at::allclose(results[0].masters[i].second.values(), expected.masters[i].second.values(), 1e-5, 1e-6)) << i;
    for (const Result& result : results)
      EXPECT_TRUE(at::equal(result.weights[i], results[0].masters[i].second.values())) << i;
  }
  for (const Result& result : results) {
    EXPECT_EQ(result.norms, results[0].norms) << "the same bits on every rank";
    for (size_t i = 0; i < expected.norms.size(); ++i)
      EXPECT_NEAR(result.norms[i], expected.norms[i], 1e-5 * expected.norms[i]);
  }

  // Of the flat buffers: a tensor takes a multiple of 256 numbers, a buffer a multiple of that for each rank.
  const auto padded = [&](int64_t num_tensors) { return (num_tensors + c.size - 1) / c.size * c.size * 256; };
  const int64_t block = padded(2), projector = padded(1), trained = 2 * block + projector;
  const bool is_ddp = c.strategy == "ddp";
  const bool in_nodes = c.within == "node" && c.local_size < c.size;
  const int64_t shards = is_ddp ? 1 : in_nodes ? c.local_size : c.size, replicas = c.size / shards;
  const int64_t reduce_rounds = c.strategy == "zero2" || c.strategy == "zero3" ? kRounds : 1;
  int64_t collectives = 0, numbers = 0;
  if (shards > 1) {  // reduce-scatter of the whole gradients
    collectives += 3 * reduce_rounds;
    numbers += trained * reduce_rounds;
  }
  if (replicas > 1) {  // the sum of the parts, once a step
    collectives += 3;
    numbers += trained / shards;
  }
  if (c.strategy == "zero1" || c.strategy == "zero2") {  // the new weights
    collectives += 3;
    numbers += trained;
  }
  if (c.strategy == "zero3") {  // each block twice a round; the projector once
    collectives += 2 * kLayers * kRounds + 1;
    numbers += 2 * kLayers * block * kRounds + projector;
  }
  for (size_t rank = 0; rank < results.size(); ++rank) {
    EXPECT_EQ(results[rank].num_collectives, collectives) << rank;
    EXPECT_EQ(results[rank].num_bytes, 4 * numbers) << rank;
    EXPECT_EQ(results[rank].num_parts, shards);
    const auto r = static_cast<int>(rank);
    EXPECT_EQ(results[rank].part, r < shards ? r : -1) << "each part is saved once";
  }
}

INSTANTIATE_TEST_SUITE_P(All, ShardingTest,
                         testing::Values(ShardingCase{"ddp", "world", 2, 2}, ShardingCase{"ddp", "world", 4, 2},
                                         ShardingCase{"zero1", "world", 3, 3}, ShardingCase{"zero2", "world", 2, 2},
                                         ShardingCase{"zero3", "world", 2, 2}, ShardingCase{"zero3", "world", 4, 2},
                                         ShardingCase{"zero1", "node", 4, 2}, ShardingCase{"zero2", "node", 4, 2},
                                         ShardingCase{"zero3", "node", 4, 2}, ShardingCase{"zero3", "node", 6, 2},
                                         ShardingCase{"zero2", "node", 2, 2}, ShardingCase{"zero1", "world", 3, 3, true},
                                         ShardingCase{"zero2", "node", 4, 2, true}),
                         [](const testing::TestParamInfo<ShardingCase>& parameter) {
                           const ShardingCase& c = parameter.param;
                           return fmt::format("{}_{}_{}_of_{}{}", c.strategy, c.within, c.local_size, c.size,
                                              c.recomputes ? "_recomputing" : "");
                         });

TEST(Sharding, TheNextBlockIsOnItsWayWhileOneIsHeld) {
  as_ranks(2, 2, [&](World& world) {
    TinyModel model;
    Sharding sharding(world, {.strategy = "zero3"}, model.groups(), model.decoder());
    auto begun = [&, last = world.num_collectives()]() mutable {
      return world.num_collectives() - std::exchange(last, world.num_collectives());
    };
    const auto is_there = [&](size_t layer) { return model.matrices[layer].storage().nbytes() > 0; };
    sharding.begin_round(/*is_last=*/false);
    for (const bool forward : {true, false}) {
      for (size_t i = 0; i < kLayers; ++i) {
        const size_t layer = forward ? i : kLayers - 1 - i;
        const auto weights = sharding.hold(layer);
        // The first hold asks for two blocks, the last for none; the second of the backward pass also reduces
        // what is behind it.
        const int64_t gathers = i == 0 ? 2 : i + 1 < kLayers ? 1 : 0;
        EXPECT_EQ(begun(), gathers + (forward || i == 0 ? 0 : layer == 1 ? 1 : 0)) << forward << layer;
        TinyModel fresh;
        EXPECT_TRUE(at::equal(model.matrices[layer], fresh.matrices[layer]));
        for (size_t other = 0; other < kLayers; ++other)
          EXPECT_EQ(is_there(other),
                    other == layer || (i + 1 < kLayers && other == (forward ? layer + 1 : layer - 1)));
      }
      for (size_t layer = 0; layer < kLayers; ++layer) EXPECT_FALSE(is_there(layer));
    }
    sharding.end_round();
    return 0;
  });
}

TEST(World, ABrokenConnectionIsAnErrorAndNoSignal) {
  std::signal(SIGPIPE, SIG_DFL);
  as_ranks(2, 2, [](World& world) {
    std::array<int, 2> ends{};
    EXPECT_EQ(::pipe(ends.data()), 0);
    ::close(ends[0]);
    EXPECT_EQ(::write(ends[1], "x", 1), -1) << "rank " << world.rank();  // the signal would end the test here
    EXPECT_EQ(errno, EPIPE);
    ::close(ends[1]);
    return 0;
  });
}

TEST(World, MachinesOfUnevenNumbersOfRanksCannotShareWithin) {
  const auto share = [] {
    as_ranks(3, 2, [](World& world) {
      TinyModel model;
      const Sharding sharding(world, {.strategy = "zero2", .shard_within = "node"}, model.groups(), model.decoder());
      return 0;
    });
  };
  EXPECT_THAT(share,
              testing::ThrowsMessage<ConfigError>(HasSubstr("the local ranks 0 of 2, 1 of 2, 0 of 1")));
}

// With a time-out of 3 s. What nobody waits for may take longer, and so may what makes headway.
TEST(World, ARankIsStuckFromWhenOthersWaitForIt) {
  const auto run = [] {
    as_ranks(
        3, 3,
        [](World& world) {
          const auto think = [&](int64_t step, int ms) {
            world.at(step, "thinking");
            std::this_thread::sleep_for(std::chrono::milliseconds(ms));
          };
          for (int i = 0; world.is_first() && i < 45; ++i) {  // as one that reads a file
            std::this_thread::sleep_for(std::chrono::milliseconds(100));
            note_headway();
          }
          world.from_first("");
          think(2, world.rank() == 1 ? 5000 : 3500);
          world.exchange("main", "");
          think(3, world.rank() == 1 ? 6000 : 0);
          world.exchange("main", "");
          return 0;
        },
        /*timeout_s=*/3);
  };
  EXPECT_THAT(run, testing::ThrowsMessage<PeerError>(
                       HasSubstr("rank 1 is stuck: for 3 s at step 3, thinking, while others have to wait")));
}

// On the training thread or beside it. The others' training goes on meanwhile, or waits, too.
TEST(World, ARankThatHangsWhileSavingIsStuckThere) {
  for (const bool in_background : {false, true}) {
    std::promise<void> over;
    const std::shared_future<void> is_over = over.get_future().share();
    const auto save = [&](World& world) {
      const SavingLane lane(world, 12);
      if (world.rank() == 1) return is_over.wait();
      world.exchange("save", "");
    };
    const auto errors =
        errors_of({.size = 3, .local_size = 3, .who = {0, 1, 2}, .timeout_s = 2}, [&](World& world) {
          world.at(12, "saving a checkpoint");
          try {
            if (in_background)
              std::async(std::launch::async, save, std::ref(world)).get();
            else
              save(world);
          } catch (const PeerError&) {
            if (world.is_first()) over.set_value();
            throw;
          }
        });
    EXPECT_EQ(errors[1], nullptr);
    for (const size_t r : {0, 2})
      EXPECT_THAT(message_of(errors[r]),
                  testing::AllOf(HasSubstr("rank 1 is stuck: for"),
                                 HasSubstr("s at step 12, saving a checkpoint, while others have to wait")));
  }
}

TEST(World, NamesTheMachinesWhereThereAreSeveral) {
  const auto names = as_ranks(2, 1, [](World& world) { return world.who(1) + " of " + world.hosts().at(1); });
  const std::string host = names[0].substr(names[0].find(" of ") + 4);
  EXPECT_EQ(names[0], "rank 1 (" + host + ") of " + host);
  EXPECT_EQ(as_ranks(2, 2, [](World& world) { return world.who(1); }).front(), "rank 1");
}

TEST(World, RanksThatDoNotComeAreNamedByAll) {
  const auto nothing = [](World&) {};
  for (const auto& error : errors_of({.size = 4, .local_size = 4, .who = {0, 2}, .timeout_s = 1}, nothing))
    EXPECT_EQ(message_of(error),
              "only 2 of 4 ranks have come within 1 s: ranks 1, 3 are missing; start them, or give them more "
              "time (distributed.timeout_s)");
  for (const auto& error : errors_of({.size = 3, .local_size = 3, .who = {1, 2}, .timeout_s = 1}, nothing))
    EXPECT_THAT(message_of(error), HasSubstr("rank 0 has not come within that time; start it"));
}

TEST(World, AFailureEndsTheJoiningOfAll) {
  const std::string failure = "rank 1 (node1) failed at step 0, joining: no such interface";
  const auto tell = [&](const StoreAddress& address) {
    connect_store(address, "caldera/0", 5)->set("failure", failure);
  };
  for (const auto& error : errors_of(
           {.size = 3, .local_size = 3, .who = {0, 2}}, [](World&) {}, tell))
    EXPECT_EQ(message_of(error), failure);
  for (const auto& error :
       errors_of({.size = 2, .local_size = 1, .who = {0, 1}, .interface = "nosuch0"}, [](World&) {}))
    EXPECT_THAT(message_of(error),
                testing::AllOf(HasSubstr("join"), HasSubstr("(GLOO_SOCKET_IFNAME=nosuch0)"),
                               HasSubstr("set GLOO_SOCKET_IFNAME to the interface")));
}

TEST(World, ARankWithAnotherSecretIsNotHeard) {
  ::setenv("CALDERA_RUN_SECRET", "this run's", 1);
  const auto stranger = [](const StoreAddress& address) {
    connect_store({address.host, address.port, "another"}, "caldera/0", 5)->set("join/1", "{}");
  };
  const auto errors = errors_of(
      {.size = 2, .local_size = 2, .who = {0}, .timeout_s = 1}, [](World&) {}, stranger);
  ::unsetenv("CALDERA_RUN_SECRET");
  EXPECT_THAT(message_of(errors[0]),
              testing::AllOf(HasSubstr("rank 1 is missing"), HasSubstr("is CALDERA_RUN_SECRET the same")));
}

TEST(World, CollectivesAmongAMachineAndAmongPeers) {
  const auto results = as_ranks(4, 2, [](World& world) {
    world.split_by_machine();
    world.split_by_machine();  // a second stage asks again
    const at::Tensor machine = at::tensor({1 << world.rank()}), peers = machine.clone(),
                     all = machine.clone();
    world.sum(machine, Among::kMachine)();
    world.sum(peers, Among::kPeers)();
    world.sum(all)();
    return std::vector<int>{machine.item<int>(), peers.item<int>(), all.item<int>()};
  });
  EXPECT_EQ(results, (std::vector<std::vector<int>>{{3, 5, 15}, {3, 10, 15}, {12, 5, 15}, {12, 10, 15}}));
}

}  // namespace
}  // namespace caldera
