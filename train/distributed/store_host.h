// The store of a run, hosted by a launcher: it outlives the ranks, and says what became of them.
#pragma once
#include <memory>
#include <optional>
#include <string>

namespace caldera {

// A connection whose other end has died gives an error when it is written to, as it does in Python; the
// signal that else comes with it would end this process too, before it has said who died. c10d and Gloo write
// without care.
void survive_broken_connections();

class StoreHost {
 public:
  // Listens on the port, or on any free one (0). Throws DistributedError where it is taken.
  explicit StoreHost(int port);
  ~StoreHost();
  int port() const;
  // Why an attempt ended: the first rank's own failure, else what the watch found; none where neither was
  // told.
  std::optional<std::string> cause(int attempt) const;
  // Where a rank was last: "step 12, forward and backward"; "" where it never came.
  std::string where(int attempt, int rank) const;

 private:
  struct Store;
  std::unique_ptr<Store> store_;
};

}  // namespace caldera
