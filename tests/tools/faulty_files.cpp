// A library to preload (LD_PRELOAD): counts the file operations below a folder and, at the n-th, kills the process or
// makes the operation fail. `arm` starts the count in the calling process.

#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/uio.h>
#include <unistd.h>

#include <atomic>
#include <string>

namespace {

enum Kind { kCount, kKill, kFail, kFull };

std::string folder;
std::atomic<long> done{0};
long at = 0;
Kind kind = kCount;
int trace = -1;

bool below(const char *path) {
  if (folder.empty() || !path || strncmp(path, folder.c_str(), folder.size()) != 0) return false;
  return path[folder.size()] == '/' || path[folder.size()] == 0;
}

std::string path_of(int descriptor) {
  char link[64], found[PATH_MAX];
  snprintf(link, sizeof link, "/proc/self/fd/%d", descriptor);
  ssize_t length = readlink(link, found, sizeof found);
  return length > 0 ? std::string(found, length) : std::string();
}

std::string path_at(int directory, const char *path) {
  if (!path || path[0] == '/' || directory == AT_FDCWD) return path ? path : "";
  return path_of(directory) + "/" + path;
}

// Count an operation. Return the error to fail with, or 0. `kKill` returns -1 for the caller to kill the process.
int next(const char *name, const std::string &path, bool grows) {
  if (!below(path.c_str())) return 0;
  long number = ++done;
  if (trace >= 0) dprintf(trace, "%ld %s %s\n", number, name, path.c_str() + folder.size());
  if (kind == kFull && number >= at && grows) return ENOSPC;
  if (number != at) return 0;
  return kind == kKill ? -1 : kind == kFail ? EIO : 0;
}

bool faulty(const char *name, const std::string &path, bool grows = false) {
  int error = next(name, path, grows);
  if (error < 0) kill(getpid(), SIGKILL);
  errno = error;
  return error != 0;
}

template <typename Function> Function real(const char *name) { return reinterpret_cast<Function>(dlsym(RTLD_NEXT, name)); }

bool writes(int flags) { return (flags & O_ACCMODE) != O_RDONLY; }

}  // namespace

extern "C" {

void arm(const char *below_folder, long number, int how, const char *trace_file) {
  folder.clear();
  trace = trace_file && *trace_file ? real<int (*)(const char *, int, ...)>("open")(trace_file, O_WRONLY | O_CREAT | O_APPEND, 0600) : -1;
  at = number, kind = static_cast<Kind>(how), done = 0;
  folder = below_folder;
}

long operations() { return done; }

#define OPEN(name)                                                                   \
  int name(const char *path, int flags, ...) {                                       \
    va_list rest;                                                                    \
    va_start(rest, flags);                                                           \
    mode_t mode = va_arg(rest, mode_t);                                              \
    va_end(rest);                                                                    \
    static auto call = real<int (*)(const char *, int, ...)>(#name);                 \
    if (writes(flags) && faulty("open", path ? path : "", flags & O_CREAT)) return -1; \
    return call(path, flags, mode);                                                  \
  }
OPEN(open)
OPEN(open64)

#define OPENAT(name)                                                                        \
  int name(int directory, const char *path, int flags, ...) {                               \
    va_list rest;                                                                           \
    va_start(rest, flags);                                                                  \
    mode_t mode = va_arg(rest, mode_t);                                                     \
    va_end(rest);                                                                           \
    static auto call = real<int (*)(int, const char *, int, ...)>(#name);                   \
    if (writes(flags) && faulty("open", path_at(directory, path), flags & O_CREAT)) return -1; \
    return call(directory, path, flags, mode);                                              \
  }
OPENAT(openat)
OPENAT(openat64)

#define FOPEN(name)                                                                        \
  FILE *name(const char *path, const char *mode) {                                         \
    static auto call = real<FILE *(*)(const char *, const char *)>(#name);                 \
    if (mode && strpbrk(mode, "wa+") && faulty("open", path ? path : "", true)) return nullptr; \
    return call(path, mode);                                                               \
  }
FOPEN(fopen)
FOPEN(fopen64)

// A full disk has room for what fits into a file's blocks: an overwritten file, or the end of its last block.
bool needs_room(int descriptor, size_t size) {
  struct stat file;
  if (fstat(descriptor, &file)) return true;
  off_t from = fcntl(descriptor, F_GETFL) & O_APPEND ? file.st_size : lseek(descriptor, 0, SEEK_CUR);
  return from + off_t(size) > file.st_blocks * 512;
}

// A kill leaves half of what was to be written.
ssize_t write(int descriptor, const void *data, size_t size) {
  static auto call = real<ssize_t (*)(int, const void *, size_t)>("write");
  if (!folder.empty()) {
    int error = next("write", path_of(descriptor), needs_room(descriptor, size));
    if (error < 0) call(descriptor, data, size / 2), kill(getpid(), SIGKILL);
    if (error) return errno = error, -1;
  }
  return call(descriptor, data, size);
}

#define PWRITE(name)                                                             \
  ssize_t name(int descriptor, const void *data, size_t size, off_t offset) {    \
    static auto call = real<ssize_t (*)(int, const void *, size_t, off_t)>(#name); \
    if (!folder.empty() && faulty("pwrite", path_of(descriptor), true)) return -1; \
    return call(descriptor, data, size, offset);                                 \
  }
PWRITE(pwrite)
PWRITE(pwrite64)

ssize_t writev(int descriptor, const iovec *parts, int count) {
  static auto call = real<ssize_t (*)(int, const iovec *, int)>("writev");
  if (!folder.empty() && faulty("write", path_of(descriptor), true)) return -1;
  return call(descriptor, parts, count);
}

#define ON_DESCRIPTOR(name)                                           \
  int name(int descriptor) {                                          \
    static auto call = real<int (*)(int)>(#name);                     \
    if (!folder.empty() && faulty(#name, path_of(descriptor))) return -1; \
    return call(descriptor);                                          \
  }
ON_DESCRIPTOR(fsync)
ON_DESCRIPTOR(fdatasync)

#define TRUNCATE(name)                                                     \
  int name(int descriptor, off_t size) {                                   \
    static auto call = real<int (*)(int, off_t)>(#name);                   \
    if (!folder.empty() && faulty("truncate", path_of(descriptor))) return -1; \
    return call(descriptor, size);                                         \
  }
TRUNCATE(ftruncate)
TRUNCATE(ftruncate64)

#define ON_TWO_PATHS(name)                                         \
  int name(const char *from, const char *to) {                     \
    static auto call = real<int (*)(const char *, const char *)>(#name); \
    if (faulty(#name, to ? to : "", true)) return -1;              \
    return call(from, to);                                         \
  }
ON_TWO_PATHS(rename)
ON_TWO_PATHS(link)
ON_TWO_PATHS(symlink)

int linkat(int from_directory, const char *from, int to_directory, const char *to, int flags) {
  static auto call = real<int (*)(int, const char *, int, const char *, int)>("linkat");
  if (faulty("link", path_at(to_directory, to), true)) return -1;
  return call(from_directory, from, to_directory, to, flags);
}

int renameat(int from_directory, const char *from, int to_directory, const char *to) {
  static auto call = real<int (*)(int, const char *, int, const char *)>("renameat");
  if (faulty("rename", path_at(to_directory, to), true)) return -1;
  return call(from_directory, from, to_directory, to);
}

int unlink(const char *path) {
  static auto call = real<int (*)(const char *)>("unlink");
  if (faulty("unlink", path ? path : "")) return -1;
  return call(path);
}

int rmdir(const char *path) {
  static auto call = real<int (*)(const char *)>("rmdir");
  if (faulty("rmdir", path ? path : "")) return -1;
  return call(path);
}

int unlinkat(int directory, const char *path, int flags) {
  static auto call = real<int (*)(int, const char *, int)>("unlinkat");
  if (faulty("unlink", path_at(directory, path))) return -1;
  return call(directory, path, flags);
}

int mkdir(const char *path, mode_t mode) {
  static auto call = real<int (*)(const char *, mode_t)>("mkdir");
  if (faulty("mkdir", path ? path : "", true)) return -1;
  return call(path, mode);
}
}
