// The main() of all test programs: they run on the processor that CALDERA_CPU makes of this one, as the
// binary does.
#include <gmock/gmock.h>

#include <cstdio>

#include "base/cpu.h"
#include "base/error.h"

int main(int argc, char** argv) {
  try {
    if (caldera::hold_libraries()) {
      caldera::restart_program(argv);
      throw caldera::Error("the program cannot start itself anew (/proc/self/exe)");
    }
  } catch (const caldera::Error& error) {
    std::fprintf(stderr, "error: %s\n", error.what());
    return error.exit_code();
  }
  ::testing::InitGoogleMock(&argc, argv);
  return RUN_ALL_TESTS();
}
