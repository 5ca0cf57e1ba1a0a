#include "base/cpu.h"

#include <gmock/gmock.h>

#include <algorithm>
#include <fstream>
#include <map>
#include <set>

#include "base/error.h"
#include "base/simd_level.h"
#include "base/strings.h"

namespace caldera {
namespace {

using ::testing::ElementsAre;
using ::testing::IsEmpty;
using ::testing::Pair;
using ::testing::ThrowsMessage;

struct Processor {
  const char* name;
  CpuDescription cpu;
  CpuClass cpu_class;
};
const std::vector<Processor>& processors() {
  static const std::vector<Processor> result = [] {
    const CpuDescription old{.vendor = "GenuineIntel", .family = 15, .model = 4};
    CpuDescription nehalem{.vendor = "GenuineIntel", .family = 6, .model = 26, .sse42 = true};
    CpuDescription haswell = nehalem, milan = nehalem;
    haswell.model = 63;
    haswell.avx2 = true;
    milan = {.vendor = "AuthenticAMD", .family = 25, .model = 1, .sse42 = true, .avx2 = true};
    CpuDescription genoa = milan, skylake = haswell;
    genoa.model = 17;
    genoa.avx512 = genoa.avx512_vnni = genoa.avx512_bf16 = true;
    skylake.model = 85;
    skylake.avx512 = true;
    CpuDescription cascade_lake = skylake;
    cascade_lake.avx512_vnni = true;
    CpuDescription cooper_lake = cascade_lake;
    cooper_lake.avx512_bf16 = true;
    CpuDescription sapphire_rapids = cooper_lake;
    sapphire_rapids.model = 143;
    sapphire_rapids.amx_bf16 = true;
    return std::vector<Processor>{{"not x86", {}, CpuClass::kOther},
                                  {"Pentium 4", old, CpuClass::kX86_64},
                                  {"Nehalem", nehalem, CpuClass::kX86_64V2},
                                  {"Haswell", haswell, CpuClass::kAvx2},
                                  {"EPYC Milan", milan, CpuClass::kAvx2},
                                  {"EPYC Genoa", genoa, CpuClass::kAvx512Bf16},
                                  {"Skylake-SP", skylake, CpuClass::kAvx512},
                                  {"Cascade Lake", cascade_lake, CpuClass::kAvx512},
                                  {"Cooper Lake", cooper_lake, CpuClass::kAvx512Bf16},
                                  {"Sapphire Rapids", sapphire_rapids, CpuClass::kAmx}};
  }();
  return result;
}
const CpuDescription& processor(const std::string& name) {
  for (const Processor& known : processors())
    if (known.name == name) return known.cpu;
  throw Error("no such processor in this test: " + name);
}

TEST(Cpu, ClassesOfProcessors) {
  for (const auto& [name, cpu, cpu_class] : processors()) EXPECT_EQ(class_of(cpu), cpu_class) << name;
  EXPECT_TRUE(processor("EPYC Milan").is_amd());
  EXPECT_FALSE(processor("EPYC Milan").is_intel());
  EXPECT_TRUE(processor("Haswell").is_intel());
}

TEST(Cpu, AProcessorHeldToAClassIsOfThatClass) {
  for (const auto& [name, cpu, cpu_class] : processors()) {
    if (cpu_class == CpuClass::kOther) continue;
    for (const CpuClass most : {CpuClass::kX86_64, CpuClass::kX86_64V2, CpuClass::kAvx2, CpuClass::kAvx512,
                                CpuClass::kAvx512Bf16, CpuClass::kAmx})
      EXPECT_EQ(class_of(held_to(cpu, most)), std::min(most, cpu_class)) << name << ", " << name_of(most);
  }
  const CpuDescription& sapphire_rapids = processor("Sapphire Rapids");
  EXPECT_TRUE(held_to(sapphire_rapids, CpuClass::kAvx512).avx512_vnni);
  EXPECT_FALSE(held_to(sapphire_rapids, CpuClass::kAvx512).avx512_bf16);
  EXPECT_FALSE(held_to(sapphire_rapids, CpuClass::kAvx512Bf16).amx_bf16);
  const CpuDescription avx2 = held_to(sapphire_rapids, CpuClass::kAvx2);
  EXPECT_TRUE(avx2.avx2 && avx2.sse42);
  EXPECT_FALSE(avx2.avx512 || avx2.avx512_vnni || avx2.avx512_bf16 || avx2.amx_bf16);
  EXPECT_EQ(avx2.model, 143);
}

TEST(Cpu, CalderaCpuAsksForAClass) {
  const CpuDescription& genoa = processor("EPYC Genoa");
  EXPECT_EQ(parse_cpu_class("", genoa), std::nullopt);
  EXPECT_EQ(parse_cpu_class("x86-64-v2", genoa), CpuClass::kX86_64V2);
  EXPECT_EQ(parse_cpu_class("avx2", genoa), CpuClass::kAvx2);
  EXPECT_EQ(parse_cpu_class("avx512", genoa), CpuClass::kAvx512);
  EXPECT_EQ(parse_cpu_class("avx512_bf16", genoa), CpuClass::kAvx512Bf16);
}

TEST(Cpu, CalderaCpuThatCannotBeObeyedIsRefused) {
  const auto refused = [](const char* value, const char* name, const std::string& message) {
    EXPECT_THAT([&] { parse_cpu_class(value, processor(name)); }, ThrowsMessage<ConfigError>(message));
  };
  refused("foo", "EPYC Genoa",
          "CALDERA_CPU: expected one of x86-64-v2, avx2, avx512, avx512_bf16, got \"foo\"");
  refused("AVX2", "EPYC Genoa",
          "CALDERA_CPU: expected one of x86-64-v2, avx2, avx512, avx512_bf16, got \"AVX2\"");
  refused(
      "avx512_bf6", "EPYC Genoa",
      "CALDERA_CPU: expected one of x86-64-v2, avx2, avx512, avx512_bf16, got \"avx512_bf6\"; did you mean "
      "\"avx512_bf16\"?");
  refused("amx", "Sapphire Rapids",
          "CALDERA_CPU: expected one of x86-64-v2, avx2, avx512, avx512_bf16, got \"amx\"");
  refused("avx512", "EPYC Milan",
          "CALDERA_CPU=avx512: this processor (AuthenticAMD, family 25) has avx2 at most; unset it or ask "
          "for less");
  refused("avx512_bf16", "Cascade Lake",
          "CALDERA_CPU=avx512_bf16: this processor (GenuineIntel, family 6) has avx512 at most; unset it or "
          "ask for less");
  refused("x86-64-v2", "Pentium 4",
          "CALDERA_CPU=x86-64-v2: this processor (GenuineIntel, family 15) has x86-64 at most; unset it or "
          "ask for less");
  refused("avx2", "not x86", "CALDERA_CPU=avx2: this processor is not an x86-64 one; unset it");
}

TEST(Cpu, LibrariesAreHeldToTheSameClass) {
  const CpuDescription& genoa = processor("EPYC Genoa");
  EXPECT_THAT(library_settings(CpuClass::kX86_64V2, genoa),
              ElementsAre(Pair("ATEN_CPU_CAPABILITY", "default"), Pair("ONEDNN_MAX_CPU_ISA", "SSE41"),
                          Pair("MKL_ENABLE_INSTRUCTIONS", "SSE4_2"),
                          Pair("OPENCV_CPU_DISABLE", "FP16,AVX,AVX2,FMA3,AVX512-SKX")));
  EXPECT_THAT(library_settings(CpuClass::kAvx2, genoa),
              ElementsAre(Pair("ATEN_CPU_CAPABILITY", "avx2"), Pair("ONEDNN_MAX_CPU_ISA", "AVX2"),
                          Pair("MKL_ENABLE_INSTRUCTIONS", "AVX2"), Pair("OPENCV_CPU_DISABLE", "AVX512-SKX")));
  EXPECT_THAT(library_settings(CpuClass::kAvx512, genoa),
              ElementsAre(Pair("ATEN_CPU_CAPABILITY", "avx512"), Pair("ONEDNN_MAX_CPU_ISA", "AVX512_CORE"),
                          Pair("MKL_ENABLE_INSTRUCTIONS", "AVX512")));
  EXPECT_THAT(
      library_settings(CpuClass::kAvx512Bf16, genoa),
      ElementsAre(Pair("ATEN_CPU_CAPABILITY", "avx512"), Pair("ONEDNN_MAX_CPU_ISA", "AVX512_CORE_BF16"),
                  Pair("MKL_ENABLE_INSTRUCTIONS", "AVX512")));
  // OpenCV complains of features that are not there to be taken away.
  EXPECT_EQ(library_settings(CpuClass::kX86_64V2, processor("EPYC Milan")).back().second,
            "FP16,AVX,AVX2,FMA3");
  EXPECT_EQ(library_settings(CpuClass::kAvx2, processor("EPYC Milan")).size(), 3u);
  EXPECT_THAT(library_settings(CpuClass::kAmx, processor("Sapphire Rapids")), IsEmpty());
}

#if defined(__x86_64__) && defined(__linux__)
// Linux lists what it found in CPUID and lets programs use.
TEST(Cpu, TheKernelFindsTheSameFeatures) {
  std::ifstream file("/proc/cpuinfo");
  std::map<std::string, std::string> fields;
  for (std::string line; std::getline(file, line) && !line.empty();) {
    const size_t colon = line.find(':');
    if (colon != std::string::npos) fields[strip(line.substr(0, colon))] = strip(line.substr(colon + 1));
  }
  const std::vector<std::string> names_of_flags = split(fields["flags"], " ");
  const std::set<std::string> flags(names_of_flags.begin(), names_of_flags.end());
  const auto has = [&](std::initializer_list<const char*> names) {
    return std::all_of(names.begin(), names.end(), [&](const char* name) { return flags.contains(name); });
  };
  if (fields["flags"].empty()) GTEST_SKIP() << "/proc/cpuinfo tells nothing";
  const CpuDescription cpu = detect_cpu();
  EXPECT_EQ(cpu.vendor, fields["vendor_id"]);
  EXPECT_EQ(std::to_string(cpu.family), fields["cpu family"]);
  EXPECT_EQ(std::to_string(cpu.model), fields["model"]);
  EXPECT_EQ(cpu.sse42, has({"sse4_2", "popcnt"}));
  EXPECT_EQ(cpu.avx2, has({"avx2", "fma", "f16c", "bmi1", "bmi2"}));
  EXPECT_EQ(cpu.avx512, has({"avx512f", "avx512bw", "avx512vl", "avx512dq"}));
  EXPECT_EQ(cpu.avx512_vnni, has({"avx512_vnni"}));
  EXPECT_EQ(cpu.avx512_bf16, has({"avx512_bf16"}));
  EXPECT_EQ(cpu.amx_bf16, has({"amx_tile", "amx_bf16"}));
}
#endif

// A value is returned, a reference stays one, and each version that this processor runs does the same.
CALDERA_INLINE int64_t sum_and_count(const int64_t* x, int64_t count, int64_t& calls) {
  int64_t sum = 0;
  for (int64_t i = 0; i < count; ++i) sum += x[i] * x[i];
  ++calls;
  return sum;
}
TEST(Simd, EachLevelComputesTheSame) {
  const std::vector<int64_t> x = {1, -2, 3, -4, 5, -6, 7, -8, 9, -10, 11};
  const int64_t count = std::ssize(x);
  int64_t calls = 0;
  using Versions = simd::Compiled<sum_and_count>;
  EXPECT_EQ(simd::run<sum_and_count>(x.data(), count, calls), 506);
  EXPECT_EQ(Versions::on_baseline(x.data(), count, calls), 506);
  EXPECT_EQ(calls, 2);
#ifdef __x86_64__
  if (detect_cpu().avx2) {
    EXPECT_EQ(Versions::on_avx2(x.data(), count, calls), 506);
  }
  if (detect_cpu().avx512) {
    EXPECT_EQ(Versions::on_avx512(x.data(), count, calls), 506);
  }
#endif
}

TEST(Simd, TheLevelIsThatOfTheProcessor) {
  EXPECT_EQ(simd::level_of(processor("not x86")), simd::Level::kBaseline);
  EXPECT_EQ(simd::level_of(processor("Nehalem")), simd::Level::kBaseline);
  EXPECT_EQ(simd::level_of(processor("EPYC Milan")), simd::Level::kAvx2);
  EXPECT_EQ(simd::level_of(processor("Skylake-SP")), simd::Level::kAvx512);
  EXPECT_EQ(simd::level(), simd::level_of(cpu()));
}

}  // namespace
}  // namespace caldera
