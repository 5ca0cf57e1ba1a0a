#include "data/loader.h"

#include <algorithm>
#include <atomic>
#include <cmath>
#include <deque>
#include <future>
#include <numeric>

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

// A step whose samples are still being made. Each job makes one; the job that finishes last goes on with the
// step, so no worker ever waits for another. Where there are several ranks, a first round of jobs makes all
// texts, for their lengths; a second one makes this rank's samples, pictures and all.
struct StepInMaking {
  StepData data;
  std::vector<int64_t> picked;  // places in the epoch's order, of the step's samples
  std::vector<int64_t> lengths, num_supervised, num_images;
  std::vector<int64_t> mine;  // this rank's, positions in the step
  std::vector<Sample> samples;
  std::vector<std::exception_ptr> errors;  // one a sample
  std::atomic<int64_t> num_missing = 0;
  std::promise<StepData> promise;

  // The error of the earliest sample, so that the message does not depend on which thread was first.
  void check() const {
    for (const std::exception_ptr& error : errors)
      if (error) std::rethrow_exception(error);
  }

  void measure(size_t i, const Sample& sample, int64_t images) {
    lengths[i] = static_cast<int64_t>(sample.input_ids.size());
    num_supervised[i] = sample.num_supervised();
    num_images[i] = images;
    data.sample_ids[i] = sample.id;
  }

  // Leaves out the samples that are cut to nothing. On every rank alike: the texts alone tell.
  void pass_over() {
    size_t kept = 0;
    for (size_t i = 0; i < picked.size(); ++i) {
      if (num_supervised[i] == 0) {
        data.passed_over.push_back(std::move(data.sample_ids[i]));
        continue;
      }
      if (kept != i) {
        picked[kept] = picked[i];
        lengths[kept] = lengths[i];
        num_supervised[kept] = num_supervised[i];
        num_images[kept] = num_images[i];
        data.sample_ids[kept] = std::move(data.sample_ids[i]);
        if (!samples.empty()) samples[kept] = std::move(samples[i]);
      }
      ++kept;
    }
    picked.resize(kept);
    lengths.resize(kept);
    num_supervised.resize(kept);
    num_images.resize(kept);
    data.sample_ids.resize(kept);
    if (!samples.empty()) samples.resize(kept);
  }

  // Who gets which sample, and in how many micro-batches.
  void deal(const LoaderOptions& options) {
    pass_over();
    data.num_tokens = std::accumulate(lengths.begin(), lengths.end(), int64_t{0});
    data.num_supervised = std::accumulate(num_supervised.begin(), num_supervised.end(), int64_t{0});
    data.num_images = std::accumulate(num_images.begin(), num_images.end(), int64_t{0});
    data.ranks.resize(lengths.size());
    const auto dealt = deal_to_ranks(lengths, options.num_ranks);
    for (int rank = 0; rank < options.num_ranks; ++rank) {
      const std::vector<int64_t>& samples_of_rank = dealt[static_cast<size_t>(rank)];
      for (const int64_t i : samples_of_rank) data.ranks[static_cast<size_t>(i)] = rank;
      data.num_micro_batches.push_back(static_cast<int64_t>(
          plan_micro_batches(lengths_of(samples_of_rank), options.max_tokens_per_micro_batch).size()));
    }
    mine = dealt[static_cast<size_t>(options.rank)];
  }

  std::vector<int64_t> lengths_of(const std::vector<int64_t>& indices) const {
    std::vector<int64_t> list;
    for (const int64_t i : indices) list.push_back(lengths[static_cast<size_t>(i)]);
    return list;
  }

  // `samples` are this rank's.
  void assemble(int64_t max_tokens) {
    for (const auto& indices : plan_micro_batches(lengths_of(mine), max_tokens)) {
      data.micro_batches.push_back(pack(take(samples, indices), /*for_loss=*/true));
      for (const int64_t i : indices)
        data.micro_batches.back().sample_numbers.push_back(mine[static_cast<size_t>(i)]);
    }
    promise.set_value(std::move(data));
  }
};

}  // namespace

struct Loader::State {
  std::shared_ptr<const std::vector<Record>> records;
  ImageFolder image_folder;
  SampleFormat format;
  LoaderOptions options;
  Sampler sampler;
  int64_t num_samples, steps_per_epoch, num_steps, next_step;
  std::vector<int64_t> order;  // of order_epoch
  int64_t order_epoch = -1;
  PixelCache cache{kCacheBytes};
  std::deque<std::future<StepData>> in_flight;
  ThreadPool pool;  // last: its threads end before what they use does

  State(std::shared_ptr<const std::vector<Record>> the_records, ImageFolder folder, SampleFormat the_format,
        LoaderOptions the_options, int64_t first_step)
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
    making->picked.assign(order.begin() + begin, order.begin() + end);
    const size_t size = making->picked.size();
    making->lengths.resize(size);
    making->num_supervised.resize(size);
    making->num_images.resize(size);
    making->data.sample_ids.resize(size);
    in_flight.push_back(making->promise.get_future());
    const auto record = [this, making](size_t i) -> const Record& {
      return (*records)[static_cast<size_t>(making->picked[i])];
    };
    if (options.num_ranks == 1) {
      making->samples.resize(size);
      each(
          making, size,
          [this, making, record](size_t i) {
            Sample& sample = making->samples[i];
            sample = for_record(record(i), [&] { return make_sample_text(record(i), format); });
            if (sample.num_supervised() > 0) load_pictures(sample, record(i), image_folder, format, &cache);
            making->measure(i, sample, static_cast<int64_t>(sample.pixels.size()));
          },
          [this, making] {
            making->deal(options);
            making->assemble(options.max_tokens_per_micro_batch);
          });
      return;
    }
    each(
        making, size,
        [this, making, record](size_t i) {
          const Sample text = for_record(record(i), [&] { return make_sample_text(record(i), format); });
          const auto image_tokens =
              std::count(text.input_ids.begin(), text.input_ids.end(), kImageTokenIndex);
          making->measure(i, text, image_tokens / std::max<int64_t>(format.image_spec.num_image_tokens, 1));
        },
        [this, making, record] {
          making->deal(options);
          making->samples.resize(making->mine.size());
          each(
              making, making->mine.size(),
              [this, making, record](size_t k) {
                making->samples[k] =
                    make_sample(record(static_cast<size_t>(making->mine[k])), image_folder, format, &cache);
              },
              [this, making] { making->assemble(options.max_tokens_per_micro_batch); });
        });
  }

  // Runs make(0) to make(count - 1) in the pool, then `finish` in the thread that was last. What they throw
  // comes out of the step's future.
  template <class Make, class Finish>
  void each(const std::shared_ptr<StepInMaking>& making, size_t count, Make make, Finish finish) {
    making->errors.assign(count, nullptr);
    making->num_missing = static_cast<int64_t>(count);
    const auto end = [making, finish] {
      try {
        making->check();
        finish();
      } catch (...) {
        making->promise.set_exception(std::current_exception());
      }
    };
    if (count == 0) return end();
    for (size_t i = 0; i < count; ++i) {
      pool.submit([making, make, end, i] {
        try {
          make(i);
        } catch (...) {
          making->errors[i] = std::current_exception();
        }
        if (--making->num_missing == 0) end();
      });
    }
  }
};

Loader::Loader(std::shared_ptr<const std::vector<Record>> records, ImageFolder image_folder,
               SampleFormat format, LoaderOptions options, int64_t first_step) {
  CALDERA_CHECK(records && !records->empty(), DataError, "no records to train on");
  CALDERA_ASSERT(options.global_batch_size > 0 && first_step >= 0);
  state_ = std::make_unique<State>(std::move(records), std::move(image_folder), std::move(format), options,
                                   first_step);
}
Loader::~Loader() = default;

int64_t Loader::num_steps() const { return state_->num_steps; }

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

PackedRecords pack_all(const std::vector<Record>& records, const ImageFolder& image_folder,
                       const SampleFormat& format, int64_t max_tokens_per_micro_batch, int rank,
                       int num_ranks) {
  PackedRecords packed;
  // 1. Where batches begin, and the last one ends: the texts tell.
  std::vector<size_t> bounds;
  int64_t num_tokens = 0;
  for (size_t i = 0; i < records.size(); ++i) {
    const Sample text = make_sample_text(records[i], format);
    const auto length = static_cast<int64_t>(text.input_ids.size());
    if (bounds.empty() || num_tokens + length > max_tokens_per_micro_batch) {
      bounds.push_back(i);
      num_tokens = 0;
    }
    num_tokens += length;
    packed.num_supervised += text.num_supervised();
  }
  packed.num_batches = std::ssize(bounds);
  bounds.push_back(records.size());
  // 2. This rank's, pictures and all.
  for (auto b = static_cast<size_t>(rank); b + 1 < bounds.size(); b += static_cast<size_t>(num_ranks)) {
    std::vector<Sample> samples;
    for (size_t i = bounds[b]; i < bounds[b + 1]; ++i)
      samples.push_back(make_sample(records[i], image_folder, format));
    packed.batches.push_back(pack(samples, /*for_loss=*/true));
  }
  return packed;
}

}  // namespace caldera
