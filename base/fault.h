// Faults on purpose, at counted points, for tests: the environment variable CALDERA_FAULT holds
// "KIND@POINT:COUNT[,rank=R][,attempt=A]", several apart by ";". The COUNT-th time (from 1) that this process
// passes POINT, the fault happens.
//
//   points  step, micro_batch, write, fsync, rename, exchange (the swap by which a folder replaces another),
//           lock (the flock() of a folder), and save: each write, fsync, rename or exchange while a
//           checkpoint is saved
//   kinds   sigkill, sigstop, abort, exit0, throw, hang; slow (half a second from then on, each time); nan
//           (of a loss); enospc, eio, enolck, enosys (of a system call; the last two: there is none)
//
// Without the variable a point costs one comparison.
#pragma once
#include <optional>
#include <string>

namespace caldera {

// Replaces what CALDERA_FAULT says; counts begin anew. Throws ConfigError for a text that it cannot read.
void plan_faults(const std::string& text);

// Which rank of which attempt this process is; a fault that names others passes it by.
void set_fault_rank(int rank, int attempt);

enum class Fault { kNone, kNan, kNoSpace, kIoError, kNoLocks, kNoSystemCall };
// Passes a point. Faults that the caller has to act out are returned; of the others this does not return, or
// throws Error.
Fault pass_fault_point(const char* point);
// The same before a system call: also a point of "save" while one is under way. An errno to fail with, or
// none.
std::optional<int> pass_io_point(const char* point);

// While it lives, this process saves a checkpoint.
class SavingScope {
 public:
  SavingScope();
  ~SavingScope();
  SavingScope(const SavingScope&) = delete;
  SavingScope& operator=(const SavingScope&) = delete;
};

}  // namespace caldera
