#include "base/fault.h"

#include <unistd.h>

#include <algorithm>
#include <atomic>
#include <cerrno>
#include <chrono>
#include <csignal>
#include <cstdlib>
#include <memory>
#include <mutex>
#include <string>
#include <thread>
#include <vector>

#include "base/error.h"
#include "base/strings.h"

namespace caldera {
namespace {

struct Planned {
  std::string kind, point;
  int64_t count = 0, passed = 0;
  int rank = -1;  // -1: any
  int attempt = 0;
};

struct Plan {
  std::mutex mutex;
  std::vector<Planned> faults;
  int rank = 0, attempt = 0;
};

int64_t number(const std::string& text, const std::string& fault) {
  int64_t value = 0;
  CALDERA_CHECK(
      !text.empty() && text.size() < 10 && text.find_first_not_of("0123456789") == std::string::npos,
      ConfigError, "CALDERA_FAULT: \"{}\": expected a number, got \"{}\"", fault, text);
  value = std::stoll(text);
  return value;
}

Planned parse_fault(const std::string& text) {
  Planned fault;
  const std::vector<std::string> parts = split(text, ",");
  const size_t at = parts[0].find('@'), colon = parts[0].find(':');
  CALDERA_CHECK(at != std::string::npos && colon != std::string::npos && at < colon, ConfigError,
                "CALDERA_FAULT: expected KIND@POINT:COUNT, got \"{}\"", text);
  fault.kind = parts[0].substr(0, at);
  fault.point = parts[0].substr(at + 1, colon - at - 1);
  fault.count = number(parts[0].substr(colon + 1), text);
  for (size_t i = 1; i < parts.size(); ++i) {
    if (parts[i].starts_with("rank="))
      fault.rank = static_cast<int>(number(parts[i].substr(5), text));
    else if (parts[i].starts_with("attempt="))
      fault.attempt = static_cast<int>(number(parts[i].substr(8), text));
    else
      throw ConfigError(fmt::format("CALDERA_FAULT: \"{}\": unknown \"{}\"", text, parts[i]));
  }
  const std::vector<std::string> kinds = {"sigkill", "sigstop", "abort",  "exit0", "throw",  "hang",
                                          "slow",    "nan",     "enospc", "eio",   "enolck", "enosys"};
  CALDERA_CHECK(std::find(kinds.begin(), kinds.end(), fault.kind) != kinds.end(), ConfigError,
                "CALDERA_FAULT: unknown kind \"{}\"{}", fault.kind, suggestion(fault.kind, kinds));
  return fault;
}

// None where no fault is planned. A plan lives as long as the process: other threads may be at a point of it.
Plan* make_plan(const char* text) {
  if (text == nullptr || *text == '\0') return nullptr;
  auto made = std::make_unique<Plan>();
  for (const std::string& fault : split(text, ";")) made->faults.push_back(parse_fault(fault));
  return made.release();
}

std::atomic<Plan*>& plan() {
  static std::atomic<Plan*> the_plan = make_plan(std::getenv("CALDERA_FAULT"));
  return the_plan;
}

std::atomic<int> g_saving = 0;

Fault act_out(const Planned& fault) {
  if (fault.kind == "sigkill") ::kill(::getpid(), SIGKILL);
  if (fault.kind == "sigstop") ::kill(::getpid(), SIGSTOP);
  if (fault.kind == "abort") std::abort();
  if (fault.kind == "exit0") std::_Exit(0);
  if (fault.kind == "throw")
    throw Error(fmt::format("CALDERA_FAULT: thrown at {} {}", fault.point, fault.count));
  while (fault.kind == "hang") std::this_thread::sleep_for(std::chrono::seconds(1));
  if (fault.kind == "slow") std::this_thread::sleep_for(std::chrono::milliseconds(500));
  if (fault.kind == "nan") return Fault::kNan;
  if (fault.kind == "enospc") return Fault::kNoSpace;
  if (fault.kind == "eio") return Fault::kIoError;
  if (fault.kind == "enolck") return Fault::kNoLocks;
  if (fault.kind == "enosys") return Fault::kNoSystemCall;
  return Fault::kNone;
}

}  // namespace

void plan_faults(const std::string& text) { plan() = make_plan(text.c_str()); }

void set_fault_rank(int rank, int attempt) {
  Plan* const the_plan = plan();
  if (the_plan == nullptr) return;
  const std::lock_guard lock(the_plan->mutex);
  the_plan->rank = rank;
  the_plan->attempt = attempt;
}

Fault pass_fault_point(const char* point) {
  Plan* const the_plan = plan();
  if (the_plan == nullptr) return Fault::kNone;
  std::vector<Planned> due;
  {
    const std::lock_guard lock(the_plan->mutex);
    for (Planned& fault : the_plan->faults) {
      if (fault.point != point || fault.attempt != the_plan->attempt) continue;
      if (fault.rank >= 0 && fault.rank != the_plan->rank) continue;
      ++fault.passed;
      if (fault.passed == fault.count || (fault.kind == "slow" && fault.passed > fault.count))
        due.push_back(fault);
    }
  }
  Fault result = Fault::kNone;
  for (const Planned& fault : due) {
    if (const Fault outcome = act_out(fault); outcome != Fault::kNone) result = outcome;
  }
  return result;
}

std::optional<int> pass_io_point(const char* point) {
  if (plan() == nullptr) return std::nullopt;
  Fault fault = pass_fault_point(point);
  if (fault == Fault::kNone && g_saving > 0) fault = pass_fault_point("save");
  if (fault == Fault::kNoSpace) return ENOSPC;
  if (fault == Fault::kIoError) return EIO;
  if (fault == Fault::kNoLocks) return ENOLCK;
  if (fault == Fault::kNoSystemCall) return ENOSYS;
  return std::nullopt;
}

SavingScope::SavingScope() { ++g_saving; }
SavingScope::~SavingScope() { --g_saving; }

}  // namespace caldera
