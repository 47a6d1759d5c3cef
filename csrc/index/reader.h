#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdint>
#include <cstring>
#include <limits>
#include <stdexcept>
#include <string>
#include <system_error>
#include <vector>

#if __BYTE_ORDER__ != __ORDER_LITTLE_ENDIAN__
#error "the files are little-endian and are read without conversion"
#endif

namespace megalite {

// The tables start at byte 34, so nothing in a mapped index is aligned.
template <class T>
T load(const void* base, int64_t i = 0) {
  T value;
  std::memcpy(&value, static_cast<const char*>(base) + i * static_cast<int64_t>(sizeof(T)), sizeof(T));
  return value;
}

class File {
 public:
  explicit File(const std::string& path) : path_(path), fd_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    if (fd_ < 0 && (errno == ENOENT || errno == ENOTDIR)) {
      throw std::invalid_argument(path +
                                  ": no such file; name the prefix of a .bin/.idx pair, without the suffix, or make "
                                  "one with tools/preprocess_data.py");
    }
    if (fd_ < 0) fail();
  }
  ~File() {
    if (fd_ >= 0) close(fd_);
  }
  File(const File&) = delete;
  File& operator=(const File&) = delete;

  int64_t size() const {
    struct stat info;
    if (fstat(fd_, &info) != 0) fail();
    return info.st_size;
  }

  // Copies `count` bytes at `offset`. Unlike with a mapping, truncation in the meantime is an error, not a SIGBUS.
  void read(void* to, int64_t offset, int64_t count) const {
    char* at = static_cast<char*>(to);
    while (count > 0) {
      const ssize_t got = pread(fd_, at, count, offset);
      if (got < 0 && errno == EINTR) continue;
      if (got < 0) fail();
      if (got == 0) throw damaged("ends at byte " + std::to_string(offset) + ", it was truncated while in use");
      at += got, offset += got, count -= got;
    }
  }

  int fd() const { return fd_; }

  std::invalid_argument error(const std::string& found) const { return std::invalid_argument(path_ + ": " + found); }

  std::invalid_argument damaged(const std::string& found) const {
    return error(found +
                 "; the file is damaged or of another kind, write the .bin/.idx pair again with "
                 "tools/preprocess_data.py");
  }

 private:
  [[noreturn]] void fail() const { throw std::system_error(errno, std::generic_category(), path_); }

  std::string path_;
  int fd_;
};

class Mapping {
 public:
  Mapping(const File& file, int64_t size)
      : size_(size), data_(mmap(nullptr, size, PROT_READ, MAP_SHARED, file.fd(), 0)) {
    if (data_ == MAP_FAILED) throw std::system_error(errno, std::generic_category(), "mmap");
  }
  ~Mapping() { munmap(data_, size_); }
  Mapping(const Mapping&) = delete;
  Mapping& operator=(const Mapping&) = delete;

  const char* at(int64_t offset) const { return static_cast<const char*>(data_) + offset; }

 private:
  int64_t size_;
  void* data_;
};

struct TokenType {
  const char* name;  // as numpy spells it
  int64_t size;
};

// A pair prefix.{bin,idx}, fully checked when it is opened. The index is mapped, tokens are read with pread.
class Reader {
 public:
  explicit Reader(const std::string& prefix)
      : idx_(prefix + ".idx"), bin_(prefix + ".bin"), idx_size_(checked_size()), map_(idx_, idx_size_) {
    check_header();
    check_documents();
    check_sequences();
  }

  int64_t num_sequences = 0, num_boundaries = 0, num_tokens = 0;
  TokenType type{};

  const char* lengths() const { return map_.at(kHeader); }
  const char* offsets() const { return map_.at(kHeader + 4 * num_sequences); }
  const char* documents() const { return map_.at(kHeader + 12 * num_sequences); }

  int64_t length(int64_t i) const { return load<int32_t>(lengths(), i); }
  int64_t offset(int64_t i) const { return load<int64_t>(offsets(), i); }

  void read(void* to, int64_t byte, int64_t count) const { bin_.read(to, byte, count); }

  // Whether sequences are back to back in order; otherwise there is no flat stream.
  bool contiguous() const { return contiguous_; }

  void require_contiguous() const {
    if (!contiguous_) {
      throw idx_.damaged("has offsets that are not back to back in sequence order, expected them to be");
    }
  }

  int64_t max_token() const {
    require_contiguous();
    switch (type.size) {
      case 1:
        return type.name[0] == 'u' ? largest<uint8_t>() : largest<int8_t>();
      case 2:
        return type.name[0] == 'u' ? largest<uint16_t>() : largest<int16_t>();
      case 4:
        return largest<int32_t>();
      default:
        return largest<int64_t>();
    }
  }

 private:
  static constexpr int64_t kHeader = 34;

  static std::string text(int64_t n) { return std::to_string(n); }

  int64_t checked_size() const {
    const int64_t size = idx_.size();
    if (size < kHeader) throw idx_.damaged("is " + text(size) + " bytes, shorter than the 34-byte header");
    return size;
  }

  void check_header() {
    const char* head = map_.at(0);
    if (std::memcmp(head, "MMIDIDX\0\0", 9) != 0) throw idx_.damaged("does not start with MMIDIDX");
    const uint64_t version = load<uint64_t>(head + 9), sequences = load<uint64_t>(head + 18),
                   boundaries = load<uint64_t>(head + 26);
    if (version != 1) throw idx_.damaged("has version " + std::to_string(version) + ", expected 1");
    static constexpr TokenType kTypes[] = {{nullptr, 0}, {"uint8", 1}, {"int8", 1},  {"int16", 2}, {"int32", 4},
                                           {"int64", 8}, {nullptr, 0}, {nullptr, 0}, {"uint16", 2}};
    const int code = load<uint8_t>(head + 17);
    if (code == 6 || code == 7) {
      throw idx_.error(std::string("contains ") + (code == 6 ? "float64" : "float32") + " numbers (dtype code " +
                       text(code) +
                       "), but token ids are integers; name a prefix of tokens written by tools/preprocess_data.py");
    }
    if (code >= 9 || kTypes[code].name == nullptr) {
      throw idx_.damaged("has dtype code " + text(code) + ", expected an integer type: 1, 2, 3, 4, 5 or 8");
    }
    type = kTypes[code];
    const std::string counts =
        std::to_string(sequences) + " sequences and " + std::to_string(boundaries) + " document boundaries";
    const uint64_t size = idx_size_, absurd = uint64_t{1} << 58;  // below it, the sum cannot overflow
    if (sequences > absurd || boundaries > absurd) {
      throw idx_.damaged("is " + text(idx_size_) + " bytes, too short for " + counts);
    }
    const uint64_t end = kHeader + 12 * sequences + 8 * boundaries;
    // nothing but the file size shows that there are modes
    if (sequences > 0 && size == end + sequences) {
      throw idx_.error("is a multimodal index, with a mode for each of its " + std::to_string(sequences) +
                       " sequences, which megalite cannot train on; write the text alone with "
                       "tools/preprocess_data.py");
    }
    if (size != end) {
      throw idx_.damaged("is " + text(idx_size_) + " bytes, expected " + std::to_string(end) + " for " + counts);
    }
    num_sequences = sequences, num_boundaries = boundaries;
  }

  void check_documents() const {
    if (num_boundaries == 0) throw idx_.damaged("has 0 document boundaries, expected at least 1");
    const int64_t first = load<int64_t>(documents()), last = load<int64_t>(documents(), num_boundaries - 1);
    if (first != 0 || last != num_sequences) {
      throw idx_.damaged("has a document index from " + text(first) + " to " + text(last) + ", expected 0 to " +
                         text(num_sequences));
    }
    for (int64_t d = 0; d + 1 < num_boundaries; ++d) {
      const int64_t before = load<int64_t>(documents(), d), after = load<int64_t>(documents(), d + 1);
      if (after < before) {
        throw idx_.damaged("has a document index falling from " + text(before) + " to " + text(after) +
                           " at document " + text(d) + ", expected it never to fall");
      }
    }
  }

  void check_sequences() {
    uint64_t end = 0;  // unsigned: the largest offset and length together overflow only int64
    for (int64_t i = 0; i < num_sequences; ++i) {
      const int64_t n = length(i), at = offset(i);
      if (n < 0 || at < 0) {
        throw idx_.damaged(std::string("has ") + (n < 0 ? "length " : "offset ") + text(n < 0 ? n : at) +
                           " at sequence " + text(i) + ", expected 0 or more");
      }
      contiguous_ &= at == num_tokens * type.size;
      num_tokens += n;
      end = std::max(end, static_cast<uint64_t>(at) + static_cast<uint64_t>(n * type.size));
    }
    const int64_t size = bin_.size();
    if (static_cast<uint64_t>(size) != end) {
      throw bin_.damaged("is " + text(size) + " bytes, expected " + std::to_string(end) + " by its index of " +
                         text(num_tokens) + " " + type.name + " tokens");
    }
  }

  template <class T>
  int64_t largest() const {
    constexpr int64_t kChunk = 1 << 20;
    if (num_tokens == 0) return -1;
    std::vector<T> chunk(std::min(num_tokens, kChunk));
    int64_t best = std::numeric_limits<int64_t>::min();
    for (int64_t start = 0; start < num_tokens; start += kChunk) {
      const int64_t count = std::min(kChunk, num_tokens - start);
      read(chunk.data(), start * sizeof(T), count * sizeof(T));
      best = std::max<int64_t>(best, *std::max_element(chunk.begin(), chunk.begin() + count));
    }
    return best;
  }

  File idx_, bin_;
  int64_t idx_size_;
  Mapping map_;
  bool contiguous_ = true;
};

}  // namespace megalite
