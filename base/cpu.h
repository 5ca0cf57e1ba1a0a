// What this processor can do: everything that depends on the processor asks here, and CALDERA_CPU holds all
// of it to less.
#pragma once
#include <optional>
#include <string>
#include <string_view>
#include <utility>
#include <vector>

namespace caldera {

// Each feature only where all those before it are there too, and where the operating system keeps its
// registers.
struct CpuDescription {
  std::string vendor;  // as CPUID gives it: "GenuineIntel"; empty where the processor is not x86
  int family = 0, model = 0;
  bool sse42 = false;   // with POPCNT
  bool avx2 = false;    // with FMA, F16C, BMI and BMI2
  bool avx512 = false;  // F, BW, VL and DQ
  bool avx512_vnni = false, avx512_bf16 = false;
  bool amx_bf16 = false;

  bool is_intel() const { return vendor == "GenuineIntel"; }
  bool is_amd() const { return vendor == "AuthenticAMD"; }
};

// In ascending order: a processor of one class runs the code of all below it. kOther: not x86.
enum class CpuClass { kOther, kX86_64, kX86_64V2, kAvx2, kAvx512, kAvx512Bf16, kAmx };

// "other", "x86-64", "x86-64-v2", "avx2", "avx512", "avx512_bf16", "amx".
const char* name_of(CpuClass cpu_class);
CpuClass class_of(const CpuDescription& cpu);
// Without the features above `most`. VNNI comes with AVX-512, as the first servers of that class have it.
CpuDescription held_to(CpuDescription cpu, CpuClass most);

// What CPUID and the operating system say.
CpuDescription detect_cpu();
// The class that a value of CALDERA_CPU (x86-64-v2, avx2, avx512, avx512_bf16) asks for; none where it is
// empty. ConfigError: another value, or more than `detected` has.
std::optional<CpuClass> parse_cpu_class(std::string_view value, const CpuDescription& detected);
// This process's processor, held to what CALDERA_CPU asks for; found out once. ConfigError as above.
const CpuDescription& cpu();
// "AuthenticAMD family 26 model 2, avx512_bf16 (held to avx2 by CALDERA_CPU)".
std::string cpu_text();

// The environment variables by which LibTorch, oneDNN, MKL and OpenCV hold themselves to a class. OpenCV's
// depends on what there is to take away: it complains of names that the processor has not.
using Settings = std::vector<std::pair<std::string, std::string>>;
Settings library_settings(CpuClass most, const CpuDescription& detected);
// Sets them, whatever they were, for the class that CALDERA_CPU asks for, if any. True where that changed something: the libraries
// read them as they load, so that the program must start again (restart_program). ConfigError as above.
bool hold_libraries();
// The program from its beginning, with the environment as it is now. Returns only where that fails.
void restart_program(char** argv);

}  // namespace caldera
