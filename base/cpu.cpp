#include "base/cpu.h"

#include <unistd.h>
#ifdef __x86_64__
#include <cpuid.h>
#endif

#include <algorithm>
#include <array>
#include <cstdint>
#include <cstdlib>
#include <cstring>
#include <filesystem>

#include "base/error.h"
#include "base/strings.h"

namespace caldera {
namespace {

constexpr const char* kCpuVariable = "CALDERA_CPU";
// Those that CALDERA_CPU may ask for: to hold a processor to the highest of all would change nothing.
constexpr std::array kAskable = {CpuClass::kX86_64V2, CpuClass::kAvx2, CpuClass::kAvx512,
                                 CpuClass::kAvx512Bf16};

#ifdef __x86_64__
struct Registers {
  uint32_t eax = 0, ebx = 0, ecx = 0, edx = 0;
};
// Zeros where the processor does not know this leaf.
Registers cpuid(uint32_t leaf, uint32_t part = 0) {
  Registers r;
  __get_cpuid_count(leaf, part, &r.eax, &r.ebx, &r.ecx, &r.edx);
  return r;
}
// Whose registers the operating system keeps when it changes between threads.
uint64_t kept_state(bool can_be_asked) {
  if (!can_be_asked) return 0;
  uint32_t low = 0, high = 0;
  asm volatile("xgetbv" : "=a"(low), "=d"(high) : "c"(0));
  return uint64_t{high} << 32 | low;
}
bool has_bits(uint32_t word, std::initializer_list<int> bits) {
  return std::all_of(bits.begin(), bits.end(), [&](int bit) { return (word >> bit & 1) != 0; });
}
#endif

struct ThisCpu {
  CpuDescription detected;
  std::optional<CpuClass> asked;
  CpuDescription held;
};
const ThisCpu& this_cpu() {
  static const ThisCpu result = [] {
    ThisCpu found;
    found.detected = detect_cpu();
    const char* value = std::getenv(kCpuVariable);
    found.asked = parse_cpu_class(value ? value : "", found.detected);
    found.held = found.asked ? held_to(found.detected, *found.asked) : found.detected;
    return found;
  }();
  return result;
}

}  // namespace

const char* name_of(CpuClass cpu_class) {
  switch (cpu_class) {
    case CpuClass::kOther:
      return "other";
    case CpuClass::kX86_64:
      return "x86-64";
    case CpuClass::kX86_64V2:
      return "x86-64-v2";
    case CpuClass::kAvx2:
      return "avx2";
    case CpuClass::kAvx512:
      return "avx512";
    case CpuClass::kAvx512Bf16:
      return "avx512_bf16";
    case CpuClass::kAmx:
      return "amx";
  }
  return "other";
}

CpuClass class_of(const CpuDescription& cpu) {
  if (cpu.vendor.empty()) return CpuClass::kOther;
  if (cpu.amx_bf16) return CpuClass::kAmx;
  if (cpu.avx512_bf16) return CpuClass::kAvx512Bf16;
  if (cpu.avx512) return CpuClass::kAvx512;
  if (cpu.avx2) return CpuClass::kAvx2;
  return cpu.sse42 ? CpuClass::kX86_64V2 : CpuClass::kX86_64;
}

CpuDescription held_to(CpuDescription cpu, CpuClass most) {
  cpu.amx_bf16 &= most >= CpuClass::kAmx;
  cpu.avx512_bf16 &= most >= CpuClass::kAvx512Bf16;
  cpu.avx512_vnni &= most >= CpuClass::kAvx512;
  cpu.avx512 &= most >= CpuClass::kAvx512;
  cpu.avx2 &= most >= CpuClass::kAvx2;
  cpu.sse42 &= most >= CpuClass::kX86_64V2;
  return cpu;
}

CpuDescription detect_cpu() {
  CpuDescription cpu;
#ifdef __x86_64__
  const Registers maker = cpuid(0), basic = cpuid(1), extended = cpuid(7), more = cpuid(7, 1);
  char vendor[12];
  std::memcpy(vendor, &maker.ebx, 4);
  std::memcpy(vendor + 4, &maker.edx, 4);
  std::memcpy(vendor + 8, &maker.ecx, 4);
  cpu.vendor.assign(vendor, sizeof vendor);
  const auto part = [&](int shift, uint32_t mask) { return static_cast<int>(basic.eax >> shift & mask); };
  cpu.family = part(8, 0xF);
  cpu.model = part(4, 0xF);
  if (cpu.family == 6 || cpu.family == 15) cpu.model += part(16, 0xF) << 4;
  if (cpu.family == 15) cpu.family += part(20, 0xFF);
  const uint64_t state = kept_state(has_bits(basic.ecx, {27}));
  const auto keeps = [&](uint64_t mask) { return (state & mask) == mask; };
  cpu.sse42 = has_bits(basic.ecx, {20, 23});
  cpu.avx2 =
      cpu.sse42 && keeps(0x6) && has_bits(basic.ecx, {12, 28, 29}) && has_bits(extended.ebx, {3, 5, 8});
  cpu.avx512 = cpu.avx2 && keeps(0xE6) && has_bits(extended.ebx, {16, 17, 30, 31});
  cpu.avx512_vnni = cpu.avx512 && has_bits(extended.ecx, {11});
  cpu.avx512_bf16 = cpu.avx512 && has_bits(more.eax, {5});
  cpu.amx_bf16 = cpu.avx512_bf16 && keeps(0x60000) && has_bits(extended.edx, {22, 24});
#endif
  return cpu;
}

std::optional<CpuClass> parse_cpu_class(std::string_view value, const CpuDescription& detected) {
  if (value.empty()) return std::nullopt;
  std::vector<std::string> names;
  for (const CpuClass askable : kAskable) names.push_back(name_of(askable));
  const auto found = std::find(names.begin(), names.end(), value);
  if (found == names.end()) {
    const std::string near = near_match(value, names);
    throw ConfigError(fmt::format("{}: expected one of {}, got \"{}\"{}", kCpuVariable, join(names, ", "),
                                  value, near.empty() ? "" : fmt::format("; did you mean \"{}\"?", near)));
  }
  CALDERA_CHECK(!detected.vendor.empty(), ConfigError, "{}={}: this processor is not an x86-64 one; unset it",
                kCpuVariable, value);
  const CpuClass asked = kAskable[static_cast<size_t>(found - names.begin())], most = class_of(detected);
  CALDERA_CHECK(asked <= most, ConfigError,
                "{}={}: this processor ({}, family {}) has {} at most; unset it or ask for less",
                kCpuVariable, value, detected.vendor, detected.family, name_of(most));
  return asked;
}

const CpuDescription& cpu() { return this_cpu().held; }

std::string cpu_text() {
  const auto& [detected, asked, held] = this_cpu();
  const CpuClass has = class_of(detected);
  if (has == CpuClass::kOther) return name_of(has);
  return fmt::format(
      "{} family {} model {}, {}{}", detected.vendor, detected.family, detected.model, name_of(has),
      asked && *asked < has ? fmt::format(" (held to {} by {})", name_of(*asked), kCpuVariable) : "");
}

Settings library_settings(CpuClass most, const CpuDescription& detected) {
  Settings settings;
  const auto set = [&](const char* aten, const char* onednn, const char* mkl) {
    settings = {
        {"ATEN_CPU_CAPABILITY", aten}, {"ONEDNN_MAX_CPU_ISA", onednn}, {"MKL_ENABLE_INSTRUCTIONS", mkl}};
  };
  switch (most) {
    case CpuClass::kOther:
    case CpuClass::kAmx:
      return {};
    case CpuClass::kX86_64:
    case CpuClass::kX86_64V2:
      set("default", "SSE41", "SSE4_2");
      break;
    case CpuClass::kAvx2:
      set("avx2", "AVX2", "AVX2");
      break;
    case CpuClass::kAvx512:
      set("avx512", "AVX512_CORE", "AVX512");
      break;
    case CpuClass::kAvx512Bf16:
      set("avx512", "AVX512_CORE_BF16", "AVX512");
      break;  // MKL multiplies no bfloat16 here
  }
  std::vector<std::string> too_much;
  if (detected.avx2 && most < CpuClass::kAvx2) too_much = {"FP16", "AVX", "AVX2", "FMA3"};
  if (detected.avx512 && most < CpuClass::kAvx512) too_much.push_back("AVX512-SKX");
  if (!too_much.empty()) settings.emplace_back("OPENCV_CPU_DISABLE", join(too_much, ","));
  return settings;
}

bool hold_libraries() {
  const auto& [detected, asked, held] = this_cpu();
  if (!asked) return false;
  bool changed = false;
  for (const auto& [name, value] : library_settings(*asked, detected)) {
    const char* before = std::getenv(name.c_str());
    if (before && before == value) continue;
    ::setenv(name.c_str(), value.c_str(), 1);
    changed = true;
  }
  return changed;
}

void restart_program(char** argv) {
  std::error_code error;
  const std::filesystem::path program = std::filesystem::read_symlink("/proc/self/exe", error);
  if (!error) ::execv(program.c_str(), argv);
}

}  // namespace caldera
