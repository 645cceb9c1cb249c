// Files too large to hold: written beside their target and renamed, read in pieces.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <cerrno>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>

#include "tlinformer/error.h"

namespace tlinformer {

// Readers of `path` see the old file or, after commit, the new one; without it nothing remains.
class OutputFile {
 public:
  explicit OutputFile(const std::string& path) : path_(path) {
    for (int i = 0; !file_; ++i) {
      temporary_ = path + ".part." + std::to_string(getpid()) + "." + std::to_string(i);
      const int made = open(temporary_.c_str(), O_WRONLY | O_CREAT | O_EXCL | O_CLOEXEC, 0666);
      if (made < 0 && errno == EEXIST) continue;
      require<FileError>(made >= 0, path, ": cannot be written: ", std::strerror(errno));
      file_ = fdopen(made, "wb");
      require<FileError>(file_ != nullptr, path, ": cannot be written: ", std::strerror(errno));
    }
  }
  OutputFile(const OutputFile&) = delete;
  OutputFile& operator=(const OutputFile&) = delete;
  ~OutputFile() {
    if (!file_) return;
    std::fclose(file_);
    unlink(temporary_.c_str());
  }

  void write(const void* data, int64_t bytes) {
    const size_t count = static_cast<size_t>(bytes);
    check(std::fwrite(data, 1, count, file_) == count);
  }
  void rewrite(int64_t offset, const std::string& text) {
    check(fseeko(file_, static_cast<off_t>(offset), SEEK_SET) == 0);
    write(text.data(), static_cast<int64_t>(text.size()));
  }
  void commit() {
    check(std::fflush(file_) == 0 && fsync(fileno(file_)) == 0);
    check(std::rename(temporary_.c_str(), path_.c_str()) == 0);
    std::fclose(file_);
    file_ = nullptr;
  }

 private:
  void check(bool done) const {
    require<FileError>(done, path_, ": cannot be written: ", std::strerror(errno));
  }

  std::string path_, temporary_;
  std::FILE* file_ = nullptr;
};

class InputFile {
 public:
  explicit InputFile(const std::string& path)
      : path_(path), file_(open(path.c_str(), O_RDONLY | O_CLOEXEC)) {
    require<FileError>(file_ >= 0, path, ": ", std::strerror(errno));
    struct stat about{};
    const bool regular = fstat(file_, &about) == 0 && S_ISREG(about.st_mode);
    if (!regular) close(file_);
    require<FileError>(regular, path, ": not a regular file");
    bytes_ = static_cast<int64_t>(about.st_size);
  }
  InputFile(const InputFile&) = delete;
  InputFile& operator=(const InputFile&) = delete;
  ~InputFile() { close(file_); }

  int64_t bytes() const { return bytes_; }
  const std::string& path() const { return path_; }
  void read(int64_t offset, void* to, int64_t bytes) const {
    char* at = static_cast<char*>(to);
    for (int64_t done = 0; done < bytes;) {
      const ssize_t n = pread(file_, at + done, static_cast<size_t>(bytes - done),
                              static_cast<off_t>(offset + done));
      if (n < 0 && errno == EINTR) continue;
      require<FileError>(n >= 0, path_, ": ", std::strerror(errno));
      require<FileError>(n > 0, path_, ": ends at byte ", offset + done, "; somebody shortened it");
      done += n;
    }
  }

 private:
  std::string path_;
  int file_;
  int64_t bytes_ = 0;
};

}  // namespace tlinformer
