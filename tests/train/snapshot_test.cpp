#include "tests/aten.h"
#include "train/snapshot.h"

#include <gtest/gtest.h>

#include <chrono>
#include <thread>

#include "tests/model/operations.h"
#include "tests/support.h"
#include "train/checkpoint.h"

namespace caldera {
namespace {

// A float32 weight, a bfloat16 one in halves with the values 2, and codes of 8 bits.
StateList three(at::DeviceType device = at::kCPU) {
  const auto on = [&](at::ScalarType dtype) { return at::TensorOptions(device).dtype(dtype); };
  const Master halves = Master::of(at::empty({4, 8}, on(at::kBFloat16)));
  halves.assign(at::full({4, 8}, 2.0 + 1e-4));
  return {{"whole", Master::of(at::full({5}, 1.0, on(at::kFloat)))},
          {"halves", halves},
          {"codes", Master::of(at::full({7}, 3, on(at::kByte)))}};
}
void change(const StateList& state) {
  for (const auto& [name, master] : state) master.assign(at::full_like(master.values(), 9));
}

class Snapshots : public testing::TestWithParam<at::DeviceType> {};

TEST_P(Snapshots, AreTheStateAsItWasWhenTheyWereTaken) {
  if (GetParam() == at::kCUDA && !has_gpu()) GTEST_SKIP() << "no GPU here (or a build without CUDA)";
  const StateList expected = three();
  for (size_t num_read_before = 0; num_read_before <= expected.size(); ++num_read_before) {
    const StateList state = three(GetParam());
    Snapshot snapshot(state, /*may_change=*/true);
    const std::vector<TensorToWrite> tensors = snapshot.tensors();
    ASSERT_EQ(tensors.size(), expected.size());
    std::vector<at::Tensor> read;
    for (size_t i = 0; i < tensors.size(); ++i) {
      if (i == num_read_before) {
        snapshot.copy_the_rest();
        change(state);
      }
      read.push_back(tensors[i].read());
    }
    change(state);
    for (size_t i = 0; i < tensors.size(); ++i) {
      EXPECT_TRUE(read[i].is_cpu());
      EXPECT_EQ(tensors[i].name, expected[i].first);
      EXPECT_EQ(tensors[i].type, read[i].scalar_type());
      EXPECT_EQ(tensors[i].shape, read[i].sizes().vec());
      EXPECT_TRUE(at::equal(read[i], expected[i].second.values())) << num_read_before << tensors[i].name;
    }
  }
}

INSTANTIATE_TEST_SUITE_P(, Snapshots, testing::Values(at::kCPU, at::kCUDA));

TEST(Snapshot, CopiesNothingOfWhatNobodyChanges) {
  const StateList state = three();
  Snapshot snapshot(state, /*may_change=*/false);
  const std::vector<TensorToWrite> tensors = snapshot.tensors();
  snapshot.copy_the_rest();
  EXPECT_TRUE(tensors[0].read().is_alias_of(state[0].second.weight));
  EXPECT_TRUE(tensors[2].read().is_alias_of(state[2].second.weight));
}

// Wherever in the writing the update comes: the files hold the state before it.
TEST(Snapshot, AnUpdateBesideTheWriterIsNotInTheCheckpoint) {
  const TemporaryFolder folder;
  constexpr int kTensors = 64;
  StateList masters, moments;
  for (int i = 0; i < kTensors; ++i) {
    masters.emplace_back(fmt::format("w{}", i), Master::of(at::empty({1 << 16})));
    moments.emplace_back(fmt::format("exp_avg.w{}", i), Master::of(at::empty({1 << 16})));
  }
  const auto set_all = [&](double value) {
    for (const StateList* list : {&masters, &moments})
      for (const auto& [name, state] : *list) state.weight.fill_(value);
  };
  CheckpointWriter writer(folder.path(), {.save_total_limit = 1}, /*in_background=*/true, World::alone());
  for (int step = 1; step <= 12; ++step) {
    set_all(step);
    CheckpointShare share;
    share.state.step = step;
    share.state.caldera = Json::object();
    share.masters = masters;
    share.moments = moments;
    writer.save(std::move(share));
    std::this_thread::sleep_for(std::chrono::milliseconds(4 * (step - 1)));
    writer.before_update(step + 1);
    set_all(-1);
    const fs::path written = writer.finish().value();
    for (const char* file : {"model.safetensors", "optimizer.safetensors"}) {
      const auto source = open_safetensors(written / file);
      for (const std::string& name : source->names())
        ASSERT_TRUE(at::equal(source->read(name), at::full({1 << 16}, static_cast<double>(step)))) << name << " of " << step;
    }
  }
}

}  // namespace
}  // namespace caldera
