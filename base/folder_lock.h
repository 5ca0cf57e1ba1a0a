// A folder that one process at a time works in.
//
// Two runs that write into the same folder delete each other's files. flock() on FOLDER/.lock keeps the
// second one out: the kernel gives it up when its process ends, however that is, so what is left of a crash
// never stands in the way. The file says who holds it, in a line of JSON. Where the file system has no
// flock(), this line is the lock.
#pragma once
#include <filesystem>
#include <string>

namespace caldera {

class FolderLock {
 public:
  // Makes the folder if there is none. `what` is the folder's part, in the words of a message: "output".
  // Throws ConfigError naming the process that works there, when it still does so after `patience_s` (one
  // that was just killed takes a moment to end); Error naming the file and the system's reason where it
  // cannot be locked.
  FolderLock(const std::filesystem::path& folder, const std::string& what, int patience_s = 3);
  // The next process may begin.
  ~FolderLock();
  FolderLock(const FolderLock&) = delete;
  FolderLock& operator=(const FolderLock&) = delete;

 private:
  bool take();
  bool replace_stale() const;
  std::string refusal(const std::string& folder, const std::string& what) const;

  std::filesystem::path file_;
  std::string line_;  // what the file says of this process
  int descriptor_ = -1;
  bool has_flock_ = true;  // else the file's content is the lock
};

}  // namespace caldera
