// Offsets are those of PKWARE's APPNOTE.TXT, sections 4.3.7 (local header), 4.3.12 (central directory),
// 4.3.14 to 4.3.16 (its ends) and 4.5.3 (zip64 extra field).
#include "model/weights/zip.h"

#include <algorithm>
#include <cstring>
#include <string_view>
#include <vector>

#include "base/error.h"

namespace caldera {
namespace {

constexpr uint32_t kLocal = 0x04034b50, kCentral = 0x02014b50, kEnd = 0x06054b50, kEnd64 = 0x06064b50,
                   kLocator64 = 0x07064b50;
constexpr uint64_t kEndBytes = 22, kMaxComment = 0xFFFF;

class ZipReader {
 public:
  ZipReader(std::span<const std::byte> bytes, const std::string& file) : bytes_(bytes), file_(file) {}

  std::map<std::string, ZipMember> read() {
    uint64_t end = find_end(), count = number(end + 10, 2), size = number(end + 12, 4),
             begin = number(end + 16, 4);
    if (count == 0xFFFF || size == UINT32_MAX || begin == UINT32_MAX) {
      check(end >= 20 && number(end - 20, 4) == kLocator64, "its zip64 directory is missing");
      end = number(end - 20 + 8, 8);
      check(number(end, 4) == kEnd64, "its zip64 directory is missing");
      count = number(add(end, 32), 8);
      size = number(add(end, 40), 8);
      begin = number(add(end, 48), 8);
    }
    check(begin <= end && size <= end - begin, "its directory does not lie where its end says");
    directory_begin_ = begin;
    end = begin + size;  // torch.save puts a zip64 record between, whether it needs one or not
    // Each entry takes 46 bytes at least, so a count that lies cannot make this loop long.
    uint64_t at = begin;
    for (uint64_t i = 0; i < count; ++i) at = read_entry(at, end);
    check(at == end, "its directory holds more than its end says");
    check_overlaps();
    return std::move(members_);
  }

 private:
  void check(bool condition, const std::string& what) const {
    CALDERA_CHECK(condition, CheckpointError, "{}: malformed zip archive: {}", file_, what);
  }
  uint64_t add(uint64_t a, uint64_t b) const {
    check(a <= UINT64_MAX - b, "an offset overflows");
    return a + b;
  }
  void expect_inside(uint64_t at, uint64_t size) const {
    check(at <= bytes_.size() && size <= bytes_.size() - at,
          "it is truncated, or an offset leads beyond its end");
  }
  uint64_t number(uint64_t at, uint64_t num_bytes) const {
    expect_inside(at, num_bytes);
    uint64_t value = 0;
    std::memcpy(&value, bytes_.data() + at, num_bytes);  // little-endian, as this program's machines are
    return value;
  }
  std::string_view text(uint64_t at, uint64_t size) const {
    expect_inside(at, size);
    return {reinterpret_cast<const char*>(bytes_.data()) + at, size};
  }

  // The end record is the last thing in the file but for a comment, whose length it states.
  uint64_t find_end() const {
    check(bytes_.size() >= kEndBytes, "it is truncated");
    const uint64_t last = bytes_.size() - kEndBytes, first = last - std::min(last, kMaxComment);
    for (uint64_t at = last + 1; at-- > first;)
      if (number(at, 4) == kEnd && number(at + 20, 2) == last - at) return at;
    check(false, "it has no end record; is it truncated?");
    return 0;
  }

  // One entry of the directory; returns where the next one begins.
  uint64_t read_entry(uint64_t at, uint64_t end) {
    check(number(at, 4) == kCentral, "its directory is broken");
    const uint64_t flags = number(at + 8, 2), method = number(at + 10, 2), name_size = number(at + 28, 2),
                   extra_size = number(at + 30, 2), comment_size = number(at + 32, 2);
    uint64_t packed = number(at + 20, 4), size = number(at + 24, 4), local = number(at + 42, 4);
    const std::string name(text(at + 46, name_size));
    const uint64_t extra = at + 46 + name_size, next = extra + extra_size + comment_size;
    check(next <= end, "its directory is broken");
    check(name.find('\0') == std::string::npos, "a member's name holds NUL");
    read_zip64(extra, extra_size, size, packed, local);
    check((flags & 1) == 0, "its member " + name + " is encrypted");
    check(method == 0 && packed == size,
          "its member " + name + " is compressed, which torch.save never does; save it again with torch");

    check(number(local, 4) == kLocal, "its member " + name + " has no header of its own");
    const uint64_t local_name_size = number(add(local, 26), 2), local_extra_size = number(add(local, 28), 2);
    check(text(local + 30, local_name_size) == name, "its member " + name + " has two names");
    const uint64_t begin = local + 30 + local_name_size + local_extra_size;
    check(begin <= directory_begin_ && size <= directory_begin_ - begin,
          "its member " + name + " reaches into its directory or beyond the file");
    check(members_.emplace(name, ZipMember{begin, size}).second, "its member " + name + " occurs twice");
    return next;
  }

  // What does not fit in 32 bits stands in an extra field, in this order, each only where needed.
  void read_zip64(uint64_t at, uint64_t extra_size, uint64_t& size, uint64_t& packed, uint64_t& local) const {
    const uint64_t end = at + extra_size;
    while (end - at >= 4) {
      const uint64_t id = number(at, 2), field_end = at + 4 + number(at + 2, 2);
      check(field_end <= end, "an extra field is broken");
      at += 4;
      if (id == 1) {
        for (uint64_t* value : {&size, &packed, &local}) {
          if (*value != UINT32_MAX) continue;
          check(field_end - at >= 8, "a zip64 field is too short");
          *value = number(at, 8);
          at += 8;
        }
      }
      at = field_end;
    }
  }

  void check_overlaps() const {
    std::vector<std::pair<ZipMember, const std::string*>> order;
    for (const auto& [name, member] : members_) order.emplace_back(member, &name);
    std::sort(order.begin(), order.end(), [](const auto& a, const auto& b) {
      return std::pair(a.first.begin, a.first.size) < std::pair(b.first.begin, b.first.size);
    });
    for (size_t i = 1; i < order.size(); ++i)
      check(order[i - 1].first.begin + order[i - 1].first.size <= order[i].first.begin,
            "its members " + *order[i - 1].second + " and " + *order[i].second + " overlap");
  }

  std::span<const std::byte> bytes_;
  const std::string& file_;
  uint64_t directory_begin_ = 0;
  std::map<std::string, ZipMember> members_;
};

}  // namespace

std::map<std::string, ZipMember> read_zip(std::span<const std::byte> bytes, const std::string& file) {
  return ZipReader(bytes, file).read();
}

}  // namespace caldera
