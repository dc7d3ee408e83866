/* Counts the file events below a folder, and at the n-th ends the process or lets the call fail.
 *
 * Loaded by LD_PRELOAD, so that it sees what Python and what Rust (safetensors) do. Events: a file opened for writing,
 * write, fsync, rename, unlink, mkdir, rmdir, truncate.
 */
#define _GNU_SOURCE
#include <dlfcn.h>
#include <errno.h>
#include <fcntl.h>
#include <limits.h>
#include <signal.h>
#include <stdarg.h>
#include <stdio.h>
#include <string.h>
#include <sys/stat.h>
#include <unistd.h>

enum { COUNT, KILL, TEAR, FAIL };
static char root[PATH_MAX];
static long seen, at = -1;
static int action, error, armed;
static char kinds[1 << 20];

void chaos_arm(const char *folder, long event, int what, int code) {
    snprintf(root, sizeof root, "%s/", folder);
    seen = 0, at = event, action = what, error = code, armed = 1;
}
long chaos_disarm(void) { armed = 0; return seen; }
const char *chaos_kinds(void) { kinds[seen < (long)sizeof kinds ? seen : (long)sizeof kinds - 1] = 0; return kinds; }

static int below(int dir, const char *path) {
    char full[2 * PATH_MAX], base[PATH_MAX], link[64];
    if (!armed || !path) return 0;
    if (path[0] == '/') return strncmp(path, root, strlen(root)) == 0;
    if (dir == AT_FDCWD) {
        if (!getcwd(base, sizeof base)) return 0;
    } else {
        snprintf(link, sizeof link, "/proc/self/fd/%d", dir);
        ssize_t length = readlink(link, base, sizeof base - 1);
        if (length < 0) return 0;
        base[length] = 0;
    }
    snprintf(full, sizeof full, "%s/%s", base, path);
    return strncmp(full, root, strlen(root)) == 0;
}

static int open_file(int fd) {
    char name[PATH_MAX], link[64];
    if (!armed) return 0;
    snprintf(link, sizeof link, "/proc/self/fd/%d", fd);
    ssize_t length = readlink(link, name, sizeof name - 1);
    if (length < 0) return 0;
    name[length] = 0;
    return strncmp(name, root, strlen(root)) == 0;
}

/* 1 if the call must fail with `errno`. */
static int event(char kind) {
    if (seen < (long)sizeof kinds) kinds[seen] = kind;
    long number = seen++;
    if (action == KILL && number == at) kill(getpid(), SIGKILL);
    /* A full disk stays full, and still deletes and renames. */
    if (action == FAIL && number >= at && strchr("owmft", kind)) { errno = error; return 1; }
    return 0;
}

#define REAL(type, name, ...) static type (*real)(__VA_ARGS__); if (!real) real = (type (*)(__VA_ARGS__))dlsym(RTLD_NEXT, name)

#define OPEN(name) \
    int name(const char *path, int flags, ...) { \
        REAL(int, #name, const char *, int, ...); \
        va_list list; va_start(list, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; va_end(list); \
        if ((flags & O_ACCMODE) != O_RDONLY && below(AT_FDCWD, path) && event('o')) return -1; \
        return real(path, flags, mode); \
    }
OPEN(open)
OPEN(open64)
#define OPENAT(name) \
    int name(int dir, const char *path, int flags, ...) { \
        REAL(int, #name, int, const char *, int, ...); \
        va_list list; va_start(list, flags); mode_t mode = flags & (O_CREAT | O_TMPFILE) ? va_arg(list, mode_t) : 0; va_end(list); \
        if ((flags & O_ACCMODE) != O_RDONLY && below(dir, path) && event('o')) return -1; \
        return real(dir, path, flags, mode); \
    }
OPENAT(openat)
OPENAT(openat64)

ssize_t write(int fd, const void *data, size_t size) {
    REAL(ssize_t, "write", int, const void *, size_t);
    if (open_file(fd)) {
        long number = seen;
        if (event('w')) return -1;
        if (action == TEAR && number == at) { real(fd, data, size / 2); kill(getpid(), SIGKILL); }
    }
    return real(fd, data, size);
}
int fsync(int fd) { REAL(int, "fsync", int); if (open_file(fd) && event('f')) return -1; return real(fd); }
int fdatasync(int fd) { REAL(int, "fdatasync", int); if (open_file(fd) && event('f')) return -1; return real(fd); }
int ftruncate(int fd, off_t size) { REAL(int, "ftruncate", int, off_t); if (open_file(fd) && event('t')) return -1; return real(fd, size); }
int ftruncate64(int fd, off64_t size) { REAL(int, "ftruncate64", int, off64_t); if (open_file(fd) && event('t')) return -1; return real(fd, size); }
int rename(const char *old, const char *new) { REAL(int, "rename", const char *, const char *); if (below(AT_FDCWD, new) && event('r')) return -1; return real(old, new); }
int renameat(int a, const char *old, int b, const char *new) { REAL(int, "renameat", int, const char *, int, const char *); if (below(b, new) && event('r')) return -1; return real(a, old, b, new); }
int unlink(const char *path) { REAL(int, "unlink", const char *); if (below(AT_FDCWD, path) && event('u')) return -1; return real(path); }
int unlinkat(int dir, const char *path, int flags) { REAL(int, "unlinkat", int, const char *, int); if (below(dir, path) && event('u')) return -1; return real(dir, path, flags); }
int rmdir(const char *path) { REAL(int, "rmdir", const char *); if (below(AT_FDCWD, path) && event('u')) return -1; return real(path); }
int mkdir(const char *path, mode_t mode) { REAL(int, "mkdir", const char *, mode_t); if (below(AT_FDCWD, path) && event('m')) return -1; return real(path, mode); }
int mkdirat(int dir, const char *path, mode_t mode) { REAL(int, "mkdirat", int, const char *, mode_t); if (below(dir, path) && event('m')) return -1; return real(dir, path, mode); }
