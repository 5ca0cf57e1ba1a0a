#include "data/loader.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <future>

#include "base/error.h"
#include "base/threads.h"

namespace caldera {
namespace {

constexpr int64_t kCacheBytes = int64_t{1} << 30;

std::vector<Sample> take(std::vector<Sample>& samples, const std::vector<int64_t>& indices) {
  std::vector<Sample> taken;
  for (const int64_t i : indices) taken.push_back(std::move(samples[static_cast<size_t>(i)]));
  return taken;
}

// A step whose samples are still being made. Each job makes one; the job that finishes last assembles the
// step, so no worker ever waits for another.
struct StepInMaking {
  StepData data;
  std::vector<Sample> samples;
  std::vector<std::exception_ptr> errors;  // one a sample
  std::atomic<int64_t> num_missing = 0;
  std::promise<StepData> promise;

  void assemble(int64_t max_tokens) {
    try {
      // The error of the earliest sample, so that the message does not depend on which thread was first.
      for (const std::exception_ptr& error : errors) {
        if (error) std::rethrow_exception(error);
      }
      std::vector<int64_t> lengths;
      for (const Sample& sample : samples) {
        lengths.push_back(static_cast<int64_t>(sample.input_ids.size()));
        data.num_tokens += lengths.back();
        data.num_supervised += sample.num_supervised();
        data.num_images += static_cast<int64_t>(sample.pixels.size());
        data.sample_ids.push_back(sample.id);
      }
      for (const auto& indices : plan_micro_batches(lengths, max_tokens)) {
        data.micro_batches.push_back(pack(take(samples, indices)));
      }
      promise.set_value(std::move(data));
    } catch (...) {
      promise.set_exception(std::current_exception());
    }
  }
};

}  // namespace

struct Loader::State {
  std::shared_ptr<const std::vector<Record>> records;
  std::filesystem::path image_folder;
  SampleFormat format;
  LoaderOptions options;
  Sampler sampler;
  int64_t num_samples, steps_per_epoch, num_steps, next_step;
  std::vector<int64_t> order;  // of order_epoch
  int64_t order_epoch = -1;
  PixelCache cache{kCacheBytes};
  std::deque<std::future<StepData>> in_flight;
  ThreadPool pool;  // last: its threads end before what they use does

  State(std::shared_ptr<const std::vector<Record>> the_records, std::filesystem::path folder,
        SampleFormat the_format, LoaderOptions the_options, int64_t first_step)
      : records(std::move(the_records)),
        image_folder(std::move(folder)),
        format(std::move(the_format)),
        options(the_options),
        sampler(static_cast<int64_t>(records->size()), options.seed,
                options.group_by_modality_length ? modality_lengths(*records) : std::vector<int64_t>(),
                options.global_batch_size),
        num_samples(static_cast<int64_t>(records->size())),
        steps_per_epoch((num_samples + options.global_batch_size - 1) / options.global_batch_size),
        num_steps(options.max_steps > 0 ? options.max_steps
                                        : static_cast<int64_t>(std::ceil(
                                              options.num_epochs * static_cast<double>(steps_per_epoch)))),
        next_step(first_step),
        pool(std::max(options.num_workers, 1)) {}

  void start(int64_t step) {
    const int64_t epoch = step / steps_per_epoch, begin = step % steps_per_epoch * options.global_batch_size;
    const int64_t end = std::min(begin + options.global_batch_size, num_samples);
    if (order_epoch != epoch) {
      order = sampler.epoch_order(epoch);
      order_epoch = epoch;
    }
    auto making = std::make_shared<StepInMaking>();
    making->data.step = step;
    making->data.epoch =
        static_cast<double>(epoch) + static_cast<double>(end) / static_cast<double>(num_samples);
    making->samples.resize(static_cast<size_t>(end - begin));
    making->errors.resize(static_cast<size_t>(end - begin));
    making->num_missing = end - begin;
    in_flight.push_back(making->promise.get_future());
    for (int64_t i = begin; i < end; ++i) {
      const Record& record = (*records)[static_cast<size_t>(order[static_cast<size_t>(i)])];
      pool.submit([this, making, slot = static_cast<size_t>(i - begin), &record] {
        try {
          making->samples[slot] = make_sample(record, image_folder, format, &cache);
        } catch (...) {
          making->errors[slot] = std::current_exception();
        }
        if (--making->num_missing == 0) making->assemble(options.max_tokens_per_micro_batch);
      });
    }
  }
};

Loader::Loader(std::shared_ptr<const std::vector<Record>> records, std::filesystem::path image_folder,
               SampleFormat format, LoaderOptions options, int64_t first_step) {
  CALDERA_CHECK(records && !records->empty(), DataError, "no records to train on");
  CALDERA_ASSERT(options.global_batch_size > 0 && first_step >= 0);
  state_ = std::make_unique<State>(std::move(records), std::move(image_folder), std::move(format), options,
                                   first_step);
}
Loader::~Loader() = default;

int64_t Loader::num_steps() const { return state_->num_steps; }
int64_t Loader::steps_per_epoch() const { return state_->steps_per_epoch; }

bool Loader::next(StepData& data) {
  State& state = *state_;
  const auto depth = static_cast<size_t>(std::max<int64_t>(state.options.prefetch_steps, 1));
  while (state.in_flight.size() < depth && state.next_step < state.num_steps) state.start(state.next_step++);
  if (state.in_flight.empty()) return false;
  std::future<StepData> front = std::move(state.in_flight.front());
  state.in_flight.pop_front();
  data = front.get();
  return true;
}

std::vector<PackedBatch> pack_all(const std::vector<Record>& records,
                                  const std::filesystem::path& image_folder, const SampleFormat& format,
                                  int64_t max_tokens_per_micro_batch) {
  std::vector<PackedBatch> batches;
  std::vector<Sample> open;
  int64_t num_tokens = 0;
  for (const Record& record : records) {
    Sample sample = make_sample(record, image_folder, format);
    const auto length = static_cast<int64_t>(sample.input_ids.size());
    if (!open.empty() && num_tokens + length > max_tokens_per_micro_batch) {
      batches.push_back(pack(std::exchange(open, {})));
      num_tokens = 0;
    }
    num_tokens += length;
    open.push_back(std::move(sample));
  }
  if (!open.empty()) batches.push_back(pack(open));
  return batches;
}

}  // namespace caldera
