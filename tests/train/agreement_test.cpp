// Ranks as threads of one process that were given different things: every one of them says the same.
#include "train/agreement.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>
#include <stdlib.h>

#include <thread>

#include "tests/train/tiny_run.h"
#include "train/distributed/text_store.h"

namespace caldera {
namespace {

using testing::AllOf;
using testing::HasSubstr;
using testing::Not;

// What a rank ended with: its error's message and exit code, and whether it belongs to all.
struct Ending {
  std::string message;
  int exit_code = 0;
  bool is_thrown_by_all = false;
};

// Runs `work` as each of `size` ranks of one machine.
std::vector<Ending> endings_of(int size, const std::function<void(World&)>& work) {
  ::setenv("GLOO_SOCKET_IFNAME", "lo", 1);
  ::setenv("RES_OPTIONS", "timeout:1 attempts:1", 1);  // c10d asks for each connection's name, for its log
  // c10d's record of collectives is one a process, and not made for groups of several threads.
  ::setenv("TORCH_FR_BUFFER_SIZE", "0", 1);
  StoreAddress address;
  const auto store = host_store(address, /*is_local=*/true, 20);
  std::vector<Ending> endings(static_cast<size_t>(size));
  std::vector<std::thread> threads;
  for (int rank = 0; rank < size; ++rank) {
    threads.emplace_back([&, rank] {
      WorldSpec spec;
      spec.rank = spec.local_rank = rank;
      spec.size = spec.local_size = size;
      spec.port = address.port;
      spec.store_is_hosted = true;
      spec.started_by = "a test";
      Ending& ending = endings[static_cast<size_t>(rank)];
      try {
        World world(spec, at::kCPU, 20, [](const std::string& message) { throw Error(message); });
        work(world);
      } catch (const Error& error) {
        ending = {error.what(), error.exit_code(), dynamic_cast<const ThrownByAll*>(&error) != nullptr};
      }
    });
  }
  for (std::thread& thread : threads) thread.join();
  return endings;
}

// All ended alike; returns how.
Ending common_ending(const std::vector<Ending>& endings) {
  for (const Ending& ending : endings) {
    EXPECT_EQ(ending.message, endings[0].message);
    EXPECT_EQ(ending.exit_code, endings[0].exit_code);
    EXPECT_EQ(ending.is_thrown_by_all, !ending.message.empty()) << ending.message;
  }
  return endings[0];
}

class AgreementTest : public testing::Test {
 protected:
  void SetUp() override { write_tiny_run(folder_.path()); }

  Recipe recipe() const { return six_step_recipe(folder_.path(), "out"); }
  // Ranks whose recipe is `change`d by their number.
  Ending compare(const std::function<void(int, Recipe&)>& change, int size = 3) const {
    return common_ending(endings_of(size, [&](World& world) {
      Recipe mine = recipe();
      change(world.rank(), mine);
      agree_on_recipe(world, mine, {});
    }));
  }
  StageData data_of(const fs::path& file, const fs::path& tokenizer) const {
    StageData data;
    data.records = std::make_shared<const std::vector<Record>>(read_records(file));
    data.format.tokenizer = load_tokenizer(tokenizer);
    data.format.conversation = &find_template("v1");
    return data;
  }

  TemporaryFolder folder_;
};

TEST_F(AgreementTest, EqualRecipesAgreeWhereverTheirFilesLie) {
  EXPECT_EQ(compare([](int rank, Recipe& mine) {
              for (std::string* path : {&mine.model.vision_tower, &mine.model.language_model,
                                        &mine.stages[0].data.data_path, &mine.stages[0].data.image_folder})
                *path = fmt::format("/scratch{}/{}", rank, *path);
            }).message,
            "");
}

TEST_F(AgreementTest, ADifferingRecipeIsNamedByKeyAndRank) {
  const Ending ending = compare([](int rank, Recipe& mine) {
    if (rank == 2) mine.stages[0].optimizer.learning_rate = 0.002;
  });
  EXPECT_THAT(ending.message, AllOf(HasSubstr("the ranks have different recipes: "
                                              "stages.finetune.optimizer.learning_rate is 0.01 on rank 0"),
                                    HasSubstr(" and 0.002 on rank 2"), Not(HasSubstr("rank 1"))));
  EXPECT_EQ(ending.exit_code, 2);
}

TEST_F(AgreementTest, TheFirstFiveDifferencesAreSaid) {
  const auto change = [](int rank, Recipe& mine) {
    if (rank == 0) return;
    mine.seed = 5;
    mine.device = "auto";
    mine.output = "elsewhere";
    mine.stages[0].trainable = {"projector"};
    mine.stages[0].data.eval_data_path = "given.json";
    mine.stages[0].max_steps = 7;
    mine.stages[0].dtype = "auto";
  };
  const std::string message = compare(change).message;
  EXPECT_THAT(message, AllOf(HasSubstr("stages.finetune.trainable is ["), HasSubstr("language_model"),
                             HasSubstr("stages.finetune.data.eval_data_path is \"\" on rank 0"),
                             HasSubstr("and a path on rank 1"), HasSubstr("(and differs on 1 more)"),
                             HasSubstr("; and 2 more")));
}

TEST_F(AgreementTest, StagesThatOnlySomeHaveAreDifferences) {
  const Ending ending = compare([](int rank, Recipe& mine) {
    if (rank == 1) mine.stages[0].name = "pretrain";
  });
  EXPECT_THAT(ending.message,
              AllOf(HasSubstr("stages.finetune.name is "), HasSubstr("and nothing on rank 1")));
}

TEST_F(AgreementTest, OptionsAndTheProgramAreCompared) {
  const Ending ending = common_ending(endings_of(2, [&](World& world) {
    RunOptions options;
    options.version = fmt::format("caldera 0.{}", world.rank());
    options.only_stage = world.rank() == 0 ? "" : "finetune";
    agree_on_recipe(world, recipe(), options);
  }));
  EXPECT_THAT(ending.message,
              AllOf(HasSubstr("the program is caldera 0.0 on rank 0"), HasSubstr("and caldera 0.1 on rank 1"),
                    HasSubstr("--stage is \"\" on rank 0")));
}

// A dtype that some ranks have yet to be told would leave them in step with nobody.
TEST_F(AgreementTest, RecipesAreComparedBeforeDtypesAreChosen) {
  const Ending ending = common_ending(endings_of(2, [&](World& world) {
    Recipe mine = recipe();
    if (world.rank() == 1) mine.stages[0].dtype = "auto";
    choose_dtypes(mine, {.world = &world});
  }));
  EXPECT_THAT(ending.message, HasSubstr("stages.finetune.dtype is "));
}

TEST_F(AgreementTest, DataIsComparedByWhatIsReadOfIt) {
  const fs::path data = folder_.path() / "test.json", other = folder_.path() / "other.json";
  const fs::path tokenizer = folder_.path() / "parts/language";
  const auto compare_data = [&] {
    return common_ending(endings_of(3, [&](World& world) {
      agree_on_data(world, recipe().stages[0], data_of(world.rank() == 2 ? other : data, tokenizer));
    }));
  };
  Json records = read_json(data);
  write_file_atomic(other, records.dump());  // the same, laid out otherwise
  EXPECT_EQ(compare_data().message, "");
  records[1]["conversations"][1]["value"] = "no";
  write_json(other, records);
  const Ending ending = compare_data();
  EXPECT_THAT(ending.message,
              AllOf(HasSubstr("the ranks have different data: stages.finetune.data.data_path has 4 "
                              "records (XXH3 "),
                    HasSubstr("on rank 2")));
  EXPECT_EQ(ending.exit_code, 3);
  records.erase(1);
  write_json(other, records);
  EXPECT_THAT(compare_data().message, AllOf(HasSubstr("has 4 records"), HasSubstr("and 3 records")));
}

TEST_F(AgreementTest, TokenizersAreComparedByWhatTheyMake) {
  const fs::path tokenizer = folder_.path() / "parts/language", other = folder_.path() / "tokenizer";
  fs::create_directories(other);
  write_byte_tokenizer(other);
  Json json = read_json(other / "tokenizer.json");
  std::swap(json["model"]["vocab"]["e"], json["model"]["vocab"]["o"]);
  write_json(other / "tokenizer.json", json);
  const Ending ending = common_ending(endings_of(2, [&](World& world) {
    agree_on_data(world, recipe().stages[0],
                  data_of(folder_.path() / "test.json", world.rank() == 1 ? other : tokenizer));
  }));
  EXPECT_THAT(ending.message,
              AllOf(HasSubstr("the ranks have different tokenizers: the tokenizer has 259 tokens"),
                    HasSubstr("on rank 1")));
  EXPECT_EQ(ending.exit_code, 4);
}

TEST_F(AgreementTest, ASingleOtherWeightIsFound) {
  const auto compare_weights = [&](const std::string& component) {
    return common_ending(endings_of(2, [&](World& world) {
      const auto model = build_llava(build_spec_of(recipe(), 0));
      if (world.rank() == 1 && !component.empty())
        model->component_tensors(component).back().value().view(-1)[0] += 1;
      agree_on_weights(world, *model, std::nullopt);
    }));
  };
  EXPECT_EQ(compare_weights("").message, "");
  for (const char* component : {"vision_tower", "projector", "language_model"}) {
    const Ending ending = compare_weights(component);
    EXPECT_THAT(ending.message,
                AllOf(HasSubstr(fmt::format("the ranks have different weights: {} has XXH3 ", component)),
                      HasSubstr("on rank 1")));
    EXPECT_EQ(ending.exit_code, 4);
  }
}

TEST_F(AgreementTest, ACheckpointIsComparedByItsManifest) {
  const Ending ending = common_ending(endings_of(2, [&](World& world) {
    const auto model = build_llava(build_spec_of(recipe(), 0));
    // What machines with disks of their own would have at the same place.
    const fs::path folder = folder_.path() / fmt::format("rank-{}", world.rank());
    fs::create_directories(folder);
    write_file_atomic(folder / "manifest.json", fmt::format("of rank {}", world.rank()));
    agree_on_weights(world, *model, folder);
  }));
  EXPECT_THAT(ending.message, HasSubstr("different weights: the checkpoint's manifest.json has XXH3 "));
}

// A whole run, in which the error of all stays what it is.
TEST_F(AgreementTest, ARunStopsBeforeItLeavesAnything) {
  const Recipe plain = recipe();
  const Ending ending = common_ending(endings_of(2, [&](World& world) {
    Recipe mine = plain;
    if (world.rank() == 1) mine.stages[0].data.data_path = (folder_.path() / "other.json").string();
    if (world.rank() == 1) {
      Json records = read_json(folder_.path() / "test.json");
      records.erase(3);
      write_json(mine.stages[0].data.data_path, records);
    }
    TrainingObserver observer;
    run_recipe(mine, {.world = &world}, observer, [] { return 0; });
  }));
  EXPECT_THAT(ending.message, HasSubstr("the ranks have different data"));
  EXPECT_EQ(ending.exit_code, 3);
  EXPECT_FALSE(fs::exists(plain.output));
}

}  // namespace
}  // namespace caldera
