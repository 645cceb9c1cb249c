// A file as read-only memory, which the system reads when it is first looked at.
#pragma once

#include <fcntl.h>
#include <sys/mman.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstring>
#include <string>
#include <utility>

#include "tlinformer/error.h"

namespace tlinformer {

class MappedFile {
 public:
  explicit MappedFile(const std::string& path) {
    const int file = open(path.c_str(), O_RDONLY | O_CLOEXEC);
    require<FileError>(file >= 0, path, ": ", std::strerror(errno));
    struct stat about{};
    const bool regular = fstat(file, &about) == 0 && S_ISREG(about.st_mode);
    bytes_ = regular ? static_cast<int64_t>(about.st_size) : 0;
    // No memory of 0 bytes can be mapped, and none is needed.
    void* at = nullptr;
    if (bytes_ > 0) {
      at = mmap(nullptr, static_cast<size_t>(bytes_), PROT_READ, MAP_PRIVATE, file, 0);
    }
    const int error = errno;
    close(file);
    require<FileError>(regular, path, ": not a regular file");
    require<FileError>(at != MAP_FAILED, path, ": ", std::strerror(error));
    data_ = static_cast<const char*>(at);
  }
  MappedFile(MappedFile&& from) noexcept
      : data_(std::exchange(from.data_, nullptr)), bytes_(from.bytes_) {}
  MappedFile& operator=(MappedFile&&) = delete;
  ~MappedFile() {
    if (data_) munmap(const_cast<char*>(data_), static_cast<size_t>(bytes_));
  }

  const char* begin() const { return data_; }
  const char* end() const { return data_ + bytes_; }
  int64_t bytes() const { return bytes_; }

 private:
  const char* data_ = nullptr;
  int64_t bytes_ = 0;
};

}  // namespace tlinformer
