// Who is to blame when ranks wait, by heartbeats at times of the test's own; and what a watch does of which
// it hears.
#include "train/distributed/watch.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <future>
#include <limits>
#include <map>

#include "base/error.h"
#include "train/distributed/backend.h"
#include "train/distributed/packed_texts.h"

namespace caldera {
namespace {

using testing::HasSubstr;
using enum LaneState;

struct FakeRank {
  LaneState training = kWorking, saving = kOff;
  int64_t place = 0, saved = 0, beat = 0;
  bool done = false;

  std::string text(size_t rank) const {
    return json_line({{"beat", beat},
                      {"host", fmt::format("node{}", rank)},
                      {"step", 12},
                      {"phase", "backward"},
                      {"place", place},
                      {"state", static_cast<int>(training)},
                      {"done", done},
                      {"saving",
                       {{"step", 11},
                        {"phase", "saving a checkpoint"},
                        {"place", saved},
                        {"state", static_cast<int>(saving)}}}});
  }
};

// A judge with a time-out of 10 s who looks at ranks twice a second.
class JudgeTest : public testing::Test {
 protected:
  // What it says within so many seconds; "" if nothing. `live` is called before each look.
  std::string say(
      double seconds, const std::function<void()>& live = [] {}) {
    for (double t = 0; t < seconds; t += 0.5) {
      std::vector<std::string> beats;
      live();
      for (size_t r = 0; r < ranks.size(); ++r) {
        if (r != silent) ++ranks[r].beat;
        beats.push_back(ranks[r].text(r));
      }
      if (const auto verdict = judge.look(beats, 0.5)) return *verdict;
    }
    return "";
  }
  Judge judge{10};
  std::vector<FakeRank> ranks = std::vector<FakeRank>(3);
  size_t silent = std::numeric_limits<size_t>::max();
};

TEST_F(JudgeTest, ARankWithoutHeartbeatsIsNamed) {
  silent = 1;
  EXPECT_EQ(say(10), "");
  EXPECT_THAT(
      say(1),
      HasSubstr("rank 1 (node1) has given no sign of life for 10 s (stopped or dead), last at step 12, "
                "backward\nwhere each rank is:\n  rank 0 (node0): step 12, backward, no headway for"));
}

TEST_F(JudgeTest, ARankThatIsDoneIsNotMissed) {
  silent = 1;
  ranks[1].done = true;
  ranks[0].training = kWaiting;
  EXPECT_EQ(say(30, [this] { ++ranks[2].place; }), "");
}

TEST_F(JudgeTest, WithoutHeadwayARankIsStuckFromWhenAnotherWaits) {
  const auto others = [this] { ++ranks[2].place; };
  EXPECT_EQ(say(60, others), "");
  ranks[0].training = kWaiting;
  EXPECT_EQ(say(10, others), "");
  EXPECT_THAT(say(1, others),
              HasSubstr("rank 1 (node1) is stuck: for 10 s at step 12, backward, while another has to wait"));
}

TEST_F(JudgeTest, HeadwayCountsHoweverLongOthersWait) {
  ranks[0].training = ranks[2].training = kWaiting;
  EXPECT_EQ(say(60, [this] { ++ranks[1].place; }), "");
  EXPECT_THAT(say(11), HasSubstr("while others have to wait"));
}

// Each rank trains on, and rank 1 hangs while it saves.
TEST_F(JudgeTest, TheSavingLaneIsJudgedBesideTheTraining) {
  const auto train = [this] {
    for (FakeRank& rank : ranks) ++rank.place;
  };
  ranks[0].saving = ranks[2].saving = kWaiting;
  ranks[1].saving = kWorking;
  EXPECT_EQ(say(60, [&] { train(), ++ranks[1].saved; }), "");
  EXPECT_THAT(say(11, train),
              HasSubstr("rank 1 (node1) is stuck: for 10 s at step 11, saving a checkpoint, while others "
                        "have to wait"));
}

TEST_F(JudgeTest, WhoHasYetToComeToTheSaveIsJudgedByItsTraining) {
  ranks[0].saving = kWaiting;
  EXPECT_EQ(say(60, [&] { ++ranks[1].place, ++ranks[2].place; }), "");
  ranks[1].training = kWaiting;  // and it waits itself, for rank 2 maybe
  const auto others = [&] { ++ranks[0].place, ++ranks[2].place; };
  EXPECT_EQ(say(60, others), "");
  ranks[1].training = kWorking;
  ++ranks[1].place;
  EXPECT_THAT(say(11, others), HasSubstr("rank 1 (node1) is stuck: for 10 s at step 12, backward"));
}

// The training lane is off: nobody waits there, and nobody is to blame there.
TEST_F(JudgeTest, ATrainingThreadThatSavesIsJudgedThere) {
  for (FakeRank& rank : ranks) rank.training = kOff, rank.saving = kWaiting;
  EXPECT_EQ(say(60), "");
  ranks[2].saving = kWorking;
  ++ranks[2].saved;
  EXPECT_THAT(say(11), HasSubstr("rank 2 (node2) is stuck: for 10 s at step 11, saving a checkpoint"));
}

TEST_F(JudgeTest, ThoseWhoGoOnAfterASaveWaitForOneWhoIsStillInIt) {
  ranks[0].training = ranks[2].training = kWaiting;
  ranks[1].training = kOff;
  ranks[1].saving = kWorking;
  EXPECT_EQ(say(60, [&] { ++ranks[1].saved; }), "");
  EXPECT_THAT(say(11), HasSubstr("rank 1 (node1) is stuck: for 10 s at step 11, saving a checkpoint"));
}

TEST_F(JudgeTest, APauseOfItsOwnIsNobodysFault) {
  say(1);
  std::vector<std::string> beats;
  for (size_t r = 0; r < ranks.size(); ++r) beats.push_back(ranks[r].text(r));
  EXPECT_EQ(judge.look(beats, 3600), std::nullopt);
}

TEST(Judge, TakesNoHarmFromNonsense) {
  Judge judge(1);
  for (const char* text :
       {"", "[]", "7", "{\"saving\": 3, \"step\": \"x\", \"host\": 1, \"done\": {}, \"state\": -4}"})
    EXPECT_EQ(judge.look({text, ""}, 0.5), std::nullopt) << text;
}

// What a store holds, and how it fails.
struct FakeKeys {
  std::mutex mutex;
  std::condition_variable changed;
  std::map<std::string, std::string> values;
  std::exception_ptr error;

  std::optional<std::string> find(const std::string& key) {
    const auto found = values.find(key);
    return found != values.end() ? std::optional(found->second) : std::nullopt;
  }
  void put(const std::string& key, const std::string& value) {
    const std::lock_guard lock(mutex);
    values[key] = value;
    changed.notify_all();
  }
  void fail(std::exception_ptr with) {
    const std::lock_guard lock(mutex);
    error = std::move(with);
  }
  // The key's value once it is as asked for.
  std::string wait_for(const std::string& key, const std::function<bool(const std::string&)>& is_it) {
    std::unique_lock lock(mutex);
    EXPECT_TRUE(changed.wait_for(lock, std::chrono::seconds(20), [&] {
      return find(key) && is_it(*find(key));
    })) << key;
    return find(key).value_or("");
  }
};

class FakeStore : public TextStore {
 public:
  explicit FakeStore(std::shared_ptr<FakeKeys> keys) : keys_(std::move(keys)) {}
  void set(const std::string& key, const std::string& value) override {
    const auto lock = enter();
    keys_->values[key] = value;
    keys_->changed.notify_all();
  }
  std::optional<std::string> find(const std::string& key) override {
    const auto lock = enter();
    return keys_->find(key);
  }
  std::vector<std::string> get_all(const std::vector<std::string>& keys) override {
    const auto lock = enter();
    std::vector<std::string> values;
    for (const std::string& key : keys) values.push_back(keys_->values.at(key));
    return values;
  }
  std::string set_once(const std::string& key, const std::string& value) override {
    const auto lock = enter();
    const std::string held = keys_->values.emplace(key, value).first->second;
    keys_->changed.notify_all();
    return held;
  }
  std::string replace(const std::string& key, const std::string&, const std::string& value) override {
    set(key, value);
    return value;
  }
  void remove(const std::string& key) override {
    const auto lock = enter();
    keys_->values.erase(key);
  }

 private:
  std::unique_lock<std::mutex> enter() {
    std::unique_lock lock(keys_->mutex);
    if (keys_->error) std::rethrow_exception(keys_->error);
    return lock;
  }
  std::shared_ptr<FakeKeys> keys_;
};

class WatchTest : public testing::Test {
 protected:
  std::unique_ptr<Watch> watch_as(int rank, double timeout_s = 60) {
    return std::make_unique<Watch>(
        WatchSpec{.rank = rank, .size = 3, .host = fmt::format("node{}", rank), .timeout_s = timeout_s},
        std::make_unique<FakeStore>(keys), [this](const std::string& text) { aborted.set_value(text); });
  }
  std::shared_ptr<FakeKeys> keys = std::make_shared<FakeKeys>();
  std::promise<std::string> aborted;
  std::future<std::string> message = aborted.get_future();
};

TEST_F(WatchTest, HeartbeatsTellWhereBothLanesAre) {
  const auto watch = watch_as(2);
  const auto beat = [&](const std::function<bool(const Json&)>& is_it) {
    return Json::parse(
        keys->wait_for("beat/2", [&](const std::string& text) { return is_it(Json::parse(text)); }));
  };
  watch->at(12, "backward");
  Json json = beat([](const Json& now) { return now.at("step") == 12; });
  EXPECT_EQ(place_of(json), "step 12, backward");
  EXPECT_EQ(name_of_beat(2, json), "rank 2 (node2)");
  EXPECT_EQ(json.at("state"), static_cast<int>(kWorking));
  EXPECT_EQ(json.at("saving").at("state"), static_cast<int>(kOff));

  watch->begin_saving(11, /*on_training_thread=*/true);
  {
    const Watch::Waits waits(*watch, Lane::kSaving);
    json = beat([](const Json& now) { return now.at("saving").at("state") == static_cast<int>(kWaiting); });
    EXPECT_EQ(place_of(json.at("saving")), "step 11, saving a checkpoint");
    EXPECT_EQ(json.at("state"), static_cast<int>(kOff));
  }
  const int64_t saved = json.at("saving").at("place");
  ++watch->headway(Lane::kSaving);
  json = beat([&](const Json& now) {
    return now.at("saving").at("place") == saved + 2;
  });  // the wait's end, and this
  EXPECT_EQ(json.at("saving").at("state"), static_cast<int>(kWorking));
  watch->end_saving(/*on_training_thread=*/true);
  json = beat([](const Json& now) { return now.at("saving").at("state") == static_cast<int>(kOff); });
  EXPECT_EQ(json.at("state"), static_cast<int>(kWorking));
}

TEST_F(WatchTest, RankZeroSaysWhoIsSilent) {
  keys->put("beat/1", FakeRank{}.text(1));
  keys->put("beat/2", FakeRank{.done = true}.text(2));
  const auto watch = watch_as(0, /*timeout_s=*/1);
  const std::string verdict = keys->wait_for("verdict", [](const std::string&) { return true; });
  EXPECT_THAT(verdict, HasSubstr("rank 1 (node1) has given no sign of life"));
}

TEST_F(WatchTest, AStoreThatDoesNotAnswerEndsTheRankAtOnce) {
  const auto watch = watch_as(1);
  watch->at(12, "backward");
  const auto since = std::chrono::steady_clock::now();
  keys->fail(
      std::make_exception_ptr(DistributedError("the run's store at node0:29500 has not answered for 60 s")));
  EXPECT_EQ(message.get(),
            "rank 1 (node1) at step 12, backward: the run's store at node0:29500 has not answered for 60 s");
  EXPECT_LT(std::chrono::steady_clock::now() - since, std::chrono::milliseconds(2500))
      << "less than the time of grace";
}

TEST_F(WatchTest, AfterAStoreHasGoneTheRankHasAMomentToEndByItself) {
  const auto watch = watch_as(1);
  const auto since = std::chrono::steady_clock::now();
  keys->fail(std::make_exception_ptr(StoreGone("the run's store is gone: Connection reset by peer")));
  EXPECT_THAT(message.get(), HasSubstr("rank 1 (node1) at step 0, starting: the store of the run is gone"));
  EXPECT_GE(std::chrono::steady_clock::now() - since, std::chrono::milliseconds(2500));
}

TEST_F(WatchTest, AFailureOfAnotherEndsARankThatDoesNotEndByItself) {
  const auto watch = watch_as(2);
  keys->put("failure", "rank 1 (node1) failed at step 3, backward: no memory");
  EXPECT_EQ(message.get(), "rank 1 (node1) failed at step 3, backward: no memory");
}

TEST_F(WatchTest, TheCauseOfALostConnectionIsWhoseHeartStopped) {
  FakeStore store(keys);
  keys->put("beat/1", FakeRank{}.text(1));
  keys->put("beat/2", FakeRank{.done = true}.text(2));
  EXPECT_EQ(find_cause(store, 0, 4),  // rank 3 has not come yet
            "rank 1 (node1) has died without a word, last at step 12, backward; rank 2 (node2) has left "
            "early, at step 12, "
            "backward");
  keys->put("failure", "rank 3 failed");
  EXPECT_EQ(find_cause(store, 0, 4), "rank 3 failed");
  keys->fail(std::make_exception_ptr(DistributedError("has not answered")));
  EXPECT_THROW(find_cause(store, 0, 4), DistributedError);
}

TEST(PackedTexts, ComeBackAndNothingElseDoes) {
  const std::vector<std::string> texts = {"", "a:b", "12:", std::string("\0x\n", 3)};
  EXPECT_EQ(unpack_texts(pack_texts(texts)), texts);
  EXPECT_EQ(unpack_texts(""), std::vector<std::string>{});
  for (const char* packed :
       {"x", ":", "3", "3:", "3:ab", "-1:a", "1:a2", "99999999999999999999:a", "18446744073709551615:a"})
    EXPECT_THROW(unpack_texts(packed), DistributedError) << packed;
}

TEST(Addresses, AreThoseByWhichOtherMachinesReachThisOne) {
  const Route here = route_to("127.0.0.1", 29500);
  EXPECT_EQ(here.own, "127.0.0.1");
  EXPECT_EQ(here.peer, "127.0.0.1");
  // Rank 0's machine keeps the store, and its own name leads it to a loop-back address.
  const std::vector<Route> routes = {{"127.0.0.1", "127.0.1.1"}, {"10.77.0.12", "10.77.0.11"}};
  EXPECT_EQ(address_among(routes, 0), "10.77.0.11");
  EXPECT_EQ(address_among(routes, 1), "10.77.0.12");
  EXPECT_EQ(address_among({{"fd77::11", "fd77::11"}, {"fd77::12", "fd77::11"}}, 0), "fd77::11");
  EXPECT_EQ(address_among({here, here}, 1), "127.0.0.1") << "two that are one machine";
}

}  // namespace
}  // namespace caldera
