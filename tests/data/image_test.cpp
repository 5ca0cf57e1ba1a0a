#include "data/image.h"

#include <gmock/gmock.h>
#include <gtest/gtest.h>

#include <cstdlib>
#include <cstring>

#include "base/files.h"
#include "base/json.h"
#include "data/image_format.h"
#include "data/resize.h"
#include "tests/aten.h"
#include "tests/data/fake_text.h"

namespace caldera {
namespace {

using ::testing::HasSubstr;

const fs::path kGoldens = fs::path(CALDERA_SOURCE_DIR) / "tests/golden/image";

// The same noise as scripts/make_goldens_image.py makes.
Image noise(int64_t height, int64_t width) {
  Image image{height, width, {}};
  uint32_t state = 12345;
  for (int64_t i = 0; i < height * width * 3; ++i) {
    state = state * 1103515245u + 12345u;
    image.pixels.push_back(static_cast<uint8_t>(state >> 24));
  }
  return image;
}

int64_t read_int(const std::string& bytes, size_t& offset) {
  int32_t value = 0;
  std::memcpy(&value, bytes.data() + offset, sizeof value);
  offset += sizeof value;
  return value;
}

std::vector<uint8_t> read_pixels(const std::string& bytes, size_t& offset, int64_t count) {
  const auto begin = bytes.begin() + static_cast<std::ptrdiff_t>(offset);
  offset += static_cast<size_t>(count);
  return {begin, begin + count};
}

// Pixels of RGB as the planes that a tower takes.
std::vector<uint8_t> planes_of(const std::vector<uint8_t>& rgb) {
  std::vector<uint8_t> planes;
  for (size_t c = 0; c < 3; ++c)
    for (size_t i = c; i < rgb.size(); i += 3) planes.push_back(rgb[i]);
  return planes;
}

std::vector<uint8_t> values_of(const at::Tensor& pixels_CYX) {
  const at::Tensor values = pixels_CYX.contiguous();
  return {values.const_data_ptr<uint8_t>(), values.const_data_ptr<uint8_t>() + values.numel()};
}

at::Tensor resize_whole(const Image& image, int64_t height, int64_t width) {
  return resize_bicubic(image, {image.height, image.width}, height, width, {0, 0, height, width});
}

// The TIFF of the goldens with a number of one of its directory's entries, of 16 bits, replaced.
std::string tiff_with(std::string bytes, uint16_t old_tag, uint16_t tag, uint16_t value) {
  uint32_t directory = 0;
  std::memcpy(&directory, bytes.data() + 4, 4);
  uint16_t num_entries = 0;
  std::memcpy(&num_entries, bytes.data() + directory, 2);
  for (size_t i = 0; i < num_entries; ++i) {
    char* entry = bytes.data() + directory + 2 + 12 * i;
    uint16_t found = 0;
    std::memcpy(&found, entry, 2);
    if (found != old_tag) continue;
    const uint16_t kShort = 3;
    const uint32_t count = 1;
    std::memcpy(entry, &tag, 2);
    std::memcpy(entry + 2, &kShort, 2);
    std::memcpy(entry + 4, &count, 4);
    std::memcpy(entry + 8, &value, 2);
    return bytes;
  }
  ADD_FAILURE() << "no tag " << old_tag;
  return bytes;
}

std::string decode_error(std::string_view bytes) {
  return error_of<DataError>([&] { decode_image(bytes, "pic"); });
}

std::string from_hex(std::string_view hex) {
  std::string bytes;
  for (size_t i = 0; i + 1 < hex.size(); i += 2)
    bytes += static_cast<char>(std::stoi(std::string(hex.substr(i, 2)), nullptr, 16));
  return bytes;
}

std::string to_string(const Image& image) { return {image.pixels.begin(), image.pixels.end()}; }

}  // namespace

TEST(Image, ResizeEqualsPillowBitForBit) {
  const std::string golden = read_file(kGoldens / "resize.bin");
  int num_cases = 0;
  for (size_t offset = 0; offset < golden.size(); ++num_cases) {
    const int64_t height = read_int(golden, offset), width = read_int(golden, offset);
    const int64_t new_height = read_int(golden, offset), new_width = read_int(golden, offset);
    const at::Tensor resized_CYX = resize_whole(noise(height, width), new_height, new_width);
    EXPECT_EQ(resized_CYX.sizes(), (at::IntArrayRef{3, new_height, new_width}));
    EXPECT_EQ(values_of(resized_CYX), planes_of(read_pixels(golden, offset, new_height * new_width * 3)))
        << height << "x" << width << " to " << new_height << "x" << new_width;
  }
  EXPECT_EQ(num_cases, 12);
}

TEST(Image, AWindowIsThatPartOfTheWhole) {
  for (const int64_t height : {70, 200}) {  // rows first, and columns first
    const Image image = noise(height, 45);
    const at::Tensor whole_CYX = resize_whole(image, 50, 61);
    const at::Tensor part_CYX = resize_bicubic(image, {height, 45}, 50, 61, {7, 11, 40, 35});
    EXPECT_TRUE(part_CYX.equal(whole_CYX.narrow(1, 7, 40).narrow(2, 11, 35))) << height;
  }
}

// The frame's other pixels are never made; the result is that of a picture which has them.
TEST(Image, AFrameIsAsGoodAsPixels) {
  const std::array<uint8_t, 3> colour = {122, 0, 255};
  for (const auto& [height, width] : {std::pair<int64_t, int64_t>{48, 90}, {90, 33}, {61, 60}, {1, 70}}) {
    const Image image = noise(height, width);
    const int64_t side = std::max(height, width), top = (side - height) / 2, left = (side - width) / 2;
    Image square{side, side, {}};
    for (int64_t y = 0; y < side; ++y)
      for (int64_t i = 0; i < side * 3; ++i) {
        const bool is_inside = y >= top && y < top + height && i >= left * 3 && i < (left + width) * 3;
        const int64_t from = ((y - top) * width - left) * 3 + i;
        square.pixels.push_back(is_inside ? image.pixels[static_cast<size_t>(from)]
                                          : colour[static_cast<size_t>(i % 3)]);
      }
    for (const int64_t size : {17, 80, 130}) {
      const at::Tensor framed =
          resize_bicubic(image, {side, side, top, left, colour}, size, size, {0, 0, size, size});
      EXPECT_TRUE(framed.equal(resize_whole(square, size, size))) << height << "x" << width << " to " << size;
    }
  }
}

TEST(Image, PreprocessEqualsClipImageProcessorAndExpand2square) {
  const std::string golden = read_file(kGoldens / "preprocess.bin");
  ImageSpec spec;
  spec.image_size = 24;
  int num_cases = 0;
  for (size_t offset = 0; offset < golden.size(); ++num_cases) {
    const int64_t height = read_int(golden, offset), width = read_int(golden, offset);
    const bool pad = read_int(golden, offset) != 0;
    const at::Tensor pixels_CYX =
        preprocess_image(noise(height, width), spec, pad ? kAspectPad : kAspectSquare);
    ASSERT_EQ(pixels_CYX.sizes(), (at::IntArrayRef{3, 24, 24}));
    const auto* values = pixels_CYX.data_ptr<uint8_t>();
    EXPECT_EQ(std::vector<uint8_t>(values, values + 3 * 24 * 24), read_pixels(golden, offset, 3 * 24 * 24))
        << height << "x" << width << (pad ? " pad" : " square");
  }
  EXPECT_EQ(num_cases, 12);
}

TEST(Image, DecodesAsPillowDoes) {
  int num_cases = 0;
  for (const auto& entry : fs::directory_iterator(kGoldens)) {
    if (entry.path().extension() != ".rgb") continue;
    const fs::path file = fs::path(entry.path()).replace_extension();
    const std::string expected = read_file(entry.path());
    const Image image = load_image(file);
    ASSERT_EQ(image.height, 18) << file;
    ASSERT_EQ(image.width, 24) << file;
    int worst = 0;
    for (size_t i = 0; i < expected.size(); ++i) {
      worst = std::max(worst, std::abs(image.pixels[i] - static_cast<uint8_t>(expected[i])));
    }
    EXPECT_EQ(worst, 0) << file;
    ++num_cases;
  }
  EXPECT_EQ(num_cases, 28);
}

TEST(Image, EveryTruncationOfAJpegOrPngIsAnError) {
  for (const char* name :
       {"rgb.jpg", "progressive.jpg", "rotated.jpg", "palette.png", "rgb16.png", "lossy.webp", "rgb.bmp"}) {
    const std::string bytes = read_file(kGoldens / name);
    ASSERT_EQ(decode_error(bytes), "accepted") << name;
    for (size_t size = 0; size < bytes.size(); ++size) {
      ASSERT_THAT(decode_error(std::string_view(bytes).substr(0, size)), HasSubstr("pic: "))
          << name << " cut at " << size;
    }
  }
  const std::string jpeg = read_file(kGoldens / "rgb.jpg");
  EXPECT_THAT(decode_error(std::string_view(jpeg).substr(0, jpeg.size() / 2)), HasSubstr("truncated"));
}

TEST(Image, ATiffThatWouldComeOutWrongIsRefusedByItsHeader) {
  const std::string tiff = read_file(kGoldens / "rgb.tiff");
  ASSERT_EQ(tiff.substr(0, 2), "II");
  const auto probe_error = [](const std::string& bytes) {
    return error_of<DataError>([&] { probe_image(bytes, "pic"); });
  };
  constexpr uint16_t kBits = 258, kPhotometric = 262, kOrientation = 274, kExtra = 338, kFormat = 339;
  EXPECT_EQ(probe_error(tiff_with(tiff, kPhotometric, kOrientation, 3)), "accepted");
  for (uint16_t orientation = 5; orientation <= 8; ++orientation)
    EXPECT_THAT(probe_error(tiff_with(tiff, kPhotometric, kOrientation, orientation)),
                HasSubstr(fmt::format("pic: a TIFF that lies on its side (orientation {})", orientation)));
  EXPECT_EQ(probe_error(tiff_with(tiff, kBits, kBits, 16)), "accepted");
  EXPECT_THAT(probe_error(tiff_with(tiff, kBits, kBits, 32)),
              HasSubstr("pic: a TIFF of 3 channels with 32 bits each;"));
  EXPECT_THAT(probe_error(tiff_with(tiff_with(tiff, kBits, kBits, 16), kPhotometric, kExtra, 2)),
              HasSubstr("a TIFF of 3 channels with 16 bits each;"));
  EXPECT_THAT(probe_error(tiff_with(tiff, kPhotometric, kFormat, 3)), HasSubstr("(floating point)"));
}

TEST(Image, TruncatedTiffIsAnError) {
  for (const char* name : {"rgb.tiff", "lzw.tiff"}) {
    const std::string bytes = read_file(kGoldens / name);
    EXPECT_THAT(decode_error(std::string_view(bytes).substr(0, bytes.size() / 2)), HasSubstr("pic: "))
        << name;
  }
}

TEST(Image, AGifCountsUpToItsFirstFrame) {
  const std::string gif = read_file(kGoldens / "palette.gif");
  for (size_t size = 0; size + 1 < gif.size(); ++size)
    ASSERT_THAT(decode_error(std::string_view(gif).substr(0, size)), HasSubstr("pic: ")) << "cut at " << size;
  EXPECT_THAT(decode_error(std::string_view(gif).substr(0, gif.size() / 2)), HasSubstr("truncated"));
  EXPECT_EQ(decode_error(std::string_view(gif).substr(0, gif.size() - 1)),
            "accepted");  // nothing but the trailer is missing
  const std::string animated = read_file(kGoldens / "animated.gif");
  EXPECT_EQ(decode_error(std::string_view(animated).substr(0, animated.size() * 9 / 10)), "accepted");

  std::string changed = gif;
  changed[13 + 3 * 16 + 10] = 9;  // bits of a pixel
  EXPECT_THAT(decode_error(changed), HasSubstr("the picture's data is broken"));
  changed = gif;
  std::fill(changed.end() - 40, changed.end() - 2, '\xFF');  // codes that were never made
  EXPECT_THAT(decode_error(changed), HasSubstr("pic: the picture"));
  EXPECT_THAT(decode_error(std::string("GIF89a\1\0\1\0\0\0\0;", 14)), HasSubstr("a GIF without a frame"));
  changed = gif;
  changed.replace(6, 4, "\xFF\xFF\xFF\xFF");
  EXPECT_THAT(decode_error(changed), HasSubstr("65535 x 65535 pixels is more than the limit"));
}

// Files of two frames of 4 x 3 pixels, and the first one's pixels, by PIL 13.
TEST(Image, AnAnimatedWebpIsItsFirstFrame) {
  const std::string opaque = from_hex(
      "524946460e01000057454250565038580a00000002000000030000020000414e494d06000000000000000000414e4d466c0000"
      "0000"
      "0000000000030000020000640000025650384c530000002f038000005f6016009a3390be40ba82c96512c39ac45cd44492a426"
      "8f1f"
      "2286902c3d4100c938e18c33c238e38c33ffe1e8d4db054734553e8022b37f458de9777b401660a2318cf9f4461146f411fd8f"
      "3e43"
      "00414e4d466e000000000000000000030000020000640000005650384c560000002f038000005f601600138a7dfb063282be08"
      "1208"
      "a62fa59402511bdb369cfefb8a8c4ca629040124e38433ce08e38c33cefc477fe600e5c0e6bc5af3cfa271b766cb9e900ec802"
      "4cae"
      "c1ec8f2d9f2c428de87f50f301");
  EXPECT_EQ(to_string(decode_image(opaque, "pic")),
            from_hex("41c700961a28271150c45c78f9cf00951328d9ef509c4478bf39000f69280a4650315778"));
  const std::string transparent = from_hex(
      "524946461601000057454250565038580a00000012000000030000020000414e494d06000000000000000000414e4d46720000"
      "0000"
      "0000000000030000020000640000025650384c5a0000002f038000105fa02492154abe0a64a01996704fd18012e86f1e35916c"
      "353f"
      "b7bf0fc40a25284107da09b26d86739ca10ee7380282a2e74c0ff3fd5bf102849ae4a0efcb0646fc83a19a01598069f49ec024"
      "1288"
      "218122fa1f7d86414e4d4670000000000000000000030000020000640000025650384c570000002f038000105fa02600082685"
      "f16b"
      "a6005db412458219445124496dfce237901c44251416300041b64d718e73d4210a088a9e333dec6d0f80af0e7d114dfee5815a"
      "be1f"
      "ef44036401a6d1770e03882181208ae87f50f30100");
  EXPECT_EQ(to_string(decode_image(transparent, "pic")),
            from_hex("41c700961a28271150c45c78f9cf00951328d9ef509c4478bf39000f69280a4650315778"));

  // On a larger picture the frame lies at its place and the rest is black.
  std::string larger = opaque;
  larger[24] = 7;  // 8 x 6 pixels
  larger[27] = 5;
  larger[52] = 1;  // at 2, 2
  larger[55] = 1;
  const Image image = decode_image(larger, "pic");
  ASSERT_EQ(image.width, 8);
  ASSERT_EQ(image.height, 6);
  EXPECT_EQ(image.pixels[0], 0);
  EXPECT_EQ(image.pixels[(2 * 8 + 2) * 3], 0x41);
  EXPECT_EQ(image.pixels[(4 * 8 + 5) * 3 + 2], 0x78);
  EXPECT_EQ(image.pixels[(2 * 8 + 6) * 3 + 1], 0);

  larger[52] = 9;
  EXPECT_THAT(decode_error(larger),
              HasSubstr("pic: an animated WebP whose first frame (4 x 3 at 18, 2) reaches"));
  std::string lacking = opaque;
  for (size_t at = lacking.find("ANMF"); at != std::string::npos; at = lacking.find("ANMF", at + 1))
    lacking[at] = 'X';
  EXPECT_THAT(decode_error(lacking), HasSubstr("pic: an animated WebP without a whole frame"));
  for (size_t at = 0; at < opaque.size(); ++at) {  // whatever is broken is an error, or pixels
    std::string broken = opaque;
    broken[at] = static_cast<char>(~broken[at]);
    const std::string error = decode_error(broken);
    EXPECT_TRUE(error == "accepted" || error.starts_with("pic: ")) << error;
  }
}

TEST(Image, BytesAfterTheEndAreAllowed) {
  const std::string jpeg = read_file(kGoldens / "rgb.jpg");
  EXPECT_EQ(decode_image(jpeg + "trailing \xFF bytes", "pic").pixels, decode_image(jpeg, "pic").pixels);
}

TEST(Image, RefusesAJpegOfVeryManyScans) {
  const std::string jpeg = read_file(kGoldens / "progressive.jpg");
  const size_t last_scan = jpeg.rfind("\xFF\xDA");
  const auto with_scans = [&](int num_more) {
    std::string bytes = jpeg.substr(0, jpeg.size() - 2);
    for (int i = 0; i < num_more; ++i) bytes += jpeg.substr(last_scan, jpeg.size() - 2 - last_scan);
    return bytes + "\xFF\xD9";
  };
  EXPECT_EQ(decode_error(with_scans(60)), "accepted");
  EXPECT_THAT(decode_error(with_scans(120)), HasSubstr("pic: a JPEG of more than 100 scans"));
}

TEST(Image, RefusesPixelBombsBeforeDecoding) {
  std::string png = read_file(kGoldens / "rgb.png");
  const std::string size("\0\0\x27\x10\0\0\x27\x10", 8);  // 10000 x 10000
  png.replace(16, 8, size);
  EXPECT_THAT(decode_error(png), HasSubstr("10000 x 10000 pixels is more than the limit of 89478485"));
  png.replace(16, 8, std::string("\xFF\xFF\xFF\xFF\xFF\xFF\xFF\xFF", 8));
  EXPECT_THAT(decode_error(png), HasSubstr("more than the limit"));
  png.replace(16, 8, std::string(8, '\0'));
  EXPECT_THAT(decode_error(png), HasSubstr("0 x 0 pixels"));
}

TEST(Image, SaysWhatAFileIsInstead) {
  EXPECT_THAT(decode_error("<html>not found</html>"), HasSubstr("not a picture"));
  EXPECT_THAT(decode_error(""), HasSubstr("the file is empty"));
  EXPECT_THAT(decode_error(std::string("II\x2B\0\x08\0\0\0", 8)), HasSubstr("BigTIFF"));
  EXPECT_THAT(error_of<DataError>([] { load_image("/nowhere/a.jpg"); }), HasSubstr("/nowhere/a.jpg"));
}

TEST(Image, BrokenDataIsAnError) {
  std::string png = read_file(kGoldens / "rgb.png");
  const size_t data = png.find("IDAT") + 8;
  for (size_t i = data; i < data + 8; ++i) png[i] = static_cast<char>(~png[i]);
  EXPECT_THAT(decode_error(png), HasSubstr("pic: the picture"));
}

TEST(Image, RefusesUnknownAspect) {
  EXPECT_THAT(error_of<ConfigError>([] { preprocess_image(noise(4, 4), {}, "anyres"); }),
              HasSubstr("\"anyres\""));
}

// Pictures named by tests/parity/pixels.py: what decode_image and preprocess_image make of them, as one file
// of bytes and a description.
TEST(PixelsJob, AnswersTheParityScript) {
  const char* file = std::getenv("CALDERA_PIXELS_JOB");
  if (file == nullptr) GTEST_SKIP() << "runs for tests/parity/pixels.py alone";
  const Json job = read_json(file);
  ImageSpec spec;
  spec.image_size = job["image_size"].get<int64_t>();
  Json out = Json::array();
  std::string bytes;
  for (const Json& picture : job["pictures"]) {
    Json entry = Json::object();
    try {
      const Image image = load_image(picture.get<std::string>());
      entry = {{"height", image.height}, {"width", image.width}, {"at", bytes.size()}};
      bytes.append(image.pixels.begin(), image.pixels.end());
      for (const bool keeps_aspect : {true, false})
        for (const char* aspect : {kAspectSquare, kAspectPad}) {
          spec.keeps_aspect = keeps_aspect;
          const at::Tensor pixels_CYX = preprocess_image(image, spec, aspect);
          bytes.append(static_cast<const char*>(pixels_CYX.data_ptr()), pixels_CYX.nbytes());
        }
    } catch (const DataError& error) {
      entry = {{"error", error.what()}};
    }
    out.push_back(entry);
  }
  write_file_atomic(job["bytes"].get<std::string>(), bytes);
  write_json(job["out"].get<std::string>(), out);
}

}  // namespace caldera
