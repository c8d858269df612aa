/* Records what a process does to the files below FRONTALIS_CUT_ROOT, for tests/flows/test_power_cut.py: preload it.

   One line an event in FRONTALIS_CUT_LOG: its kind, one or two paths relative to the root, and the number of a copy:
     C path           a file was created or emptied            M path        a folder was made
     F path copy      the file was synced; copy = its content  D path        the folder was synced
     R from to        renamed                                  L from to     another name (hard link)
     U path           deleted                                  X path        a folder was deleted
   Copies are the files FRONTALIS_CUT_LOG.<number>. Each call and its line are under one lock, so lines are in order. */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <fcntl.h>
#include <limits.h>
#include <pthread.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/stat.h>
#include <sys/syscall.h>
#include <unistd.h>

static pthread_mutex_t lock = PTHREAD_MUTEX_INITIALIZER;
static int copies = 0;

#define NEXT(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

/* Write the absolute path without following a link at its end; return what comes after the root, or NULL. */
static const char *below(int folder, const char *path, char *out) {
  const char *root = getenv("FRONTALIS_CUT_ROOT");
  char base[PATH_MAX] = "", link[64];
  if (!root || !path) return NULL;
  if (path[0] != '/') {
    if (folder == AT_FDCWD) {
      if (!getcwd(base, sizeof base)) return NULL;
    } else {
      snprintf(link, sizeof link, "/proc/self/fd/%d", folder);
      ssize_t n = readlink(link, base, sizeof base - 1);
      if (n < 0) return NULL;
      base[n] = 0;
    }
    if (snprintf(out, PATH_MAX, "%s/%s", base, path) >= PATH_MAX) return NULL;
  } else if (snprintf(out, PATH_MAX, "%s", path) >= PATH_MAX) {
    return NULL;
  }
  size_t n = strlen(root);
  while (strlen(out) > n && out[strlen(out) - 1] == '/') out[strlen(out) - 1] = 0;
  if (strncmp(out, root, n) || (out[n] && out[n] != '/')) return NULL;
  return out[n] ? out + n + 1 : ".";
}

static void put(const char *kind, const char *one, const char *two) {
  char line[2 * PATH_MAX + 64];
  int n = snprintf(line, sizeof line, "%s\t%s\t%s\n", kind, one, two);
  int out = syscall(SYS_openat, AT_FDCWD, getenv("FRONTALIS_CUT_LOG"), O_WRONLY | O_APPEND | O_CREAT, 0600);
  if (out >= 0) { syscall(SYS_write, out, line, n); syscall(SYS_close, out); }
}

static void synced(int fd) {
  char link[64], path[PATH_MAX], buffer[1 << 16], name[PATH_MAX], number[16];
  struct stat found;
  snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
  ssize_t n = readlink(link, path, sizeof path - 1);
  if (n < 0 || fstat(fd, &found)) return;
  path[n] = 0;
  char out[PATH_MAX];
  const char *inside = below(AT_FDCWD, path, out);
  if (!inside) return;
  if (S_ISDIR(found.st_mode)) { put("D", inside, ""); return; }
  snprintf(number, sizeof number, "%d", copies++);
  snprintf(name, sizeof name, "%s.%s", getenv("FRONTALIS_CUT_LOG"), number);
  int in = syscall(SYS_openat, AT_FDCWD, path, O_RDONLY, 0);
  int to = syscall(SYS_openat, AT_FDCWD, name, O_WRONLY | O_CREAT | O_TRUNC, 0600);
  while (in >= 0 && to >= 0 && (n = syscall(SYS_read, in, buffer, sizeof buffer)) > 0) syscall(SYS_write, to, buffer, n);
  if (in >= 0) syscall(SYS_close, in);
  if (to >= 0) syscall(SYS_close, to);
  put("F", inside, number);
}

#define LOCKED(call) ({ pthread_mutex_lock(&lock); __typeof__(call) r = (call); r; })
#define UNLOCK pthread_mutex_unlock(&lock)

static int opened(int folder, const char *path, int flags, int mode) {
  char out[PATH_MAX];
  const char *inside = (flags & (O_CREAT | O_TRUNC)) ? below(folder, path, out) : NULL;
  if (!inside) return NEXT(openat)(folder, path, flags, mode);
  struct stat before;
  int was = !fstatat(folder, path, &before, 0);
  int r = LOCKED(NEXT(openat)(folder, path, flags, mode));
  if (r >= 0 && (!was || (flags & O_TRUNC))) put("C", inside, "");
  UNLOCK;
  return r;
}

#define MODE int mode = 0; if (flags & (O_CREAT | O_TMPFILE)) { va_list a; va_start(a, flags); mode = va_arg(a, int); va_end(a); }
int open(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int open64(const char *path, int flags, ...) { MODE return opened(AT_FDCWD, path, flags, mode); }
int openat(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int openat64(int folder, const char *path, int flags, ...) { MODE return opened(folder, path, flags, mode); }
int creat(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }
int creat64(const char *path, mode_t mode) { return opened(AT_FDCWD, path, O_CREAT | O_WRONLY | O_TRUNC, mode); }

static int two(const char *kind, int d1, const char *from, int d2, const char *to, int r) {
  char one[PATH_MAX], other[PATH_MAX];
  if (r == 0) {
    const char *a = below(d1, from, one), *b = below(d2, to, other);
    if (a || b) put(kind, a ? a : "", b ? b : "");
  }
  UNLOCK;
  return r;
}
int rename(const char *a, const char *b) { return two("R", AT_FDCWD, a, AT_FDCWD, b, LOCKED(NEXT(rename)(a, b))); }
int renameat(int d, const char *a, int e, const char *b) { return two("R", d, a, e, b, LOCKED(NEXT(renameat)(d, a, e, b))); }
int link(const char *a, const char *b) { return two("L", AT_FDCWD, a, AT_FDCWD, b, LOCKED(NEXT(link)(a, b))); }
int linkat(int d, const char *a, int e, const char *b, int f) { return two("L", d, a, e, b, LOCKED(NEXT(linkat)(d, a, e, b, f))); }

static int one(const char *kind, int folder, const char *path, int r) {
  char out[PATH_MAX];
  const char *inside = r == 0 ? below(folder, path, out) : NULL;
  if (inside) put(kind, inside, "");
  UNLOCK;
  return r;
}
int unlink(const char *p) { return one("U", AT_FDCWD, p, LOCKED(NEXT(unlink)(p))); }
int unlinkat(int d, const char *p, int f) { return one(f & AT_REMOVEDIR ? "X" : "U", d, p, LOCKED(NEXT(unlinkat)(d, p, f))); }
int rmdir(const char *p) { return one("X", AT_FDCWD, p, LOCKED(NEXT(rmdir)(p))); }
int mkdir(const char *p, mode_t m) { return one("M", AT_FDCWD, p, LOCKED(NEXT(mkdir)(p, m))); }
int mkdirat(int d, const char *p, mode_t m) { return one("M", d, p, LOCKED(NEXT(mkdirat)(d, p, m))); }

static int sync_of(int fd, int r) { if (r == 0) synced(fd); UNLOCK; return r; }
int fsync(int fd) { return sync_of(fd, LOCKED(NEXT(fsync)(fd))); }
int fdatasync(int fd) { return sync_of(fd, LOCKED(NEXT(fdatasync)(fd))); }
