// A regular file by its descriptor: exact reads and writes at 64-bit offsets, failures as text.
//
// Nothing here ends the program: a function that can fail returns the error as one line, empty where all went
// well. So readers of hostile files can be fuzzed in one process, and a checkpoint can tidy up before it
// gives up.
#pragma once

#include <fcntl.h>
#include <sys/stat.h>
#include <unistd.h>

#include <algorithm>
#include <cerrno>
#include <cstdarg>
#include <cstdint>
#include <cstdio>
#include <cstring>
#include <string>
#include <string_view>
#include <utility>

#include "llmc/fatal.h"  // text_of_list

// printf into a string:  text_of("%s: %d rows", "a.bin", 3) == "a.bin: 3 rows"
[[gnu::format(printf, 1, 2)]] inline std::string text_of(const char* format, ...) {
    va_list args;
    va_start(args, format);
    std::string text = text_of_list(format, args);
    va_end(args);
    return text;
}

// A name that came out of a file, fit for one line of an error: control characters and bytes beyond ASCII
// become '?', and what is longer than 80 bytes is cut.  printable("a\nb") == "a?b"
inline std::string printable(std::string_view text) {
    constexpr size_t kLongest = 80;
    std::string out;
    for (char c : text.substr(0, kLongest)) out += c >= ' ' && c <= '~' ? c : '?';
    return text.size() > kLongest ? out + "..." : out;
}

class File {
  public:
    File() = default;
    File(File&& other) noexcept { *this = std::move(other); }
    File& operator=(File&& other) noexcept {
        std::swap(fd_, other.fd_);
        std::swap(bytes_, other.bytes_);
        std::swap(path_, other.path_);
        return *this;
    }
    ~File() { close(); }

    const std::string& path() const { return path_; }
    uint64_t bytes() const {
        return bytes_;
    }  // size when it was opened; for a created file, what was written
    bool is_open() const { return fd_ >= 0; }

    // Opens a regular file for reading. A pipe or a device is refused before it is opened: opening could
    // block.
    std::string open_to_read(const std::string& path) {
        close();
        path_ = path;
        struct stat info;
        if (stat(path.c_str(), &info) != 0) return failure("cannot be opened");
        if (!S_ISREG(info.st_mode)) return path_ + " is not a regular file";
        fd_ = ::open(path.c_str(), O_RDONLY | O_CLOEXEC | O_NONBLOCK);
        if (fd_ < 0 || fstat(fd_, &info) != 0) return failure("cannot be opened");
        if (!S_ISREG(info.st_mode)) return path_ + " is not a regular file";
        bytes_ = static_cast<uint64_t>(info.st_size);
        return "";
    }

    // Creates the file for writing, or empties the one that is there.
    std::string create(const std::string& path) {
        close();
        path_ = path;
        bytes_ = 0;
        fd_ = ::open(path.c_str(), O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0666);
        return fd_ < 0 ? failure("cannot be created") : "";
    }

    // out (bytes) = the file's bytes at `offset`. All of them, or an error.
    std::string read_at(void* out, uint64_t bytes, uint64_t offset) const {
        char* to = static_cast<char*>(out);
        while (bytes > 0) {
            const ssize_t got =
                pread(fd_, to, std::min<uint64_t>(bytes, kLargestCall), static_cast<off_t>(offset));
            if (got < 0 && errno == EINTR) continue;
            if (got < 0) return failure("cannot be read");
            if (got == 0)
                return text_of("%s ends at byte %llu: it was %llu bytes long when it was opened",
                               path_.c_str(), static_cast<unsigned long long>(offset),
                               static_cast<unsigned long long>(bytes_));
            to += got;
            offset += static_cast<uint64_t>(got);
            bytes -= static_cast<uint64_t>(got);
        }
        return "";
    }

    // Appends `bytes` of data to a created file.
    std::string write(const void* data, uint64_t bytes) {
        const char* from = static_cast<const char*>(data);
        while (bytes > 0) {
            const ssize_t put = ::write(fd_, from, std::min<uint64_t>(bytes, kLargestCall));
            if (put < 0 && errno == EINTR) continue;
            if (put <= 0) return failure("cannot be written");
            from += put;
            bytes_ += static_cast<uint64_t>(put);
            bytes -= static_cast<uint64_t>(put);
        }
        return "";
    }

    // Ends the writing: the bytes are on the disk when this returns without an error.
    std::string sync_and_close() {
        std::string error;
        if (fsync(fd_) != 0) error = failure("cannot be written");
        if (::close(std::exchange(fd_, -1)) != 0 && error.empty()) error = failure("cannot be written");
        return error;
    }

    void close() {
        if (fd_ >= 0) ::close(std::exchange(fd_, -1));
    }

  private:
    static constexpr uint64_t kLargestCall = uint64_t{1} << 30;  // Linux moves at most 2 GiB - 4 KiB a call

    std::string failure(const char* what) const {
        return text_of("%s %s: %s", path_.c_str(), what, std::strerror(errno));
    }

    int fd_ = -1;
    uint64_t bytes_ = 0;
    std::string path_;
};

// The whole of a small text file, or an error. One larger than `largest_bytes` is refused unread.
inline std::string read_text_file(std::string& out, const std::string& path, uint64_t largest_bytes) {
    File file;
    std::string error = file.open_to_read(path);
    if (!error.empty()) return error;
    if (file.bytes() > largest_bytes)
        return text_of("%s has %llu bytes, at most %llu are expected", path.c_str(),
                       static_cast<unsigned long long>(file.bytes()),
                       static_cast<unsigned long long>(largest_bytes));
    out.resize(file.bytes());
    return file.read_at(out.data(), out.size(), 0);
}
