#include "data/tokenizers/nfc.h"

#include <algorithm>
#include <unordered_map>

namespace caldera {
namespace {

struct Decomposition {
  char32_t character, first, second;
  int composes;
};
struct CombiningRange {
  char32_t first, last;
  int combining_class;
};
#include "data/tokenizers/nfc_tables.inc"

// Below this, every character is its own normal form.
constexpr char32_t kFirstAffected = 0x300;

constexpr char32_t kHangulS = 0xAC00, kHangulL = 0x1100, kHangulV = 0x1161, kHangulT = 0x11A7;
constexpr char32_t kNumL = 19, kNumV = 21, kNumT = 28, kNumS = kNumL * kNumV * kNumT;

struct Character {
  char32_t code_point;
  uint32_t origin;
  int combining_class;
};

int combining_class(char32_t code_point) {
  const auto range = std::lower_bound(std::begin(kCombiningRanges), std::end(kCombiningRanges), code_point,
                                      [](const CombiningRange& a, char32_t c) { return a.last < c; });
  return range != std::end(kCombiningRanges) && range->first <= code_point ? range->combining_class : 0;
}

void decompose(char32_t code_point, uint32_t origin, std::vector<Character>& out) {
  if (code_point >= kHangulS && code_point < kHangulS + kNumS) {
    const char32_t index = code_point - kHangulS;
    out.push_back({kHangulL + index / (kNumV * kNumT), origin, 0});
    out.push_back({kHangulV + index % (kNumV * kNumT) / kNumT, origin, 0});
    if (index % kNumT != 0) out.push_back({kHangulT + index % kNumT, origin, 0});
    return;
  }
  const auto entry = std::lower_bound(std::begin(kDecompositions), std::end(kDecompositions), code_point,
                                      [](const Decomposition& a, char32_t c) { return a.character < c; });
  if (entry == std::end(kDecompositions) || entry->character != code_point) {
    out.push_back({code_point, origin, combining_class(code_point)});
    return;
  }
  decompose(entry->first, origin, out);
  if (entry->second != 0) decompose(entry->second, origin, out);
}

// The character that two compose to, or 0.
char32_t compose(char32_t first, char32_t second) {
  if (first >= kHangulL && first < kHangulL + kNumL && second >= kHangulV && second < kHangulV + kNumV) {
    return kHangulS + ((first - kHangulL) * kNumV + (second - kHangulV)) * kNumT;
  }
  if (first >= kHangulS && first < kHangulS + kNumS && (first - kHangulS) % kNumT == 0 && second > kHangulT &&
      second < kHangulT + kNumT) {
    return first + (second - kHangulT);
  }
  static const auto pairs = [] {
    std::unordered_map<uint64_t, char32_t> map;
    for (const Decomposition& entry : kDecompositions) {
      if (entry.composes != 0) map[static_cast<uint64_t>(entry.first) << 32 | entry.second] = entry.character;
    }
    return map;
  }();
  const auto found = pairs.find(static_cast<uint64_t>(first) << 32 | second);
  return found == pairs.end() ? 0 : found->second;
}

}  // namespace

MappedText compose_nfc(MappedText text) {
  bool affected = false;
  for (size_t offset = 0; offset < text.text.size() && !affected;) {
    affected = next_code_point(text.text, offset) >= kFirstAffected;
  }
  if (!affected) return text;

  std::vector<Character> characters;
  for (size_t offset = 0; offset < text.text.size();) {
    const auto origin = static_cast<uint32_t>(text.original(offset));
    decompose(next_code_point(text.text, offset), origin, characters);
  }
  // Canonical order: runs of combining characters sorted by class, equals as they stood.
  for (auto begin = characters.begin(); begin != characters.end();) {
    if (begin->combining_class == 0) {
      ++begin;
      continue;
    }
    const auto end =
        std::find_if(begin, characters.end(), [](const Character& c) { return c.combining_class == 0; });
    std::stable_sort(begin, end, [](const Character& a, const Character& b) {
      return a.combining_class < b.combining_class;
    });
    begin = end;
  }
  // Composition (Unicode, chapter 3.11): each character joins the last starter unless something of its class
  // or above stands between.
  std::vector<Character> composed;
  size_t starter = 0;
  bool has_starter = false;
  for (const Character& next : characters) {
    if (has_starter) {
      const Character& last = composed.back();
      const bool adjacent = composed.size() - 1 == starter;
      const bool blocked =
          !adjacent && (last.combining_class == 0 || last.combining_class >= next.combining_class);
      const char32_t both = blocked ? 0 : compose(composed[starter].code_point, next.code_point);
      if (both != 0) {
        composed[starter].code_point = both;
        continue;
      }
    }
    composed.push_back(next);
    if (next.combining_class == 0) {
      starter = composed.size() - 1;
      has_starter = true;
    }
  }
  MappedText result;
  uint32_t reached = 0;  // reordering must not let offsets run backwards
  for (const Character& character : composed) {
    append_utf8(result.text, character.code_point);
    reached = std::max(reached, character.origin);
    result.origin.resize(result.text.size(), reached);
  }
  result.origin.push_back(static_cast<uint32_t>(text.original(text.text.size())));
  return result;
}

}  // namespace caldera
