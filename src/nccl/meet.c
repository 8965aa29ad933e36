/* meet: how the ranks of a world find rank 0, who they say they are, and what they have to agree in.

     rank 0   listens -> says where (a file, a broadcast of the transport; an address is known) -> takes hellos until every rank has sent one -> welcome, with NCCL's id, or with the error, to all
     others   look up where -> connect, hello, accept -> wait for the welcome

   Whoever connects without the hello of this build, or with another key, is a stranger and dropped; the meeting goes on. A rank that cannot take part comes all the same and says why, so that all fail alike; once there
   is an error, everybody who is there gets it at once and goes. A rank whose accept has come in time stays on its connection: if that breaks, the rank is gone. */
#include "nccl/nccl.h"
#include "nccl/nccl_internal.h"

#include <errno.h>
#include <fcntl.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <sys/resource.h>
#include <unistd.h>

#define LLMPAR__NCCL_PLACE 1024   /* bytes of the text that says where rank 0 is */
#define LLMPAR__NCCL_STRANGERS 64 /* connections that have not said hello yet, at most */
#define LLMPAR__NCCL_PORTS 16
#define LLMPAR__NCCL_PATIENCE 3.0 /* seconds for which a rank waits for the answer to its hello, before it tries another way */
#define LLMPAR__NCCL_AFTER 5.0    /* seconds for which rank 0 tells those who come late of an error */
#define LLMPAR__NCCL_EXCUSE 30.0  /* .. and for which a rank that cannot take part looks for the others to say so */

/* Where rank 0 is. */
typedef struct llmpar__nccl_place {
    uint64_t key;
    int port, ports;
    char hosts[LLMPAR__NCCL_PLACE]; /* blanks between them */
} llmpar__nccl_place;

typedef struct llmpar__nccl_stranger {
    int fd;
    double since;              /* it has not been here for longer */
    size_t got;
    llmpar__nccl_hello hello;
} llmpar__nccl_stranger;

/* "llmpar KEY PORT HOST HOST ..", or "!" and why there will be none. */
static int llmpar__nccl_place_read(const char *text, llmpar__nccl_place *place, char why[512])
{
    char *rest;
    if (text[0] == '!') {
        snprintf(why, 512, "%.500s", text + 1);
        return 0;
    }
    memset(place, 0, sizeof *place);
    if (strncmp(text, "llmpar ", 7)) return 0;
    place->key = strtoull(text + 7, &rest, 16);
    if (*rest != ' ') return 0;
    place->port = (int)strtol(rest + 1, &rest, 10);
    if (*rest != ' ' || place->port < 1 || place->port > 65535) return 0;
    place->ports = 1;
    size_t length = strlen(rest + 1);
    if (length < 2 || length >= sizeof place->hosts || rest[length] != '\n') return 0; /* cut: it is being written */
    memcpy(place->hosts, rest + 1, length - 1);
    return 1;
}

/* At once or not at all: to a name beside it, then renamed. */
static int llmpar__nccl_place_write(const char *path, const char *text)
{
    char beside[1100];
    size_t length = strlen(text);
    if (snprintf(beside, sizeof beside, "%s.%ld", path, (long)getpid()) >= (int)sizeof beside) {
        errno = ENAMETOOLONG;
        return 0;
    }
    int fd = open(beside, O_WRONLY | O_CREAT | O_TRUNC | O_CLOEXEC, 0600);
    if (fd < 0) return 0;
    errno = ENOSPC; /* what a part of it means */
    int written = write(fd, text, length) == (ssize_t)length;
    if (close(fd)) written = 0;
    if (written && !rename(beside, path)) return 1;
    int failure = errno;
    unlink(beside);
    errno = failure;
    return 0;
}

static llmpar_status llmpar__nccl_address(llmpar__nccl_world *world, const char *address, llmpar__nccl_place *place)
{
    memset(place, 0, sizeof *place);
    if (!llmpar__nccl_split_address(address, place->hosts, &place->port) || !place->port)
        return llmpar_error_set(world->error, LLMPAR_ERR_CONFIG, "nccl: \"%.200s\" is not an address, expected host:port or [address]:port with a port from 1 to 65535", address);
    place->key = (uint64_t)place->port; /* of two jobs with neighbouring ports one looks at the other's, too */
    place->ports = LLMPAR__NCCL_PORTS;
    if (place->port + place->ports > 65536) place->ports = 65536 - place->port;
    return LLMPAR_OK;
}

/* ---- rank 0 ---- */

/* A connection to every rank is a file, and what else a rank opens: as many as the system allows, as NCCL itself asks of it. */
static llmpar_status llmpar__nccl_files(const llmpar__nccl_world *world)
{
    struct rlimit files;
    rlim_t need = (rlim_t)world->ranks + 64;
    if (getrlimit(RLIMIT_NOFILE, &files) || files.rlim_cur >= need) return LLMPAR_OK;
    files.rlim_cur = files.rlim_max;
    if (files.rlim_max >= need && !setrlimit(RLIMIT_NOFILE, &files)) return LLMPAR_OK;
    return llmpar_error_set(world->error, LLMPAR_ERR_CONFIG, "nccl: rank 0 holds a connection to each of %d ranks, but may open %llu files, expected at least %llu (ulimit -n)", (int)world->ranks, (unsigned long long)files.rlim_max,
                            (unsigned long long)need);
}

/* Listens, and says where. host_comm's broadcast takes place on every path. */
static llmpar_status llmpar__nccl_open(llmpar__nccl_world *world, llmpar_ctx *ctx, llmpar_status st, int *listener, uint64_t *key)
{
    const llmpar_nccl_desc *desc = &world->desc;
    const char *address = desc->address ? desc->address : ctx->host_comm || desc->file ? NULL : ctx->meeting;
    llmpar__nccl_place place;
    char text[LLMPAR__NCCL_PLACE], hosts[LLMPAR__NCCL_PLACE - 64];
    int failure = 0, port = 0;
    *key = 0;
    if (desc->file) address = NULL;
    if (address) {
        llmpar_status read = llmpar__nccl_address(world, address, &place);
        if (read) return st ? st : read;
        *key = place.key;
        for (int i = 0; i < place.ports && *listener < 0; i++) {
            *listener = llmpar__nccl_listen(place.hosts, place.port + i, &port, &failure);
            if (*listener < 0 && failure != EADDRINUSE) break;
        }
        if (*listener >= 0) return st;
        llmpar_status none = llmpar_error_set(world->error, LLMPAR_ERR_IO, "nccl: rank 0 cannot listen at %.200s (ports %d to %d): %s", address, place.port, place.port + place.ports - 1, strerror(failure));
        return st ? st : none;
    }
    *key = llmpar__nccl_random();
    *listener = llmpar__nccl_listen(NULL, 0, &port, &failure);
    if (*listener < 0 && !st) st = llmpar_error_set(world->error, LLMPAR_ERR_IO, "nccl: rank 0 cannot listen for the others: %s", strerror(failure));
    memset(text, 0, sizeof text);
    if (*listener >= 0) {
        llmpar__nccl_own_addresses(hosts, sizeof hosts);
        snprintf(text, sizeof text, "llmpar %llx %d %s\n", (unsigned long long)*key, port, hosts);
    } else {
        snprintf(text, sizeof text, "!%.500s", world->error->text);
    }
    if (desc->file) {
        if (!llmpar__nccl_place_write(desc->file, text) && !st) st = llmpar_error_set(world->error, LLMPAR_ERR_IO, "nccl: rank 0 cannot write its address to %.300s: %s", desc->file, strerror(errno));
        return st;
    }
    llmpar_collective call;
    memset(&call, 0, sizeof call);
    call.send = call.recv = text;
    call.count = sizeof text;
    call.dtype = LLMPAR_U8;
    call.tag = "nccl/meeting";
    llmpar_status sent = llmpar_broadcast(ctx->host_comm, NULL, &call);
    return st ? st : sent;
}

static void llmpar__nccl_hello_fill(const llmpar__nccl_world *world, llmpar_status st, int32_t nccl, uint64_t key, llmpar__nccl_hello *hello)
{
    memset(hello, 0, sizeof *hello);
    memcpy(hello->magic, LLMPAR__NCCL_MAGIC, sizeof hello->magic);
    hello->bytes = (uint32_t)sizeof *hello;
    hello->version = LLMPAR_VERSION_NUMBER;
    hello->key = key;
    hello->slice = world->desc.slice;
    hello->pid = (int64_t)getpid();
    hello->world = world->ranks;
    hello->rank = world->rank;
    hello->nccl = nccl;
    hello->fast = world->desc.fast;
    hello->unchecked = world->desc.unchecked;
    hello->one_device = world->desc.one_device;
    snprintf(hello->host, sizeof hello->host, "%.63s", world->host);
    llmpar__nccl_own_boot(hello->boot, sizeof hello->boot);
    if (world->device && world->device->name) snprintf(hello->device, sizeof hello->device, "%s", world->device->name);
    if (world->device && world->device->size >= offsetof(llmpar_device, place) + sizeof world->device->place && world->device->place) snprintf(hello->place, sizeof hello->place, "%s", world->device->place);
    if (st) hello->error = *world->error;
    else llmpar_error_clear(&hello->error);
    if (st) hello->error.status = st;
    hello->error.rank = world->rank;
}

/* A name for messages: "rank 3 (node1, pid 77)". */
static const char *llmpar__nccl_name(const llmpar__nccl_hello *hello, char text[120])
{
    snprintf(text, 120, "rank %d (%s, pid %lld)", (int)hello->rank, hello->host, (long long)hello->pid);
    return text;
}

/* In what a rank differs from rank 0. */
static llmpar_status llmpar__nccl_compare(const llmpar__nccl_hello *mine, const llmpar__nccl_hello *theirs, llmpar_error *error)
{
    char a[120], b[120];
    llmpar__nccl_name(theirs, a);
    llmpar__nccl_name(mine, b);
    if (theirs->world != mine->world) return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: %s was started in a world of %d ranks, %s in one of %d", a, (int)theirs->world, b, (int)mine->world);
    if (theirs->rank <= 0 || theirs->rank >= mine->world) return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: %s has come to %s of a world of %d ranks", a, b, (int)mine->world);
    if (theirs->nccl != mine->nccl) return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: %s has NCCL %d, %s NCCL %d", a, (int)theirs->nccl, b, (int)mine->nccl);
    if (strcmp(theirs->device, mine->device)) return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: %s has device %s, %s %s", a, theirs->device, b, mine->device);
    if (theirs->fast != mine->fast || theirs->unchecked != mine->unchecked || theirs->slice != mine->slice || theirs->one_device != mine->one_device)
        return llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: the ranks are described differently: %s: fast %d, unchecked %d, slice %llu, one_device %d; %s: fast %d, unchecked %d, slice %llu, one_device %d", a,
                                (int)theirs->fast, (int)theirs->unchecked, (unsigned long long)theirs->slice, (int)theirs->one_device, b, (int)mine->fast, (int)mine->unchecked, (unsigned long long)mine->slice, (int)mine->one_device);
    return LLMPAR_OK;
}

/* A rank of this meeting, built from another version: as far as every version begins its hello. It could not read an answer. */
static int llmpar__nccl_foreign(const llmpar__nccl_stranger *s, uint64_t key, llmpar_error *error)
{
    const llmpar__nccl_hello *hello = &s->hello;
    if (s->got < offsetof(llmpar__nccl_hello, slice) || memcmp(hello->magic, LLMPAR__NCCL_MAGIC, sizeof hello->magic) || hello->key != key || (hello->bytes == sizeof *hello && hello->version == LLMPAR_VERSION_NUMBER)) return 0;
    llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: the meeting: a rank of another build has come to rank 0: version %u and a hello of %u bytes, expected version %u and %u bytes", (unsigned)hello->version, (unsigned)hello->bytes, LLMPAR_VERSION_NUMBER,
                     (unsigned)sizeof *hello);
    if (error->rank < 0) error->rank = 0;
    return 1;
}

/* Does it speak this build's language, and mean this meeting? */
static int llmpar__nccl_ours(llmpar__nccl_hello *hello, uint64_t key)
{
    if (memcmp(hello->magic, LLMPAR__NCCL_MAGIC, sizeof hello->magic) || hello->bytes != sizeof *hello || hello->version != LLMPAR_VERSION_NUMBER || hello->key != key) return 0;
    hello->device[sizeof hello->device - 1] = hello->place[sizeof hello->place - 1] = hello->host[sizeof hello->host - 1] = hello->boot[sizeof hello->boot - 1] = 0;
    llmpar__nccl_mend_error(&hello->error);
    return 1;
}

static void llmpar__nccl_welcome_one(const llmpar__nccl_world *world, int fd, const llmpar_error *error, const ncclUniqueId *id)
{
    llmpar__nccl_welcome welcome;
    memset(&welcome, 0, sizeof welcome);
    welcome.error = *error;
    welcome.pid = (int64_t)getpid();
    snprintf(welcome.host, sizeof welcome.host, "%.63s", world->host);
    welcome.id = *id;
    llmpar__nccl_send_all(fd, &welcome, sizeof welcome, llmpar__nccl_now() + 5); /* who does not take it is missed soon enough */
}

/* A hello has come over fd, connected since then, which is kept (1), or not. */
static int llmpar__nccl_take_hello(llmpar__nccl_world *world, llmpar__nccl_hello *all, llmpar__nccl_hello *hello, uint64_t key, int fd, double since, llmpar_error *error)
{
    llmpar__nccl_accept accept;
    char a[120], b[120];
    if (!llmpar__nccl_ours(hello, key)) return 0;
    memset(&accept, 0, sizeof accept);
    memcpy(accept.magic, LLMPAR__NCCL_MAGIC, sizeof accept.magic);
    accept.key = key;
    if (!llmpar__nccl_send_all(fd, &accept, sizeof accept, llmpar__nccl_now() + 5)) return 0;
    if (hello->rank > 0 && hello->rank < world->ranks) {
        world->peer[hello->rank].told = 1; /* heard of */
        if (hello->error.status && error->status == LLMPAR_OK) { /* before it is compared: it may have no device */
            *error = hello->error;
            error->rank = hello->rank;
        }
    }
    if (llmpar__nccl_compare(&all[0], hello, error)) {
        if (error->rank < 0) error->rank = hello->rank;
        return 0;
    }
    llmpar__nccl_peer *peer = &world->peer[hello->rank];
    if (peer->there && llmpar__nccl_gone(peer->link.fd)) { /* it has tried another way */
        llmpar__nccl_close(&peer->link.fd);
        peer->there = 0;
    }
    if (peer->there) {
        llmpar_error_set(error, LLMPAR_ERR_MISMATCH, "nccl: two processes are rank %d: %s and %s", (int)hello->rank, llmpar__nccl_name(&all[hello->rank], a), llmpar__nccl_name(hello, b));
        if (error->rank < 0) error->rank = hello->rank;
        return 0;
    }
    all[hello->rank] = *hello;
    peer->there = llmpar__nccl_now() < since + LLMPAR__NCCL_PATIENCE / 2 ? 2 : 1; /* 2: it knows for certain that it has been heard */
    peer->link.fd = fd;
    peer->pid = hello->pid;
    snprintf(peer->host, sizeof peer->host, "%.63s", hello->host);
    return 1;
}

/* As NCCL itself tells GPUs and machines apart; of one GPU by rank. */
static int llmpar__nccl_by_place(const void *x, const void *y)
{
    const llmpar__nccl_hello *a = *(const llmpar__nccl_hello *const *)x, *b = *(const llmpar__nccl_hello *const *)y;
    int order = strcmp(a->place, b->place);
    if (!order) order = strcmp(a->host, b->host);
    if (!order) order = strcmp(a->boot, b->boot);
    return order ? order : a->rank - b->rank;
}

static void llmpar__nccl_neighbours(const llmpar__nccl_world *world, const llmpar__nccl_hello *all, llmpar_error *error)
{
    size_t n = (size_t)world->ranks;
    char a[120], b[120];
    if (world->desc.one_device) return;
    const llmpar__nccl_hello **by = (const llmpar__nccl_hello **)malloc(n * sizeof *by), *first = NULL, *second = NULL;
    if (!by) {
        llmpar_error_set(error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the meeting of %d ranks", (int)world->ranks);
        return;
    }
    for (size_t i = 0; i < n; i++) by[i] = &all[i];
    qsort((void *)by, n, sizeof *by, llmpar__nccl_by_place);
    for (size_t i = 1; i < n; i++) { /* the lowest rank that comes second */
        if (!by[i]->place[0] || strcmp(by[i]->place, by[i - 1]->place) || strcmp(by[i]->host, by[i - 1]->host) || strcmp(by[i]->boot, by[i - 1]->boot) || (second && second->rank < by[i]->rank)) continue;
        first = by[i - 1];
        second = by[i];
    }
    free((void *)by);
    if (!second) return;
    llmpar_error_set(error, LLMPAR_ERR_CONFIG, "nccl: %s and %s have the same GPU, %s (NCCL needs one a rank)", llmpar__nccl_name(first, a), llmpar__nccl_name(second, b), second->place);
    if (error->rank < 0) error->rank = second->rank;
}

static void llmpar__nccl_missing(const llmpar__nccl_world *world, llmpar_error *error)
{
    char who[200];
    size_t used = 0;
    who[0] = 0;
    for (int32_t i = 1; i < world->ranks && used < sizeof who - 24; i++)
        if (!world->peer[i].there) used += (size_t)snprintf(who + used, sizeof who - used, " %d", (int)i);
    llmpar_error_set(error, LLMPAR_ERR_TIMEOUT, "nccl: the meeting: rank 0 waited %g s for ranks%s", world->desc.deadline, who);
    error->rank = 0;
}

/* Until all are there, the time is up, or an error has been shown to all who came within a while. looked: nobody has connected before. */
static void llmpar__nccl_assemble(llmpar__nccl_world *world, int listener, llmpar__nccl_hello *all, llmpar__nccl_stranger *stranger, uint64_t key, const ncclUniqueId *id, double looked, llmpar_error *error)
{
    double begin = llmpar__nccl_now(), limit = world->desc.deadline > 0 ? begin + world->desc.deadline : 0, failed = 0, after = LLMPAR__NCCL_AFTER;
    int waiting = 0;
    if (error->status) after = limit > 0 && world->desc.deadline < LLMPAR__NCCL_EXCUSE ? world->desc.deadline : LLMPAR__NCCL_EXCUSE;
    for (;;) {
        double now = llmpar__nccl_now();
        int fd, there = 1, heard = 1;
        while (waiting < LLMPAR__NCCL_STRANGERS && (fd = llmpar__nccl_accept_one(listener)) >= 0) {
            stranger[waiting].fd = fd;
            stranger[waiting].since = looked;
            stranger[waiting++].got = 0;
        }
        if (waiting < LLMPAR__NCCL_STRANGERS) { /* else others may be waiting at the door */
            if ((errno == EMFILE || errno == ENFILE) && !error->status) {
                llmpar_error_set(error, LLMPAR_ERR_IO, "nccl: the meeting: rank 0 cannot take the connections of %d ranks: %s", (int)world->ranks, strerror(errno));
                error->rank = 0;
            }
            looked = now;
        }
        for (int i = 0; i < waiting; i++) {
            llmpar__nccl_stranger *s = &stranger[i];
            size_t left = sizeof s->hello - s->got;
            int keep = 0;
            long got = llmpar__nccl_receive_some(s->fd, (char *)&s->hello + s->got, left);
            if (got > 0) s->got += (size_t)got, left -= (size_t)got;
            int known = s->got < sizeof s->hello.magic || (!memcmp(s->hello.magic, LLMPAR__NCCL_MAGIC, sizeof s->hello.magic) && !llmpar__nccl_foreign(s, key, error));
            if (left && got >= 0 && known && now < s->since + 5) continue;
            if (!left) keep = llmpar__nccl_take_hello(world, all, &s->hello, key, s->fd, s->since, error);
            if (!left && !keep && error->status && llmpar__nccl_ours(&s->hello, key)) llmpar__nccl_welcome_one(world, s->fd, error, id);
            if (!keep) llmpar__nccl_close(&s->fd);
            if (i < --waiting) *s = stranger[waiting];
            i--;
        }
        for (int32_t i = 1; i < world->ranks; i++) {
            llmpar__nccl_peer *peer = &world->peer[i];
            if (error->status && peer->link.fd >= 0) {
                llmpar__nccl_welcome_one(world, peer->link.fd, error, id);
                llmpar__nccl_close(&peer->link.fd);
            }
            if (peer->there && peer->link.fd >= 0 && llmpar__nccl_gone(peer->link.fd)) {
                llmpar__nccl_close(&peer->link.fd);
                if (peer->there == 2) {
                    llmpar_error_set(error, LLMPAR_ERR_TIMEOUT, "nccl: the meeting: rank %d (%s, pid %lld) has gone away before all ranks had come", (int)i, peer->host, (long long)peer->pid);
                    error->rank = i;
                }
                peer->there = 0;
            }
            there = there && peer->there;
            heard = heard && peer->told;
        }
        if (there && !error->status) llmpar__nccl_neighbours(world, all, error);
        if (!error->status && !there && limit > 0 && now > limit) llmpar__nccl_missing(world, error);
        if (error->status && failed <= 0) failed = now;
        if (there || (error->status && heard) || (failed > 0 && now > failed + after) || (error->status == LLMPAR_ERR_TIMEOUT && limit > 0 && now > limit)) break;
        llmpar__nccl_nap(0.002);
    }
    while (waiting > 0) llmpar__nccl_close(&stranger[--waiting].fd);
    for (int32_t i = 1; i < world->ranks; i++) world->peer[i].told = 0;
    for (int32_t i = 1; i < world->ranks; i++)
        if (world->peer[i].link.fd >= 0) llmpar__nccl_welcome_one(world, world->peer[i].link.fd, error, id);
}

static llmpar_status llmpar__nccl_host(llmpar__nccl_world *world, llmpar_ctx *ctx, llmpar_status st, int32_t nccl, ncclUniqueId *id)
{
    llmpar__nccl_hello *all = (llmpar__nccl_hello *)llmpar_heap_zalloc(world->heap, (size_t)world->ranks, sizeof *all);
    llmpar__nccl_stranger *stranger = (llmpar__nccl_stranger *)llmpar_heap_zalloc(world->heap, LLMPAR__NCCL_STRANGERS, sizeof *stranger);
    llmpar_error error;
    uint64_t key = 0;
    double listens = llmpar__nccl_now();
    int listener = -1;
    if (!all || !stranger) { /* not even able to say so */
        llmpar_heap_free(world->heap, all);
        llmpar_heap_free(world->heap, stranger);
        return llmpar_error_set(world->error, LLMPAR_ERR_MEMORY, "nccl: out of memory for the meeting of %d ranks", (int)world->ranks);
    }
    if (!st) st = llmpar__nccl_files(world);
    st = llmpar__nccl_open(world, ctx, st, &listener, &key);
    llmpar_error_clear(&error);
    if (st) {
        error = *world->error;
        error.status = st;
        error.rank = 0;
    }
    llmpar__nccl_hello_fill(world, LLMPAR_OK, nccl, key, &all[0]);
    if (listener >= 0) llmpar__nccl_assemble(world, listener, all, stranger, key, id, listens, &error);
    else if (world->desc.file) llmpar__nccl_nap(LLMPAR__NCCL_AFTER); /* the file says why */
    llmpar__nccl_close(&listener);
    if (world->desc.file) unlink(world->desc.file);
    llmpar_heap_free(world->heap, all);
    llmpar_heap_free(world->heap, stranger);
    if (!st && error.status) *world->error = error;
    return error.status;
}

/* ---- the others ---- */

/* One attempt at one place. The connection, or -1. */
static int llmpar__nccl_try(const char *host, int port, const llmpar__nccl_hello *hello, double limit, const char **why)
{
    llmpar__nccl_accept accept;
    int fd = llmpar__nccl_connect(host, port, limit, why);
    if (fd < 0) return -1;
    *why = "nobody there answers as rank 0";
    double now = llmpar__nccl_now();
    if (llmpar__nccl_send_all(fd, hello, sizeof *hello, now + LLMPAR__NCCL_PATIENCE) && llmpar__nccl_receive_all(fd, &accept, sizeof accept, now + LLMPAR__NCCL_PATIENCE) == 1 && !memcmp(accept.magic, LLMPAR__NCCL_MAGIC, sizeof accept.magic) &&
        accept.key == hello->key)
        return fd;
    llmpar__nccl_close(&fd);
    return -1;
}

static int llmpar__nccl_try_all(const llmpar__nccl_place *place, const llmpar__nccl_hello *hello, double limit, const char **why)
{
    const char *at = place->hosts;
    while (*at) {
        char host[256];
        size_t length = strcspn(at, " ");
        if (length < sizeof host) {
            memcpy(host, at, length);
            host[length] = 0;
            for (int i = 0; i < place->ports && llmpar__nccl_now() < limit; i++) {
                int fd = llmpar__nccl_try(host, place->port + i, hello, limit, why);
                if (fd >= 0) return fd;
            }
        }
        at += length;
        while (*at == ' ') at++;
    }
    return -1;
}

static llmpar_status llmpar__nccl_join(llmpar__nccl_world *world, llmpar_ctx *ctx, llmpar_status st, int32_t nccl, ncclUniqueId *id)
{
    const llmpar_nccl_desc *desc = &world->desc;
    const char *address = desc->file ? NULL : desc->address ? desc->address : ctx->host_comm ? NULL : ctx->meeting;
    llmpar__nccl_place place;
    llmpar__nccl_hello hello;
    llmpar__nccl_welcome welcome;
    char text[LLMPAR__NCCL_PLACE + 1], why[512] = "";
    const char *last = "no address"; /* why it was not found, at the last place */
    int known = 0, fd = -1;
    memset(text, 0, sizeof text);
    memset(&place, 0, sizeof place);
    if (address) {
        llmpar_status read = llmpar__nccl_address(world, address, &place);
        if (read) return st ? st : read;
        known = 1;
    } else if (!desc->file) {
        llmpar_collective call;
        memset(&call, 0, sizeof call);
        call.recv = text;
        call.count = LLMPAR__NCCL_PLACE;
        call.dtype = LLMPAR_U8;
        call.tag = "nccl/meeting";
        llmpar_status heard = llmpar_broadcast(ctx->host_comm, NULL, &call);
        if (heard) return st ? st : heard;
        known = llmpar__nccl_place_read(text, &place, why);
        if (!known) return st ? st : llmpar_error_set(world->error, LLMPAR_ERR_PEER, "nccl: the meeting: rank 0: %s", why[0] ? why : "no address");
    }
    double begin = llmpar__nccl_now(), limit = desc->deadline > 0 ? begin + desc->deadline : begin + 1e9;
    if (st && limit > begin + LLMPAR__NCCL_EXCUSE) limit = begin + LLMPAR__NCCL_EXCUSE;
    for (int round = 0; fd < 0 && llmpar__nccl_now() < limit; round++) {
        if (desc->file) {
            int file = open(desc->file, O_RDONLY | O_CLOEXEC);
            ssize_t got = file >= 0 ? read(file, text, LLMPAR__NCCL_PLACE) : -1;
            if (got < 0) last = strerror(errno);
            if (file >= 0) close(file);
            text[got > 0 ? got : 0] = 0;
            known = llmpar__nccl_place_read(text, &place, why);
            if (why[0]) break;
        }
        if (known) {
            llmpar__nccl_hello_fill(world, st, nccl, place.key, &hello);
            fd = llmpar__nccl_try_all(&place, &hello, limit, &last);
        }
        if (fd < 0) llmpar__nccl_nap(round < 20 ? 0.01 : 0.1);
    }
    if (fd < 0) {
        if (st) return st;
        if (why[0]) return llmpar_error_set(world->error, LLMPAR_ERR_PEER, "nccl: the meeting: rank 0: %s", why);
        return llmpar_error_set(world->error, LLMPAR_ERR_TIMEOUT, "nccl: the meeting: rank 0 was not to be found at %s%.300s within %g s: %s", desc->file ? "the address in " : "",
                                desc->file ? desc->file : address ? address : place.hosts, desc->deadline, last);
    }
    int got = llmpar__nccl_receive_all(fd, &welcome, sizeof welcome, limit + 2 * LLMPAR__NCCL_AFTER);
    if (got != 1) {
        llmpar__nccl_close(&fd);
        if (st) return st;
        return llmpar_error_set(world->error, got ? LLMPAR_ERR_TIMEOUT : LLMPAR_ERR_PEER, "nccl: the meeting: rank 0 %s before all ranks had come", got ? "has not answered" : "has gone away");
    }
    llmpar__nccl_mend_error(&welcome.error);
    welcome.host[sizeof welcome.host - 1] = 0;
    if (st || welcome.error.status) {
        llmpar__nccl_close(&fd);
        if (!st) *world->error = welcome.error;
        return st ? st : welcome.error.status;
    }
    *id = welcome.id;
    world->peer[0].link.fd = fd;
    world->peer[0].there = 1;
    world->peer[0].pid = welcome.pid;
    snprintf(world->peer[0].host, sizeof world->peer[0].host, "%.63s", welcome.host);
    return LLMPAR_OK;
}

LLMPAR__PRIVATE_DEF llmpar_status llmpar__nccl_meet(llmpar__nccl_world *world, llmpar_ctx *ctx, llmpar_status st, int32_t nccl, ncclUniqueId *id)
{
    const llmpar_nccl_desc *desc = &world->desc;
    if (world->ranks == 1) return st;
    if (!desc->file && !desc->address && !ctx->host_comm && !ctx->meeting)
        return st ? st : llmpar_error_set(world->error, LLMPAR_ERR_CONFIG, "nccl: %d ranks have no place to meet: expected a file or an address in the desc, a transport (rank threads, MPI), or MASTER_ADDR and MASTER_PORT", (int)world->ranks);
    return world->rank ? llmpar__nccl_join(world, ctx, st, nccl, id) : llmpar__nccl_host(world, ctx, st, nccl, id);
}

#undef LLMPAR__NCCL_PLACE
#undef LLMPAR__NCCL_STRANGERS
#undef LLMPAR__NCCL_PORTS
#undef LLMPAR__NCCL_PATIENCE
#undef LLMPAR__NCCL_AFTER
#undef LLMPAR__NCCL_EXCUSE
