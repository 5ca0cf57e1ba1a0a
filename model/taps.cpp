#include "model/taps.h"

#include <fmt/format.h>

#include "base/error.h"

namespace caldera {
namespace {

thread_local TapRecorder::Record current;

}  // namespace

TapRecorder::TapRecorder(Record record) {
  CALDERA_ASSERT(!current);
  current = std::move(record);
}

TapRecorder::~TapRecorder() { current = {}; }

void tap(const char* name, const at::Tensor& value) {
  if (current) current(name, value);
}

void tap(const char* prefix, size_t index, const at::Tensor& value) {
  if (current) current(fmt::format("{}.{}", prefix, index), value);
}

}  // namespace caldera
