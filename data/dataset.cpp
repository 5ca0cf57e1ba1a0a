#include "data/dataset.h"

#include <fmt/ranges.h>

#include <algorithm>

#include "base/aten.h"
#include "base/error.h"
#include "data/each.h"
#include "data/image.h"

namespace caldera {
namespace {

at::Tensor to_tensor(const std::vector<int64_t>& values) {
  at::Tensor tensor = at::empty({static_cast<int64_t>(values.size())}, at::kLong);
  std::copy(values.begin(), values.end(), tensor.data_ptr<int64_t>());
  return tensor;
}

// Image tokens are expanded, so a sample's images are its runs of num_image_tokens placeholders.
int64_t num_images(const Sample& sample, const SampleFormat& format) {
  return std::count(sample.input_ids.begin(), sample.input_ids.end(), kImageTokenIndex) /
         format.image_spec.num_image_tokens;
}

// The place of a sample's last supervised id, which is read as a label alone.
int64_t last_supervised(const Sample& sample) {
  auto place = static_cast<int64_t>(sample.labels.size()) - 1;
  while (sample.labels[static_cast<size_t>(place)] == kIgnoreIndex) --place;
  return place;
}

}  // namespace

at::Tensor load_pixels(const ImageFolder& image_folder, const std::string& image,
                       const SampleFormat& format) {
  return preprocess_image(load_image(image_path(image_folder, image)), format.image_spec,
                          format.image_aspect_ratio);
}

int64_t Sample::num_supervised() const {
  if (labels.empty()) return 0;
  return std::count_if(labels.begin() + 1, labels.end(), [](int64_t label) { return label != kIgnoreIndex; });
}

Sample make_sample_text(const Record& record, const SampleFormat& format) {
  CALDERA_ASSERT(format.tokenizer && format.conversation && format.image_spec.num_image_tokens > 0);
  const TokenizedSample tokenized = tokenize(record, *format.conversation, *format.tokenizer);
  CALDERA_ASSERT(tokenized.labels.size() == tokenized.input_ids.size());
  Sample sample;
  sample.id = record.id;
  const auto limit = static_cast<size_t>(format.model_max_length);
  for (size_t i = 0; i < tokenized.input_ids.size() && sample.input_ids.size() < limit; ++i) {
    const int64_t id = tokenized.input_ids[i];
    const auto count = id == kImageTokenIndex ? static_cast<size_t>(format.image_spec.num_image_tokens) : 1;
    if (sample.input_ids.size() + count > limit) break;
    sample.input_ids.insert(sample.input_ids.end(), count, id);
    sample.labels.insert(sample.labels.end(), count,
                         id == kImageTokenIndex ? kIgnoreIndex : tokenized.labels[i]);
  }
  return sample;
}

void load_pictures(Sample& sample, const Record& record, const ImageFolder& image_folder,
                   const SampleFormat& format, PixelCache* cache) {
  for_record(record, [&] {
    const auto count = static_cast<size_t>(num_images(sample, format));
    CALDERA_CHECK(count <= record.images.size(), DataError, "{} in its text but only {} images", count,
                  record.images.size());
    for (size_t i = 0; i < count; ++i) {
      const std::string& image = record.images[i];
      at::Tensor pixels = cache ? cache->find(image) : at::Tensor();
      if (!pixels.defined()) {
        pixels = load_pixels(image_folder, image, format);
        if (cache) cache->insert(image, pixels);
      }
      sample.pixels.push_back(std::move(pixels));
    }
  });
}

Sample make_sample(const Record& record, const ImageFolder& image_folder, const SampleFormat& format,
                   PixelCache* cache) {
  Sample sample = for_record(record, [&] { return make_sample_text(record, format); });
  load_pictures(sample, record, image_folder, format, cache);
  return sample;
}

std::vector<size_t> cut_to_nothing(const std::vector<Record>& records, const SampleFormat& format,
                                   const std::function<void(int64_t)>& progress) {
  std::vector<char> is_cut(records.size());  // not bool: threads write neighbours
  for_each_index(
      records.size(),
      [&](size_t i) {
        is_cut[i] = for_record(records[i], [&] {
                      return make_sample_text(records[i], format);
                    }).num_supervised() == 0;
      },
      progress);
  std::vector<size_t> places;
  for (size_t i = 0; i < records.size(); ++i)
    if (is_cut[i] != 0) places.push_back(i);
  return places;
}

std::string cut_to_nothing_message(const std::vector<Record>& records, const std::vector<size_t>& places,
                                   const std::string& source, const SampleFormat& format) {
  constexpr size_t kMaxListed = 10;
  std::vector<std::string> names;
  for (size_t i = 0; i < std::min(places.size(), kMaxListed); ++i)
    names.push_back(fmt::format("{} (id \"{}\")", places[i], records[places[i]].id));
  return fmt::format(
      "{}: {} of {} records are longer than model_max_length {} before their first answer, so that nothing "
      "of "
      "them is learned{}: {}. Raise model_max_length, or shorten or drop them",
      source, places.size(), records.size(), format.model_max_length,
      places.size() > kMaxListed ? ", the first of them" : "", fmt::join(names, ", "));
}

at::Tensor PixelCache::find(const std::string& image) const {
  const std::lock_guard lock(mutex_);
  const auto found = pixels_.find(image);
  return found == pixels_.end() ? at::Tensor() : found->second;
}

void PixelCache::insert(const std::string& image, const at::Tensor& pixels) {
  const std::lock_guard lock(mutex_);
  const auto num_bytes = static_cast<int64_t>(pixels.nbytes());
  if (num_bytes > bytes_left_ || !pixels_.emplace(image, pixels).second) return;
  bytes_left_ -= num_bytes;
}

PackedBatch pack(const std::vector<Sample>& samples, bool for_loss) {
  PackedBatch batch;
  std::vector<int64_t> input_ids, position_ids, supervised, targets, image_rows;
  std::vector<at::Tensor> pixels;
  batch.cu_seqlens.push_back(0);
  for (const Sample& sample : samples) {
    const int64_t start = batch.cu_seqlens.back(), num_ids = static_cast<int64_t>(sample.input_ids.size());
    CALDERA_ASSERT(sample.labels.size() == sample.input_ids.size());
    const int64_t num_supervised = sample.num_supervised();
    const int64_t length = for_loss && num_supervised > 0 ? last_supervised(sample) : num_ids;
    for (int64_t i = 0; i < length; ++i) {
      const int64_t id = sample.input_ids[static_cast<size_t>(i)];
      input_ids.push_back(id);
      position_ids.push_back(i);
      if (id == kImageTokenIndex) image_rows.push_back(start + i);
      if (i + 1 == num_ids) continue;
      const int64_t next = sample.labels[static_cast<size_t>(i + 1)];
      if (next == kIgnoreIndex) continue;
      supervised.push_back(start + i);
      targets.push_back(next);
    }
    batch.cu_seqlens.push_back(start + length);
    batch.num_supervised.push_back(num_supervised);
    batch.sample_ids.push_back(sample.id);
    // Pictures are there in whole or not at all: between their ids nothing is supervised.
    int64_t num_pictures = std::ssize(sample.pixels);
    const auto cut = sample.input_ids.begin() + length;
    if (const int64_t left_out = std::count(cut, sample.input_ids.end(), kImageTokenIndex); left_out > 0) {
      const int64_t left = std::count(sample.input_ids.begin(), cut, kImageTokenIndex);
      num_pictures = num_pictures * left / (left + left_out);
    }
    pixels.insert(pixels.end(), sample.pixels.begin(), sample.pixels.begin() + num_pictures);
  }
  batch.input_ids_T = to_tensor(input_ids);
  batch.position_ids_T = to_tensor(position_ids);
  batch.supervised_K = to_tensor(supervised);
  batch.targets_K = to_tensor(targets);
  batch.image_rows_IP = to_tensor(image_rows);
  batch.pixels_ICYX = pixels.empty() ? at::empty({0, 3, 0, 0}, at::kByte) : at::stack(pixels);
  return batch;
}

}  // namespace caldera
