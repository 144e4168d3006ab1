/* Faults on order, for tests/test_faults.py: what the disk does at a program's k-th writing call.

   Loaded before the C library, it counts the calls that write under the folder FAULT_UNDER. From
   call number FAULT_AT on, FAULT_KIND happens: "kill" (before the call), "half" (killed when half
   of the bytes are written), or an error number, such as 28: no space left. The environment is
   read at each call, so that a forked child can order its own fault. A full disk can still delete.

   gcc -shared -fPIC faults.c -o faults.so -ldl; LD_PRELOAD=./faults.so python ...               */

#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/types.h>
#include <sys/uio.h>
#include <unistd.h>

#define REAL(name) ((__typeof__(&name))dlsym(RTLD_NEXT, #name))

static long calls;

/* Is it time? Kills, or returns whether this call is the ordered one (1) or a later one (2). */
static int fault(int dir, const char *path, int frees) {
    const char *at = getenv("FAULT_AT"), *under = getenv("FAULT_UNDER"), *kind = getenv("FAULT_KIND");
    char full[2 * PATH_MAX] = "", link[64];
    if (!at || !under || !kind) return 0;
    if (!path || path[0] != '/') {
        snprintf(link, sizeof link, dir == AT_FDCWD ? "/proc/self/cwd" : "/proc/self/fd/%d", dir);
        ssize_t n = readlink(link, full, PATH_MAX);
        if (n < 0) return 0;
        full[n] = 0;
        if (path) strcat(full, "/");
    }
    if (path) strncat(full, path, PATH_MAX - 1);
    if (strncmp(full, under, strlen(under)) || ++calls < atol(at)) return 0;
    if (!strcmp(kind, "kill")) kill(getpid(), SIGKILL);
    errno = atoi(kind);
    if (frees && errno == ENOSPC) return 0;
    return calls == atol(at) ? 1 : 2;
}

static int failed(int dir, const char *path, int frees) {
    int when = fault(dir, path, frees);
    if (when && !strcmp(getenv("FAULT_KIND"), "half")) kill(getpid(), SIGKILL);
    return when;
}

/* The first write that fails writes half, as a disk does whose last block is taken. */
ssize_t write(int fd, const void *data, size_t size) {
    int when = fault(fd, NULL, 0);
    if (when == 2 || (when && size < 2)) return -1;
    ssize_t done = REAL(write)(fd, data, when ? size / 2 : size);
    if (when && !strcmp(getenv("FAULT_KIND"), "half")) kill(getpid(), SIGKILL);
    return done;
}

ssize_t writev(int fd, const struct iovec *parts, int count) {
    return failed(fd, NULL, 0) ? -1 : REAL(writev)(fd, parts, count);
}

ssize_t pwrite64(int fd, const void *data, size_t size, off_t at) {
    return failed(fd, NULL, 0) ? -1 : REAL(pwrite64)(fd, data, size, at);
}

int fsync(int fd) { return failed(fd, NULL, 0) ? -1 : 0; } /* no test pulls a plug: no waiting */
int ftruncate64(int fd, off_t size) { return failed(fd, NULL, 0) ? -1 : REAL(ftruncate64)(fd, size); }
int mkdir(const char *path, mode_t mode) {
    return failed(AT_FDCWD, path, 0) ? -1 : REAL(mkdir)(path, mode);
}
int rename(const char *from, const char *to) {
    return failed(AT_FDCWD, from, 0) ? -1 : REAL(rename)(from, to);
}
int unlink(const char *path) { return failed(AT_FDCWD, path, 1) ? -1 : REAL(unlink)(path); }
int rmdir(const char *path) { return failed(AT_FDCWD, path, 1) ? -1 : REAL(rmdir)(path); }
int unlinkat(int dir, const char *path, int flags) {
    return failed(dir, path, 1) ? -1 : REAL(unlinkat)(dir, path, flags);
}

/* An open file is written to later; here it counts only if it may be made or emptied. */
#define OPEN(name, dir, ...)                                                        \
    va_list rest;                                                                   \
    va_start(rest, flags);                                                          \
    mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(rest, mode_t) : 0;         \
    va_end(rest);                                                                   \
    if (flags & (O_CREAT | O_TRUNC) && failed(dir, path, 0)) return -1;             \
    return REAL(name)(__VA_ARGS__, mode)

int open(const char *path, int flags, ...) { OPEN(open, AT_FDCWD, path, flags); }
int open64(const char *path, int flags, ...) { OPEN(open64, AT_FDCWD, path, flags); }
int openat64(int dir, const char *path, int flags, ...) { OPEN(openat64, dir, dir, path, flags); }
