// Words that were cut into tokens before. Real text repeats its words, so nearly every look-up hits.
#pragma once
#include <atomic>
#include <cstdint>
#include <functional>
#include <memory>
#include <string>
#include <string_view>
#include <vector>

namespace caldera {

// A token of a word, and the bytes of the word that it covers.
struct WordToken {
  int32_t id = 0;
  int32_t begin = 0, end = 0;
};

// Safe from several threads, which never wait for each other: words are added and never taken out. What finds
// no room is computed anew each time; frequent words come early.
class WordCache {
 public:
  WordCache() : slots_(kNumSlots) {}
  ~WordCache() {
    for (const auto& slot : slots_) delete slot.load();
  }
  WordCache(const WordCache&) = delete;
  WordCache& operator=(const WordCache&) = delete;

  // The tokens of a word: those kept, or else compute(word), in `computed`.
  template <class Compute>
  const std::vector<WordToken>& find_or(std::string_view word, std::vector<WordToken>& computed,
                                        const Compute& compute) const {
    const size_t hash = std::hash<std::string_view>()(word);
    std::atomic<const Entry*>* room = nullptr;
    for (size_t probe = 0; probe < kMaxProbes && room == nullptr; ++probe) {
      std::atomic<const Entry*>& slot = slots_[(hash + probe) % kNumSlots];
      const Entry* entry = slot.load(std::memory_order_acquire);
      if (entry == nullptr)
        room = &slot;
      else if (entry->hash == hash && entry->word == word)
        return entry->tokens;
    }
    computed = compute(word);
    if (room != nullptr && word.size() <= kMaxWordBytes) {
      auto entry = std::make_unique<const Entry>(Entry{hash, std::string(word), computed});
      const Entry* empty = nullptr;
      if (room->compare_exchange_strong(empty, entry.get())) entry.release();
    }
    return computed;
  }

 private:
  struct Entry {
    size_t hash;
    std::string word;
    std::vector<WordToken> tokens;
  };
  static constexpr size_t kNumSlots = 1u << 17, kMaxProbes = 8, kMaxWordBytes = 64;
  mutable std::vector<std::atomic<const Entry*>> slots_;
};

}  // namespace caldera
