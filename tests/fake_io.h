/* fake_io: a file system in memory behind the llmpar_io table, which can die, fail once, and lose power.

   What a call changes is seen at once by every later call (the page cache); what survives power loss is what was synced: a file's data by a sync of the file, names by a sync of their directory. Whatever was not
   synced is lost, kept or torn, each change by itself, as a seed says: the most unkind disk that POSIX allows. */
#ifndef FAKE_IO_H
#define FAKE_IO_H

#include "test.h"

#include <errno.h>
#include <pthread.h>

enum { FAKE_NODES = 4096, FAKE_HANDLES = 256, FAKE_NAME = 64, FAKE_OPS = 10 };
typedef enum fake_op { FAKE_OPEN, FAKE_CLOSE, FAKE_READ, FAKE_WRITE, FAKE_SYNC, FAKE_RENAME, FAKE_REMOVE, FAKE_MKDIR, FAKE_LOOK, FAKE_LIST } fake_op;
static const char *const fake_op_name[FAKE_OPS] = {"open", "close", "read", "write", "sync", "rename", "remove", "make_directory", "look", "list"};

typedef struct fake_entry { char name[FAKE_NAME]; int node; } fake_entry;
typedef struct fake_list { fake_entry *entry; int count; } fake_list;
/* A change of a directory that is not synced: name -> node (-1: gone), and where a rename takes it from. */
typedef struct fake_change { char name[FAKE_NAME], from[FAKE_NAME]; int node; } fake_change;
typedef struct fake_node {
    int used, folder;
    unsigned char *data, *safe;      /* as seen; as synced */
    size_t bytes, safe_bytes;
    fake_list now, durable;          /* of a folder */
    fake_change *change;
    int changes;
} fake_node;

typedef struct fake_fs {
    pthread_mutex_t lock;
    fake_node node[FAKE_NODES];      /* 0: the root */
    int next;
    struct { int node, open, write; } handle[FAKE_HANDLES];
    /* what is to go wrong */
    long calls, at;                  /* so far; the call that goes wrong (1 = the first), 0: none */
    int error;                       /* of that one; 0: it and all later ones do nothing (the process is dead). -1: a write takes a part only */
    int dead;
    fake_op failed;                  /* what call that was */
    char failed_path[200];
    long of[FAKE_OPS];
    llmpar_io io;
} fake_fs;

static inline uint64_t fake_random(uint64_t *state)
{
    uint64_t x = *state += 0x9e3779b97f4a7c15u;
    x = (x ^ (x >> 30)) * 0xbf58476d1ce4e5b9u;
    x = (x ^ (x >> 27)) * 0x94d049bb133111ebu;
    return x ^ (x >> 31);
}

static inline int fake_find(const fake_list *list, const char *name)
{
    for (int i = 0; i < list->count; i++)
        if (!strcmp(list->entry[i].name, name)) return i;
    return -1;
}

static inline void fake_set(fake_list *list, const char *name, int node)
{
    int i = fake_find(list, name);
    if (node < 0) {
        if (i >= 0) list->entry[i] = list->entry[--list->count];
        return;
    }
    if (i < 0) {
        i = list->count++;
        list->entry = (fake_entry *)realloc(list->entry, (size_t)list->count * sizeof *list->entry);
        snprintf(list->entry[i].name, FAKE_NAME, "%s", name);
    }
    list->entry[i].node = node;
}

static inline void fake_copy_list(fake_list *to, const fake_list *from)
{
    to->entry = (fake_entry *)realloc(to->entry, (size_t)(from->count + 1) * sizeof *to->entry);
    if (from->count) memcpy(to->entry, from->entry, (size_t)from->count * sizeof *to->entry);
    to->count = from->count;
}

static inline int fake_new(fake_fs *fs, int folder)
{
    if (fs->next == FAKE_NODES) { fprintf(stderr, "fake_io: more than %d nodes\n", FAKE_NODES); exit(1); }
    fs->node[fs->next].used = 1;
    fs->node[fs->next].folder = folder;
    return fs->next++;
}

/* A name in its folder: node (-1: none), folder, name. 0, ENOENT, ENOTDIR. */
static inline int fake_walk(fake_fs *fs, const char *path, int *folder, char name[FAKE_NAME], int *node)
{
    int at = 0;
    *folder = 0;
    *node = 0;
    name[0] = 0;
    while (*path) {
        size_t length = strcspn(path, "/");
        if (!length || (length == 1 && *path == '.')) { path += length + (path[length] == '/'); continue; }
        if (at < 0) return ENOENT;
        if (!fs->node[at].folder) return ENOTDIR;
        if (length >= FAKE_NAME) return ENAMETOOLONG;
        memcpy(name, path, length);
        name[length] = 0;
        *folder = at;
        int i = fake_find(&fs->node[at].now, name);
        at = i < 0 ? -1 : fs->node[at].now.entry[i].node;
        path += length + (path[length] == '/');
    }
    *node = at;
    return 0;
}

static inline void fake_change_name(fake_fs *fs, int folder, const char *from, const char *name, int node)
{
    fake_node *f = &fs->node[folder];
    f->change = (fake_change *)realloc(f->change, (size_t)(f->changes + 1) * sizeof *f->change);
    fake_change *c = &f->change[f->changes++];
    snprintf(c->name, FAKE_NAME, "%s", name);
    snprintf(c->from, FAKE_NAME, "%s", from);
    c->node = node;
    if (from[0]) fake_set(&f->now, from, -1);
    fake_set(&f->now, name, node);
}

/* Counts a call. 0: go on; else what it returns. *part: a write takes only some. With the lock held. */
static inline int fake_call(fake_fs *fs, fake_op op, const char *path, int *part)
{
    *part = 0;
    if (fs->dead) return EIO;
    fs->of[op]++;
    if (++fs->calls != fs->at) return 0;
    fs->failed = op;
    snprintf(fs->failed_path, sizeof fs->failed_path, "%s", path);
    if (fs->error == 0) fs->dead = 1;
    if (fs->error <= 0 && op == FAKE_WRITE) { *part = 1; return 0; }
    return fs->error > 0 ? fs->error : fs->error == 0 ? EIO : 0;
}

static inline int fake_open(void *user, const char *path, llmpar_io_mode mode, int *handle)
{
    fake_fs *fs = (fake_fs *)user;
    char name[FAKE_NAME];
    int folder = 0, node = 0, part;
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_OPEN, path, &part);
    if (!number) number = fake_walk(fs, path, &folder, name, &node);
    if (!number && node < 0 && mode != LLMPAR_IO_WRITE) number = ENOENT;
    if (!number && node >= 0 && fs->node[node].folder != (mode == LLMPAR_IO_DIRECTORY)) number = mode == LLMPAR_IO_DIRECTORY ? ENOTDIR : EISDIR;
    if (!number && node < 0) {
        node = fake_new(fs, 0);
        fake_change_name(fs, folder, "", name, node);
    }
    if (!number && mode == LLMPAR_IO_WRITE) fs->node[node].bytes = 0;
    for (int h = 0; h < FAKE_HANDLES && !number; h++) {
        if (fs->handle[h].open) continue;
        fs->handle[h].open = 1;
        fs->handle[h].node = node;
        fs->handle[h].write = mode == LLMPAR_IO_WRITE;
        *handle = h;
        break;
    }
    pthread_mutex_unlock(&fs->lock);
    return number;
}

static inline int fake_close(void *user, int handle)
{
    fake_fs *fs = (fake_fs *)user;
    int part;
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_CLOSE, "", &part);
    if (!fs->handle[handle].open) { fprintf(stderr, "fake_io: handle %d is closed twice\n", handle); exit(1); }
    fs->handle[handle].open = 0; /* in any case */
    pthread_mutex_unlock(&fs->lock);
    return number;
}

static inline int fake_read(void *user, int handle, void *data, size_t bytes, uint64_t offset, size_t *got)
{
    fake_fs *fs = (fake_fs *)user;
    int part;
    *got = 0;
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_READ, "", &part);
    const fake_node *n = &fs->node[fs->handle[handle].node];
    if (!number && offset < n->bytes) {
        *got = n->bytes - offset < bytes ? (size_t)(n->bytes - offset) : bytes;
        if (fs->error == -1 && *got > 1) *got /= 2; /* short reads too */
        memcpy(data, n->data + offset, *got);
    }
    pthread_mutex_unlock(&fs->lock);
    return number;
}

static inline int fake_write(void *user, int handle, const void *data, size_t bytes, size_t *written)
{
    fake_fs *fs = (fake_fs *)user;
    int part;
    *written = 0;
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_WRITE, "", &part);
    fake_node *n = &fs->node[fs->handle[handle].node];
    if (!number) {
        size_t take = part && bytes > 1 ? bytes / 2 : bytes;
        n->data = (unsigned char *)realloc(n->data, n->bytes + take);
        memcpy(n->data + n->bytes, data, take);
        n->bytes += take;
        *written = take;
    }
    pthread_mutex_unlock(&fs->lock);
    return number;
}

static inline int fake_sync(void *user, int handle)
{
    fake_fs *fs = (fake_fs *)user;
    int part;
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_SYNC, "", &part);
    fake_node *n = &fs->node[fs->handle[handle].node];
    if (!number && n->folder) {
        fake_copy_list(&n->durable, &n->now);
        n->changes = 0;
    } else if (!number) {
        n->safe = (unsigned char *)realloc(n->safe, n->bytes + 1);
        if (n->bytes) memcpy(n->safe, n->data, n->bytes);
        n->safe_bytes = n->bytes;
    }
    pthread_mutex_unlock(&fs->lock);
    return number;
}

static inline int fake_rename(void *user, const char *from, const char *to)
{
    fake_fs *fs = (fake_fs *)user;
    char name[FAKE_NAME], target[FAKE_NAME];
    int folder, node, to_folder, to_node, part;
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_RENAME, from, &part);
    if (!number) number = fake_walk(fs, from, &folder, name, &node);
    if (!number) number = fake_walk(fs, to, &to_folder, target, &to_node);
    if (!number && node < 0) number = ENOENT;
    if (!number && folder != to_folder) number = EXDEV; /* nothing here needs it */
    if (!number && to_node >= 0 && fs->node[to_node].folder && fs->node[to_node].now.count) number = ENOTEMPTY;
    if (!number) fake_change_name(fs, folder, name, target, node);
    pthread_mutex_unlock(&fs->lock);
    return number;
}

static inline int fake_remove(void *user, const char *path)
{
    fake_fs *fs = (fake_fs *)user;
    char name[FAKE_NAME];
    int folder, node, part;
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_REMOVE, path, &part);
    if (!number) number = fake_walk(fs, path, &folder, name, &node);
    if (!number && node < 0) number = ENOENT;
    if (!number && fs->node[node].folder && fs->node[node].now.count) number = ENOTEMPTY;
    if (!number) fake_change_name(fs, folder, "", name, -1);
    pthread_mutex_unlock(&fs->lock);
    return number;
}

static inline int fake_mkdir(void *user, const char *path)
{
    fake_fs *fs = (fake_fs *)user;
    char name[FAKE_NAME];
    int folder, node, part;
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_MKDIR, path, &part);
    if (!number) number = fake_walk(fs, path, &folder, name, &node);
    if (!number && node >= 0) number = EEXIST;
    if (!number) fake_change_name(fs, folder, "", name, fake_new(fs, 1));
    pthread_mutex_unlock(&fs->lock);
    return number;
}

static inline int fake_look(void *user, const char *path, llmpar_io_kind *kind, uint64_t *bytes)
{
    fake_fs *fs = (fake_fs *)user;
    char name[FAKE_NAME];
    int folder, node, part;
    *kind = LLMPAR_IO_NONE;
    *bytes = 0;
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_LOOK, path, &part);
    if (!number && !fake_walk(fs, path, &folder, name, &node) && node >= 0) {
        *kind = fs->node[node].folder ? LLMPAR_IO_FOLDER : LLMPAR_IO_FILE;
        *bytes = fs->node[node].bytes;
    }
    pthread_mutex_unlock(&fs->lock);
    return number;
}

static inline int fake_list_names(void *user, const char *path, int (*entry)(void *entry_user, const char *name), void *entry_user)
{
    fake_fs *fs = (fake_fs *)user;
    char name[FAKE_NAME];
    int folder, node, part;
    fake_list names = {NULL, 0};
    pthread_mutex_lock(&fs->lock);
    int number = fake_call(fs, FAKE_LIST, path, &part);
    if (!number) number = fake_walk(fs, path, &folder, name, &node);
    if (!number && node < 0) number = ENOENT;
    if (!number && !fs->node[node].folder) number = ENOTDIR;
    if (!number) fake_copy_list(&names, &fs->node[node].now);
    pthread_mutex_unlock(&fs->lock);
    for (int i = 0; i < names.count && !number; i++) number = entry(entry_user, names.entry[i].name);
    free(names.entry);
    return number;
}

static inline fake_fs *fake_make(void)
{
    fake_fs *fs = (fake_fs *)calloc(1, sizeof *fs);
    llmpar_io io = {LLMPAR_IO_ABI, sizeof(llmpar_io), fs, fake_open, fake_close, fake_read, fake_write, fake_sync, fake_rename, fake_remove, fake_mkdir, fake_look, fake_list_names};
    pthread_mutex_init(&fs->lock, NULL);
    fs->io = io;
    fake_new(fs, 1);
    return fs;
}

static inline void fake_clear_node(fake_node *n)
{
    free(n->data);
    free(n->safe);
    free(n->now.entry);
    free(n->durable.entry);
    free(n->change);
    memset(n, 0, sizeof *n);
}

static inline void fake_free(fake_fs *fs)
{
    for (int i = 0; i < fs->next; i++) fake_clear_node(&fs->node[i]);
    pthread_mutex_destroy(&fs->lock);
    free(fs);
}

/* to becomes a copy of from, with nothing to go wrong and nothing open. */
static inline void fake_copy(fake_fs *to, const fake_fs *from)
{
    for (int i = 0; i < to->next; i++) fake_clear_node(&to->node[i]);
    for (int i = 0; i < from->next; i++) {
        const fake_node *a = &from->node[i];
        fake_node *b = &to->node[i];
        b->used = a->used;
        b->folder = a->folder;
        b->bytes = a->bytes;
        b->safe_bytes = a->safe_bytes;
        b->data = (unsigned char *)malloc(a->bytes + 1);
        b->safe = (unsigned char *)malloc(a->safe_bytes + 1);
        if (a->bytes) memcpy(b->data, a->data, a->bytes);
        if (a->safe_bytes) memcpy(b->safe, a->safe, a->safe_bytes);
        fake_copy_list(&b->now, &a->now);
        fake_copy_list(&b->durable, &a->durable);
        b->change = (fake_change *)malloc((size_t)(a->changes + 1) * sizeof *b->change);
        if (a->changes) memcpy(b->change, a->change, (size_t)a->changes * sizeof *b->change);
        b->changes = a->changes;
    }
    to->next = from->next;
    memset(to->handle, 0, sizeof to->handle);
    memset(to->of, 0, sizeof to->of);
    to->calls = to->at = 0;
    to->error = to->dead = 0;
}

/* The process comes back: its handles are gone, the files are as they were. */
static inline void fake_revive(fake_fs *fs)
{
    memset(fs->handle, 0, sizeof fs->handle);
    fs->calls = fs->at = 0;
    fs->error = fs->dead = 0;
}

/* The power was gone. seed 0: exactly what was synced is left. */
static inline void fake_power_loss(fake_fs *fs, uint64_t seed)
{
    uint64_t r = seed;
    for (int i = 0; i < fs->next; i++) {
        fake_node *n = &fs->node[i];
        if (n->folder) {
            for (int c = 0; c < n->changes; c++) {
                if (!seed || fake_random(&r) & 1) continue; /* lost; others, made later, may be there */
                if (n->change[c].from[0]) fake_set(&n->durable, n->change[c].from, -1);
                fake_set(&n->durable, n->change[c].name, n->change[c].node);
            }
            n->changes = 0;
            fake_copy_list(&n->now, &n->durable);
            continue;
        }
        size_t most = n->bytes > n->safe_bytes ? n->bytes : n->safe_bytes, size = n->safe_bytes;
        int same = n->bytes == n->safe_bytes && (!n->bytes || !memcmp(n->data, n->safe, n->bytes));
        unsigned char *left = (unsigned char *)calloc(1, most + 1);
        if (seed && !same) size = fake_random(&r) & 1 ? n->bytes : n->safe_bytes + (size_t)(fake_random(&r) % (most - n->safe_bytes + 1));
        for (size_t b = 0; b < size; b += 64) { /* block by block: the old, the new, or nothing */
            size_t part = size - b < 64 ? size - b : 64;
            int take_new = !same && seed && fake_random(&r) & 1;
            for (size_t k = b; k < b + part; k++) left[k] = take_new ? (k < n->bytes ? n->data[k] : 0) : k < n->safe_bytes ? n->safe[k] : 0;
        }
        free(n->data);
        n->data = left;
        n->bytes = size;
        n->safe = (unsigned char *)realloc(n->safe, size + 1);
        memcpy(n->safe, left, size);
        n->safe_bytes = size;
    }
    fake_revive(fs);
}

#endif
